//! A data set in a folder: pictures, steps, statistics, and the tokenizer that goes with them.
//!
//! | file | what it holds |
//! |---|---|
//! | `images/00012_03.png` | what the front camera saw in step 3 of episode 12 |
//! | `images/00012_03_wrist.png` | what the wrist camera saw, for an OpenVLA-OFT |
//! | `steps.jsonl` | a line for each: episode, step, image, instruction, action; wrist image and state |
//! | `dataset_statistics.json` | OpenVLA's statistics of the actions, and of the arm's states |
//! | `tokenizer.model`, `tokenizer.json`, … | pieces for all that can be asked, and 256 actions |

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use openvla::image::RgbImage;
use openvla_vocabulary::{learn, write_fast_tokenizer};
use serde_json::{Value, json};

use crate::render::{picture, wrist_picture};
use crate::scene::instructions;
use crate::steps::{Learner, Step, Steps};
use crate::world::{Action, ArmState, World};

/// What the data set is called in the statistics.
pub const NAME: &str = "tabletop";
/// Id of the space, and number of pieces, in the tokenizer: room for every word in one piece.
const SPACE: usize = 448;
const N_PIECE: usize = 800;

/// Which episodes, and what is written of them.
#[derive(Debug, Clone, Copy)]
pub struct DataSet {
    /// Chooses them.
    pub seed: u64,
    /// How many.
    pub episodes: usize,
    /// Pixels of the pictures' sides; without, there are none.
    pub size: Option<u32>,
    /// Who is to learn from it.
    pub learner: Learner,
}

/// Writes a data set into a folder, which is made if need be and must be empty.
///
/// # Errors
/// If the folder is not empty, or a file cannot be written.
pub fn record(dir: &Path, data: &DataSet, progress: &ProgressBar) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut entries =
        fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    anyhow::ensure!(entries.next().is_none(), "{} is not empty; name a new folder", dir.display());
    // Beside its place, then there: a data set is whole or not at all.
    let place = dir.canonicalize()?;
    let whole = tempfile::Builder::new()
        .permissions(place.metadata()?.permissions())
        .tempdir_in(place.parent().context("the root is not a place for a data set")?)
        .with_context(|| format!("cannot make a folder beside {}", dir.display()))?;
    let dir = whole.path();
    if data.size.is_some() {
        fs::create_dir(dir.join("images"))?;
    }
    let mut lines = BufWriter::new(fs::File::create(dir.join("steps.jsonl"))?);
    let (mut steps, mut actions, mut states) = (Steps::new(data.seed, 1), Vec::new(), Vec::new());
    while let Some((line, action, state)) = steps
        .next(|step| {
            (step.episode < data.episodes).then(|| -> Result<_> {
                progress.set_position(step.episode as u64);
                let line = write_step(dir, step, data)?;
                Ok((line, step.action, step.world.gripper.state()))
            })
        })
        .transpose()?
    {
        writeln!(lines, "{line}")?;
        actions.push(action);
        states.push(state);
    }
    lines.into_inner().map_err(|e| e.into_error())?.sync_all()?;
    let states = (data.learner == Learner::Oft).then_some(&states[..]);
    let text = serde_json::to_string_pretty(&statistics(&actions, states, data.episodes))?;
    fs::write(dir.join("dataset_statistics.json"), text + "\n")?;
    write_tokenizer(dir)?;
    fs::rename(dir, &place).with_context(|| format!("cannot replace {}", place.display()))
}

/// Writes a step's pictures, if there are any; returns its line.
fn write_step(dir: &Path, step: &Step, data: &DataSet) -> Result<Value> {
    let save = |camera: &str, draw: fn(&World, u32) -> RgbImage| -> Result<Option<String>> {
        let Some(size) = data.size else { return Ok(None) };
        let name = format!("images/{:05}_{:02}{camera}.png", step.episode, step.n);
        draw(step.world, size).save(dir.join(&name))?;
        Ok(Some(name))
    };
    let mut line = json!({
        "episode": step.episode,
        "step": step.n,
        "image": save("", picture)?,
        "instruction": step.world.scene.instruction,
        "action": step.action,
    });
    if data.learner == Learner::Oft {
        line["wrist_image"] = save("_wrist", wrist_picture)?.into();
        line["state"] = json!(step.world.gripper.state());
    }
    Ok(line)
}

fn write_tokenizer(dir: &Path) -> Result<()> {
    let prompt = |task: String| openvla::prompt::OPENVLA.replace("{instruction}", &task);
    let corpus: Vec<String> = instructions().into_iter().map(prompt).collect();
    let pieces = learn(&corpus, SPACE, N_PIECE);
    openvla_vocabulary::write_tokenizer(dir, &pieces)?;
    write_fast_tokenizer(dir, &pieces)
}

/// `dataset_statistics.json`. The gripper is not scaled; nor is how the arm is turned, as it never is
/// in the data: the least turn would be out of all bounds.
pub fn statistics(actions: &[Action], states: Option<&[ArmState]>, episodes: usize) -> Value {
    let zeros = [0.0; 7];
    let proprio = match states {
        Some(states) => {
            let mut proprio = summary(states);
            proprio["mask"] = json!([true, true, true, false, false, false, true, true]);
            proprio
        }
        // The data that OpenVLA was trained on have it, and say nothing.
        None => json!({
            "max": zeros, "mean": zeros, "min": zeros, "q01": zeros, "q99": zeros, "std": zeros,
        }),
    };
    let mut action = summary(actions);
    action["mask"] = json!([true, true, true, true, true, true, false]);
    json!({ NAME: {
        "action": action,
        "num_trajectories": episodes,
        "num_transitions": actions.len(),
        "proprio": proprio,
    }})
}

/// Bounds, mean and deviation of each number.
fn summary<const N: usize>(rows: &[[f64; N]]) -> Value {
    let axes: Vec<Vec<f64>> = (0..N)
        .map(|axis| {
            let mut values: Vec<f64> = rows.iter().map(|row| row[axis]).collect();
            values.sort_by(f64::total_cmp);
            values
        })
        .collect();
    let each = |f: &dyn Fn(&[f64]) -> f64| axes.iter().map(|axis| f(axis)).collect::<Vec<_>>();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let deviation = |values: &[f64]| {
        let center = mean(values);
        mean(&values.iter().map(|x| (x - center) * (x - center)).collect::<Vec<_>>()).sqrt()
    };
    json!({
        "max": each(&|values| quantile(values, 1.0)),
        "mean": each(&mean),
        "min": each(&|values| quantile(values, 0.0)),
        "q01": each(&|values| quantile(values, 0.01)),
        "q99": each(&|values| quantile(values, 0.99)),
        "std": each(&deviation),
    })
}

/// A quantile of sorted values, between two of them in proportion: numpy's default.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let (low, t) = (at.floor() as usize, at.fract());
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] + t * (sorted[high] - sorted[low])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `np.quantile` gives.
    #[test]
    fn quantiles_are_numpys() {
        let values = [-3.0, -1.0, 0.5, 2.0, 7.0];
        let wanted = [(0.0, -3.0), (0.01, -2.92), (0.3, -0.7), (0.5, 0.5), (0.99, 6.8), (1.0, 7.0)];
        for (q, wanted) in wanted {
            let found = quantile(&values, q);
            assert!((found - wanted).abs() < 1e-12, "{q}: {found}");
        }
        assert_eq!(quantile(&[4.0], 0.99), 4.0);
    }
}
