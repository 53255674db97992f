//! Writes an example OpenVLA checkpoint: the files, names and quirks of the published one, with
//! random weights and small, so that everything can be tried and tested without a download; or as
//! large as that one, so that everything can be measured. What is in it, and all of it but the weights,
//! is from [`openvla_convert::random`].
//!
//! | file | what it does |
//! |---|---|
//! | `weights.rs` | draws the weights, and writes the safetensors files |
//! | `table.rs` | draws the image |
//!
//! Nothing here depends on the machine: no clock, no hash order, and in floating point only the
//! operations that IEEE 754 defines to the last bit. The same [`Spec`] makes the same bytes everywhere.

mod table;
mod weights;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::ProgressBar;

pub use openvla_convert::random::{Size, Spec, Variant, write_settings};
pub use table::{table_image, table_png};

/// The checkpoint in `openvla-example/`.
pub const COMMITTED: Spec = Spec::EXAMPLE;

/// Writes the checkpoint into `dir`, which is created if it does not exist.
///
/// Files of the same name are replaced, others left alone.
///
/// # Errors
/// If the tensors cannot be split as asked, the disk is too small, or a file cannot be written.
pub fn write(dir: &Path, spec: &Spec) -> Result<()> {
    write_with_progress(dir, spec, &ProgressBar::hidden())
}

/// The same; `progress` counts the bytes of the weights, and its length is set to their number.
///
/// # Errors
/// As [`write()`].
pub fn write_with_progress(dir: &Path, spec: &Spec, progress: &ProgressBar) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
    weights::write(dir, spec, progress)?;
    write_settings(dir, spec)
}
