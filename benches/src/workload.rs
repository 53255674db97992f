//! The control step that every measurement runs: one picture of a table, one instruction.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use openvla::image::RgbImage;
use openvla::image::imageops::{FilterType, resize};
use openvla::{Action, OpenVla, Options, Session};
use tempfile::TempDir;

/// What the robot is asked to do.
pub const INSTRUCTION: &str = "put eggplant into pot";

/// The random example, whose matrices fit every type.
static EXAMPLE: &[u8] = include_bytes!("example.gguf");

/// A table with an eggplant and a pot, 320 × 240.
static TABLE: &[u8] = include_bytes!("table.png");

/// A model file; the example's goes with this value.
pub struct ModelFile {
    /// Where it is.
    pub path: PathBuf,
    _folder: Option<TempDir>,
}

impl ModelFile {
    /// The file that was named, else `$OPENVLA_MODEL`, else the built-in example.
    ///
    /// # Errors
    /// If the example cannot be written to a temporary folder.
    pub fn find(named: Option<PathBuf>) -> Result<Self> {
        if let Some(path) = openvla::cli::model_path(named) {
            return Ok(Self { path, _folder: None });
        }
        openvla::cli::say(
            "measuring the built-in example, whose random weights are few; \
             -m openvla-7b.gguf names yours",
        );
        let folder = tempfile::tempdir().context("cannot make a folder for temporary files")?;
        let path = folder.path().join("example.gguf");
        std::fs::write(&path, EXAMPLE)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, _folder: Some(folder) })
    }
}

/// A model, ready to act, and what it is given.
pub struct Workload {
    /// The model.
    pub policy: OpenVla,
    /// 640 × 480, as cameras take.
    pub image: RgbImage,
    /// The data set whose units the motion is in: the first by name.
    pub key: String,
    /// The prompt's ids.
    pub ids: Vec<u32>,
}

impl Workload {
    /// Opens a model file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn open(model: &Path, options: &Options) -> Result<Self> {
        let policy = OpenVla::open(model, options)?;
        let key = policy.config().statistics.first().0.to_owned();
        let ids = policy.prompt_ids(INSTRUCTION)?;
        let image = resize(&openvla::decode(TABLE)?, 640, 480, FilterType::Triangle);
        Ok(Self { policy, image, key, ids })
    }

    /// One control step.
    ///
    /// # Errors
    /// What the model says.
    pub fn act(&mut self) -> Result<Action> {
        Ok(self.policy.act(&self.image, INSTRUCTION, Some(&self.key))?)
    }

    /// The same as a step of a session.
    ///
    /// # Errors
    /// What the model says.
    pub fn act_in(&mut self, session: &mut Session) -> Result<Action> {
        Ok(self.policy.act_in(session, &self.image, INSTRUCTION, Some(&self.key))?)
    }

    /// Rows of the prefill: the prompt's ids and the soft tokens.
    pub fn n_row(&self) -> usize {
        self.ids.len() + self.policy.config().n_patch()
    }

    /// Decode steps of a motion: its tokens but the first, which the prefill gives.
    pub fn n_step(&self) -> usize {
        self.policy.config().statistics.first().1.action.n() - 1
    }
}
