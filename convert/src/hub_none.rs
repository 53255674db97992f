//! In place of `hub` in builds without that feature: folders alone.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Which files of a repository are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A checkpoint's.
    Checkpoint,
    /// An adapter's.
    Adapter,
}

/// The folder that `source` names.
///
/// # Errors
/// Says that it is not a folder, and that this build downloads nothing.
pub fn locate(source: &Path, _: Content) -> Result<PathBuf> {
    ensure!(
        source.exists(),
        "{} is not a folder, and this build has no feature `hub` to look for it on the Hugging Face Hub",
        source.display()
    );
    Ok(source.to_owned())
}
