//! The control step that every measurement runs: one picture of a table, one instruction; and for an OpenVLA-OFT a
//! second view of the table, and the middle of every range that the arm's state has.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use openvla::image::RgbImage;
use openvla::image::imageops::{FilterType, resize, rotate180};
use openvla::oft::{Chunk, Observation, OpenVlaOft};
use openvla::{Action, OpenVla, Options, Scale, Session};
use tempfile::TempDir;

/// What the robot is asked to do unless a measurement says otherwise.
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
    /// What the robot is asked to do.
    pub instruction: String,
    /// The data set whose units the motion is in: the first by name.
    pub key: String,
    /// The prompt's ids.
    pub ids: Vec<u32>,
}

impl Workload {
    /// Opens an OpenVLA's file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn open(model: &Path, options: &Options) -> Result<Self> {
        Self::new(OpenVla::open(model, options)?, INSTRUCTION)
    }

    /// Of a policy that is open.
    ///
    /// # Errors
    /// If the tokenizer refuses the instruction.
    pub fn new(policy: OpenVla, instruction: &str) -> Result<Self> {
        let key = policy.config().statistics.first().0.to_owned();
        let (ids, instruction) = (policy.prompt_ids(instruction)?, instruction.to_owned());
        Ok(Self { policy, image: table()?, instruction, key, ids })
    }

    /// One control step.
    ///
    /// # Errors
    /// What the model says.
    pub fn act(&mut self) -> Result<Action> {
        Ok(self.policy.act(&self.image, &self.instruction, Some(&self.key))?)
    }

    /// The same as a step of a session.
    ///
    /// # Errors
    /// What the model says.
    pub fn act_in(&mut self, session: &mut Session) -> Result<Action> {
        let Self { policy, image, instruction, key, .. } = self;
        Ok(policy.act_in(session, image, instruction, Some(key))?)
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

/// An OpenVLA-OFT, ready to act, and what it is given.
pub struct OftWorkload {
    /// The model.
    pub policy: OpenVlaOft,
    /// One for each camera, 640 × 480.
    pub images: Vec<RgbImage>,
    /// The arm's, if the model reads it.
    pub state: Option<Vec<f64>>,
    /// What the robot is asked to do.
    pub instruction: String,
    /// The data set whose units state and actions are in: the first by name.
    pub key: String,
    /// The prompt's ids.
    pub ids: Vec<u32>,
}

impl OftWorkload {
    /// Of a policy that is open.
    ///
    /// # Errors
    /// If the tokenizer refuses the instruction.
    pub fn new(policy: OpenVlaOft, instruction: &str) -> Result<Self> {
        let (key, dataset) = policy.config().statistics.first();
        let key = key.to_owned();
        let middle =
            |scale: &Scale| scale.low.iter().zip(&scale.high).map(|(a, b)| (a + b) / 2.0).collect();
        let state = dataset.state.as_ref().map(middle);
        let table = table()?;
        let views = [table.clone(), rotate180(&table)].into_iter().cycle();
        let images = views.take(policy.oft().cameras.len()).collect();
        let (ids, instruction) = (policy.prompt_ids(instruction)?, instruction.to_owned());
        Ok(Self { policy, images, state, instruction, key, ids })
    }

    /// One control step.
    ///
    /// # Errors
    /// What the model says.
    pub fn act(&mut self) -> Result<Chunk> {
        let Self { policy, images, state, instruction, key, .. } = self;
        let images: Vec<&RgbImage> = images.iter().collect();
        let observation = Observation { images: &images, state: state.as_deref() };
        Ok(policy.act(&observation, instruction, Some(key))?)
    }

    /// Patches of all cameras.
    pub fn n_patch(&self) -> usize {
        self.policy.config().n_patch() * self.images.len()
    }

    /// Rows of the Llama's pass: the prompt's ids, the soft tokens, the state's, the actions' and the stop token.
    pub fn n_row(&self) -> usize {
        self.policy.n_row(self.ids.len())
    }
}

/// 640 × 480, as cameras take.
fn table() -> Result<RgbImage> {
    Ok(resize(&openvla::decode(TABLE)?, 640, 480, FilterType::Triangle))
}
