//! Files of a checkpoint, and JSON as Hugging Face writes it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// Writes a file named `name` into `dir`.
///
/// # Errors
/// Names the file if it cannot be written.
pub fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes `value` as Hugging Face writes JSON: indented by two, with a newline at the end.
///
/// Objects made by `json!` need sorted keys in the source: whether `serde_json` sorts them or keeps
/// their order depends on the crates it is built with.
///
/// # Errors
/// Names the file if it cannot be written.
pub fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    write_file(dir, name, format!("{text}\n").as_bytes())
}
