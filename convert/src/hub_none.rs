//! Replaces `hub` in builds without that feature: accepts folders only.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// What a repository should hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole model.
    Checkpoint,
    /// An OpenVLA-OFT run with its adapter.
    Run,
    /// A LoRA adapter.
    Adapter,
}

/// The folder that `source` names.
///
/// # Errors
/// If it does not exist; this build downloads nothing.
pub fn locate(source: &Path, _: Content) -> Result<PathBuf> {
    ensure!(
        source.exists(),
        "{} is not a folder, and this build has no feature `hub` to look for it on the Hugging Face Hub",
        source.display()
    );
    Ok(source.to_owned())
}
