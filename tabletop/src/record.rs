//! A data set in a folder: pictures, steps, statistics, and the tokenizer that goes with them.
//!
//! | file | what it holds |
//! |---|---|
//! | `images/00012_03.png` | what the camera saw in step 3 of episode 12 |
//! | `steps.jsonl` | a line for each: episode, step, image, instruction, action |
//! | `dataset_statistics.json` | OpenVLA's statistics of the actions |
//! | `tokenizer.model`, `tokenizer.json`, … | pieces for all that can be asked, and 256 actions |

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use openvla_vocabulary::{learn, write_fast_tokenizer};
use serde_json::{Value, json};

use crate::render::picture;
use crate::scene::instructions;
use crate::steps::Steps;
use crate::world::Action;

/// What the data set is called in the statistics.
pub const NAME: &str = "tabletop";
/// Id of the space, and number of pieces, in the tokenizer: room for every word in one piece.
const SPACE: usize = 448;
const N_PIECE: usize = 800;

/// Writes a data set into a folder, which is made if need be and must be empty. Without a `size`,
/// it has no pictures.
///
/// # Errors
/// If the folder is not empty, or a file cannot be written.
pub fn record(
    dir: &Path,
    seed: u64,
    episodes: usize,
    size: Option<u32>,
    progress: &ProgressBar,
) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut entries =
        fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    anyhow::ensure!(entries.next().is_none(), "{} is not empty; name a new folder", dir.display());
    // Beside its place, then there: a data set is whole or not at all.
    let place = dir.canonicalize()?;
    let whole = tempfile::Builder::new()
        .permissions(place.metadata()?.permissions())
        .tempdir_in(place.parent().context("the root is no place for a data set")?)
        .with_context(|| format!("cannot make a folder beside {}", dir.display()))?;
    let dir = whole.path();
    if size.is_some() {
        fs::create_dir(dir.join("images"))?;
    }
    let mut lines = BufWriter::new(fs::File::create(dir.join("steps.jsonl"))?);
    let (mut steps, mut actions) = (Steps::new(seed, 1), Vec::new());
    while let Some((line, action)) = steps
        .next(|step| {
            (step.episode < episodes).then(|| -> Result<_> {
                progress.set_position(step.episode as u64);
                let name = size
                    .map(|size| (format!("images/{:05}_{:02}.png", step.episode, step.n), size));
                if let Some((name, size)) = &name {
                    picture(step.world, *size).save(dir.join(name))?;
                }
                let line = json!({
                    "episode": step.episode,
                    "step": step.n,
                    "image": name.map(|(name, _)| name),
                    "instruction": step.world.scene.instruction,
                    "action": step.action,
                });
                Ok((line, step.action))
            })
        })
        .transpose()?
    {
        writeln!(lines, "{line}")?;
        actions.push(action);
    }
    lines.into_inner().map_err(|e| e.into_error())?.sync_all()?;
    let text = serde_json::to_string_pretty(&statistics(&actions, episodes))?;
    fs::write(dir.join("dataset_statistics.json"), text + "\n")?;
    write_tokenizer(dir)?;
    fs::rename(dir, &place).with_context(|| format!("cannot replace {}", place.display()))
}

fn write_tokenizer(dir: &Path) -> Result<()> {
    let prompt = |task: String| openvla::prompt::OPENVLA.replace("{instruction}", &task);
    let corpus: Vec<String> = instructions().into_iter().map(prompt).collect();
    let pieces = learn(&corpus, SPACE, N_PIECE);
    openvla_vocabulary::write_tokenizer(dir, &pieces)?;
    write_fast_tokenizer(dir, &pieces)
}

/// `dataset_statistics.json`. The gripper is not scaled.
pub fn statistics(actions: &[Action], episodes: usize) -> Value {
    let axes: Vec<Vec<f64>> = (0..7)
        .map(|axis| {
            let mut values: Vec<f64> = actions.iter().map(|action| action[axis]).collect();
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
    let zeros = [0.0; 7];
    json!({ NAME: {
        "action": {
            "mask": [true, true, true, true, true, true, false],
            "max": each(&|values| quantile(values, 1.0)),
            "mean": each(&mean),
            "min": each(&|values| quantile(values, 0.0)),
            "q01": each(&|values| quantile(values, 0.01)),
            "q99": each(&|values| quantile(values, 0.99)),
            "std": each(&deviation),
        },
        "num_trajectories": episodes,
        "num_transitions": actions.len(),
        "proprio": {
            "max": zeros, "mean": zeros, "min": zeros, "q01": zeros, "q99": zeros, "std": zeros,
        },
    }})
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
