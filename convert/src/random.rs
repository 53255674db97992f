//! Random checkpoints: a model of any size without a download, to try, to test and to measure with.
//!
//! | file | what it does |
//! |---|---|
//! | `size`, `spec` | the sizes; what a checkpoint depends on |
//! | `model` | the list of tensors, with the distribution of their values |
//! | `vocabulary`, `config`, `statistics` | the contents of the small files |
//! | `normal` | reproducible normal deviates |
//! | `weights` | the weights of a model file, in any type |
//!
//! The same [`Spec`] makes the same bytes on every machine. [`Conversion::random`](crate::Conversion::random)
//! writes a model file without writing a checkpoint first.

mod config;
mod model;
mod normal;
#[cfg(test)]
mod published;
mod size;
mod spec;
mod statistics;
mod vocabulary;
mod weights;

use std::path::Path;

use anyhow::Result;
use openvla_vocabulary::{write_fast_tokenizer, write_tokenizer};

pub use model::{Segment, Tensor};
pub use normal::deviates;
pub use size::Size;
pub use spec::{Spec, Variant};
pub use weights::RandomWeights;

/// Writes all files of a checkpoint but the weights into an existing folder: a few megabytes at any size.
///
/// # Errors
/// If a file cannot be written.
pub fn write_settings(dir: &Path, spec: &Spec) -> Result<()> {
    let sizes = spec.size.sizes();
    let pieces = vocabulary::pieces(&sizes);
    write_tokenizer(dir, &pieces)?;
    if spec.variant != Variant::V01 {
        write_fast_tokenizer(dir, &pieces)?;
    }
    config::write(dir, spec.variant, &sizes)?;
    statistics::write(dir, spec.variant)
}
