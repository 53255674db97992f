//! A recorded episode: what the cameras saw, and what was done.
//!
//! ```text
//! EPISODE/frames/000000.png …             pictures, in the order of their names; or without `frames/`
//! EPISODE/wrist/000000.png …              of the wrist camera, as many; then wrist_2/ …
//! EPISODE/actions.jsonl | .csv | .npy     an action for each picture, in the data set's units
//! EPISODE/states.jsonl | .csv | .npy      the arm's states, where the model reads them
//! EPISODE/instruction.txt                 what was asked for
//! ```
//!
//! A line of JSON is a list of numbers, or an object with `action`, and as `openvla-client --record` writes it with
//! `frame`, the picture's path in the folder, `instruction`, and `by`: `model` for what a model did.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use openvla::checksum;
use openvla::cli::is_picture;
use openvla::image::RgbImage;

use crate::table::{self, Table};

/// Pictures of a folder that are listed. An hour at 50 Hz has fewer.
const MAX_FRAMES: usize = 200_000;

/// What is in an episode's folder. Pictures are read one by one.
#[derive(Debug, Clone)]
pub struct Episode {
    /// Of each moment the pictures of all cameras, the third-person one's first.
    pub frames: Vec<Vec<PathBuf>>,
    /// Of each moment the action, in the data set's units.
    pub actions: Vec<Vec<f64>>,
    /// Of each moment the state of the arm, if it is known.
    pub states: Option<Vec<Vec<f64>>>,
    /// What was asked for, if it is known.
    pub instruction: Option<String>,
    /// Whether the actions are what a model did, not what was demonstrated.
    pub by_model: bool,
}

/// What the cameras saw at one moment.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The pictures, the third-person camera's first.
    pub images: Vec<RgbImage>,
    /// The arm's state.
    pub state: Option<Vec<f64>>,
}

impl Seen {
    /// A hash of it, in hexadecimal.
    pub fn hash(&self) -> String {
        let images = self.images.iter().map(|image| checksum(image.as_raw()));
        let state = checksum(format!("{:?}", self.state).as_bytes());
        let all: Vec<String> =
            images.chain([state]).map(|checksum| format!("{checksum:016x}")).collect();
        all.join("-")
    }
}

impl Episode {
    /// Lists a folder and reads its numbers.
    ///
    /// # Errors
    /// If something is missing, or there are not as many of one thing as of another.
    pub fn open(folder: &Path) -> Result<Self> {
        let is_lerobot = folder.join("meta/info.json").is_file();
        ensure!(
            !is_lerobot,
            "{} is a LeRobot data set, which is not read directly; export an episode of it with the lines in \
             doctor/README.md",
            folder.display()
        );
        let file = table::find(folder, "actions")?.with_context(|| {
            format!("{} has no actions.jsonl, actions.csv or actions.npy", folder.display())
        })?;
        let Table { rows: actions, objects } = Table::read(&file, "action")?;
        let names = objects.iter().map(|line| line["frame"].as_str());
        let named: Option<Vec<&str>> = names.collect();
        let fronts = match named.filter(|names| !names.is_empty()) {
            Some(names) => {
                names.into_iter().map(|name| below(folder, name)).collect::<Result<_>>()?
            }
            None => {
                let inside = folder.join("frames");
                pictures(if inside.is_dir() { &inside } else { folder })?
            }
        };
        let mut cameras = vec![fronts];
        for i in 1.. {
            let name = if i == 1 { "wrist".to_owned() } else { format!("wrist_{i}") };
            let folder = folder.join(name);
            if !folder.is_dir() {
                break;
            }
            cameras.push(pictures(&folder)?);
        }
        let n = actions.len();
        for frames in &cameras {
            let place = frames[0].parent().unwrap_or(folder).display();
            let (found, file) = (frames.len(), file.display());
            ensure!(
                found == n,
                "{place} has {found} pictures, and {file} has {n} actions; as many are needed"
            );
        }
        let states = table::find(folder, "states")?.map(|file| -> Result<_> {
            let states = Table::read(&file, "state")?.rows;
            let (found, file) = (states.len(), file.display());
            ensure!(found == n, "{file} has {found} states for {n} actions; as many are needed");
            Ok(states)
        });
        let in_lines: Option<Vec<Vec<f64>>> = objects
            .iter()
            .map(|line| line["state"].as_array()?.iter().map(serde_json::Value::as_f64).collect())
            .collect();
        let states = states.transpose()?.or(in_lines.filter(|states| !states.is_empty()));
        let text = folder.join("instruction.txt");
        let mut instruction =
            objects.iter().find_map(|line| line["instruction"].as_str()).map(str::to_owned);
        if text.is_file() {
            let text = String::from_utf8(table::read_bytes(&text)?);
            instruction = Some(text.context("instruction.txt is not UTF-8")?.trim().to_owned());
        }
        let by_model = !objects.is_empty() && objects.iter().all(|line| line["by"] == "model");
        let frames = (0..n).map(|i| cameras.iter().map(|frames| frames[i].clone()).collect());
        Ok(Self { frames: frames.collect(), actions, states, instruction, by_model })
    }

    /// Moments of the episode.
    pub fn n(&self) -> usize {
        self.actions.len()
    }

    /// Reads the pictures of a moment.
    ///
    /// # Errors
    /// If one is missing, or no picture.
    pub fn seen(&self, i: usize) -> Result<Seen> {
        let images = self.frames[i].iter().map(|path| read_picture(path)).collect::<Result<_>>()?;
        Ok(Seen { images, state: self.states.as_ref().map(|states| states[i].clone()) })
    }

    /// At most `n` moments, evenly spaced from the first to the last.
    pub fn moments(&self, n: usize) -> Vec<usize> {
        let (all, n) = (self.n(), n.min(self.n()).max(1));
        (0..n).map(|i| if n == 1 { 0 } else { i * (all - 1) / (n - 1) }).collect()
    }
}

/// The file that a line names. An episode may be a stranger's, and its report shows pictures: none of elsewhere.
fn below(folder: &Path, name: &str) -> Result<PathBuf> {
    let mut parts = Path::new(name).components();
    ensure!(
        parts.all(|part| matches!(part, Component::Normal(_) | Component::CurDir)),
        "a line names the frame {name:?}, which is not below {}; keep pictures in the episode's folder",
        folder.display()
    );
    Ok(folder.join(name))
}

/// Reads a picture file.
///
/// # Errors
/// If it cannot be read, or is none.
pub fn read_picture(path: &Path) -> Result<RgbImage> {
    let bytes = table::read_bytes(path)?;
    openvla::decode(&bytes).with_context(|| format!("cannot decode {}", path.display()))
}

/// The pictures of a folder, in the order of their names.
fn pictures(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut pictures = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", folder.display()))?.path();
        if is_picture(&path) {
            pictures.push(path);
        }
        if pictures.len() > MAX_FRAMES {
            bail!(
                "{} has more than {MAX_FRAMES} pictures; name a folder of one episode",
                folder.display()
            );
        }
    }
    ensure!(!pictures.is_empty(), "{} has no pictures (png, jpg, webp, bmp)", folder.display());
    pictures.sort();
    Ok(pictures)
}
