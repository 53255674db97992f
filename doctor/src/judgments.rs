//! What a model said to the moments of an episode, kept in a file, so that a long examination goes on where it was
//! interrupted. JSON lines: first what is examined, then a moment in each.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use openvla::checksum;
use serde::{Deserialize, Serialize};

use crate::judge::Judged;

/// A moment under every hypothesis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Its index in the episode.
    pub index: usize,
    /// What tells its pictures and state from others: see [`crate::episode::Seen::hash`].
    pub seen: String,
    /// The input as it is.
    pub given: Judged,
    /// By hypothesis, in nats; none where the action is beyond the episode's ends.
    pub log_likelihoods: Vec<Option<f64>>,
}

/// Moments that were judged, in a file if there is one.
#[derive(Debug, Default)]
pub struct Judgments {
    file: Option<(PathBuf, File)>,
    moments: Vec<Moment>,
}

/// The first line of a file.
#[derive(PartialEq, Serialize, Deserialize)]
struct Examined {
    /// A hash of the model, the episode's actions, what was asked for, and the hypotheses.
    examination: String,
}

impl Judgments {
    /// Opens a file, or makes it. `examined` says in any form what is examined: whatever the judgments depend on but
    /// the pictures. A line that was cut off by the interruption is dropped.
    ///
    /// # Errors
    /// If the file cannot be read or written, or is of something else.
    pub fn open(path: &Path, examined: &str) -> Result<Self> {
        let cannot = || format!("cannot use {}", path.display());
        let mut file =
            File::options().read(true).append(true).create(true).open(path).with_context(cannot)?;
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(cannot)?;
        let this = Examined { examination: format!("{:016x}", checksum(examined.as_bytes())) };
        let mut judgments = Self { file: Some((path.to_owned(), file)), moments: Vec::new() };
        if text.is_empty() {
            judgments.append(&this)?;
            return Ok(judgments);
        }
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text[..whole].lines();
        let first = lines.next().map(serde_json::from_str::<Examined>);
        ensure!(
            first.is_some_and(|first| first.is_ok_and(|other| other == this)),
            "{} is not of this examination, but of another model, episode, instruction or version; name another file, or \
             delete it",
            path.display()
        );
        judgments.moments =
            lines.map(serde_json::from_str).collect::<Result<_, _>>().with_context(cannot)?;
        if let Some((_, file)) = &judgments.file {
            file.set_len(whole as u64).with_context(cannot)?;
        }
        Ok(judgments)
    }

    /// What was said to a moment before, if anything, and its pictures are the same: `seen` is their hash.
    pub fn of(&self, index: usize, seen: &str) -> Option<&Moment> {
        self.moments.iter().find(|moment| moment.index == index && moment.seen == seen)
    }

    /// Keeps a moment.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&mut self, moment: Moment) -> Result<()> {
        self.append(&moment)?;
        self.moments.push(moment);
        Ok(())
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let line = serde_json::to_string(line)? + "\n";
        file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
    }
}
