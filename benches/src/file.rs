//! A file that is whole or not there.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Writes a file beside its place and moves it there.
///
/// # Errors
/// What the system says.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let permissions = std::fs::Permissions::from_mode(0o644);
    let mut file = tempfile::Builder::new()
        .permissions(permissions)
        .tempfile_in(folder)
        .with_context(cannot)?;
    file.write_all(bytes.as_ref()).with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    Ok(())
}
