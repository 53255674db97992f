//! What a run saw and did, as a folder that `openvla-doctor` reads.
//!
//! ```text
//! FOLDER/frames/000000.png …   the pictures that were acted on, as they were sent
//! FOLDER/wrist/000000.png …    those of the wrist cameras, then wrist_2/ …
//! FOLDER/actions.jsonl         a line for each: frame, action, time (seconds since 1970), instruction, by
//! ```
//!
//! Actions are by `model`, and say nothing about what the model sees: put those of a demonstration in their place for
//! that.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use openvla::image::guess_format;
use serde_json::{Value, json};

/// Writes an episode, one motion after another.
pub struct Recorder {
    folder: PathBuf,
    lines: File,
    /// Motions so far.
    n: usize,
    wrists: Vec<Vec<u8>>,
    state: Option<Vec<f64>>,
}

impl Recorder {
    /// Makes the folder, which must be empty if it is there. Wrist cameras' pictures and the arm's state are the same
    /// with every motion.
    ///
    /// # Errors
    /// If it is not empty, or the system says so.
    pub fn new(folder: &Path, wrists: Vec<Vec<u8>>, state: Option<Vec<f64>>) -> Result<Self> {
        let cannot = || format!("cannot record in {}", folder.display());
        fs::create_dir_all(folder).with_context(cannot)?;
        let mut entries = fs::read_dir(folder).with_context(cannot)?;
        ensure!(entries.next().is_none(), "{} is not empty; name a new folder", folder.display());
        fs::create_dir(folder.join("frames")).with_context(cannot)?;
        for i in 0..wrists.len() {
            fs::create_dir(folder.join(wrist(i))).with_context(cannot)?;
        }
        let lines = File::create(folder.join("actions.jsonl")).with_context(cannot)?;
        Ok(Self { folder: folder.to_owned(), lines, n: 0, wrists, state })
    }

    /// Adds a motion: what was seen, when, what was asked for, and the server's answer. The pictures come first, so that
    /// no line names one that is not there.
    ///
    /// # Errors
    /// If the system says so.
    pub fn add(
        &mut self,
        picture: &[u8],
        taken: SystemTime,
        instruction: &str,
        answer: &Value,
    ) -> Result<()> {
        let frame = self.save("frames", picture)?;
        for (i, picture) in self.wrists.iter().enumerate() {
            self.save(&wrist(i), picture)?;
        }
        // An OpenVLA-OFT answers a chunk, whose first action belongs to what was seen.
        let action = answer.get("action").unwrap_or(&answer["actions"][0]);
        let time = taken.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut line = json!({
            "frame": frame, "action": action, "time": time, "instruction": instruction, "by": "model",
        });
        if let Some(state) = &self.state {
            line["state"] = json!(state);
        }
        let line = format!("{line}\n");
        let written = self.lines.write_all(line.as_bytes());
        written.with_context(|| format!("cannot record in {}", self.folder.display()))?;
        self.n += 1;
        Ok(())
    }

    /// Writes a picture file into a folder of the episode; returns its path in it.
    fn save(&self, camera: &str, picture: &[u8]) -> Result<String> {
        let format = guess_format(picture).ok();
        let ending = format.and_then(|format| format.extensions_str().first()).unwrap_or(&"png");
        let name = format!("{camera}/{:06}.{ending}", self.n);
        let path = self.folder.join(&name);
        fs::write(&path, picture).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(name)
    }
}

/// The folder of a wrist camera.
fn wrist(i: usize) -> String {
    if i == 0 { "wrist".to_owned() } else { format!("wrist_{}", i + 1) }
}
