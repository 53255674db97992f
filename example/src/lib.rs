//! Writes an example OpenVLA checkpoint: the files, names and quirks of the published one, with
//! random weights and small, so that everything can be tried and tested without a download; or as
//! large as that one, so that everything can be measured.
//!
//! | file | what it decides |
//! |---|---|
//! | `size.rs` | the sizes |
//! | `model.rs` | the list of tensors |
//! | `weights.rs` | their values, and the safetensors files |
//! | `vocabulary.rs` | the pieces, learnt from instructions composed here |
//! | `tokenizer.rs` | `tokenizer.model`, `tokenizer.json` and the files beside them |
//! | `config.rs` | `config.json`, `generation_config.json`, `preprocessor_config.json` |
//! | `statistics.rs` | `dataset_statistics.json` |
//! | `table.rs` | the picture |
//!
//! Nothing here depends on the machine: no clock, no hash order, and in floating point only the
//! operations IEEE 754 defines to the last bit. The same [`Spec`] gives the same bytes everywhere.

mod config;
mod model;
#[cfg(test)]
mod published;
mod size;
mod statistics;
mod table;
mod tokenizer;
mod vocabulary;
mod weights;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use indicatif::ProgressBar;
use serde::Serialize;

pub use model::{Run, Tensor};
pub use size::Size;
pub use table::{table_image, table_png};
pub use weights::deviates;

/// Which checkpoint to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// Like `openvla-7b`: DINOv2 and SigLIP fused, image squeezed to a square, both tokenizer
    /// files.
    #[value(name = "openvla")]
    OpenVla,
    /// Like `openvla-v01-7b`: SigLIP alone, image letterboxed, the Vicuna prompt, a projector of
    /// two layers, `tokenizer.model` alone, and three data sets of 7, 6 and 14 dimensions.
    V01,
}

/// All that a checkpoint depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// Which checkpoint.
    pub variant: Variant,
    /// How large.
    pub size: Size,
    /// Chooses the weights.
    pub seed: u64,
    /// How many safetensors files. One is `model.safetensors`; more are numbered, have an index,
    /// and every decoder layer is spread over them. At full size there are three, as published.
    pub shards: usize,
}

impl Spec {
    /// What the checkpoint's folder is called. At full size as the published repository.
    pub fn folder(&self) -> &'static str {
        match (self.size, self.variant) {
            (Size::Full, Variant::OpenVla) => "openvla-7b",
            (Size::Full, Variant::V01) => "openvla-v01-7b",
            _ => "openvla-example",
        }
    }

    /// Every tensor of the checkpoint, in the order of the module tree.
    pub fn tensors(&self) -> Vec<Tensor> {
        model::tensors(self.variant, &self.size.sizes())
    }
}

/// The checkpoint that `openvla-example/` holds. Of the first hundred seeds, the one that says most
/// clearly what it chooses (each token leads by 0.058 or more, for the tasks of `expected.json`)
/// among those that choose action tokens alone, and five different ones for the first task.
pub const COMMITTED: Spec =
    Spec { variant: Variant::OpenVla, size: Size::Tiny, seed: 33, shards: 1 };

/// Writes the checkpoint into `dir`, which is made if need be.
///
/// Files of the same name are replaced, others left alone.
///
/// # Errors
/// If the tensors cannot be split as asked, the disk is too small, or a file cannot be written.
pub fn write(dir: &Path, spec: &Spec) -> Result<()> {
    write_watched(dir, spec, &ProgressBar::hidden())
}

/// The same; `progress` counts the bytes of the weights, and learns how many there will be.
///
/// # Errors
/// As [`write()`].
pub fn write_watched(dir: &Path, spec: &Spec, progress: &ProgressBar) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
    weights::write(dir, spec, progress)?;
    write_settings(dir, spec)
}

/// Writes everything but the weights into a folder that is there: a few megabytes at any size.
///
/// # Errors
/// If a file cannot be written.
pub fn write_settings(dir: &Path, spec: &Spec) -> Result<()> {
    let &Spec { variant, size, .. } = spec;
    let sizes = size.sizes();
    tokenizer::write(dir, variant, &vocabulary::pieces(&sizes))?;
    config::write(dir, variant, &sizes)?;
    statistics::write(dir, variant)
}

/// Writes the tokenizer's files alone, learnt from other sentences, into a folder that exists.
///
/// There are `n_piece` pieces: those that are merged before the one with id `space`, single
/// characters from there on, and the 256 actions.
///
/// # Errors
/// If a file cannot be written.
///
/// # Panics
/// If the single characters do not fit between `space` and the actions.
pub fn write_tokenizer(dir: &Path, corpus: &[String], space: usize, n_piece: usize) -> Result<()> {
    let pieces = vocabulary::learnt_from(corpus, space, n_piece);
    tokenizer::write(dir, Variant::OpenVla, &pieces)
}

/// Writes one file of the checkpoint.
fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes `value` as Hugging Face writes JSON: indented by two, with a newline at the end.
///
/// Objects made by `json!` have their keys in sorted order in the source, because whether
/// `serde_json` sorts them or keeps their order is up to the crates it is built with.
fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    write_file(dir, name, format!("{text}\n").as_bytes())
}
