//! A file that is written beside its place and moved there when it is whole.

use std::io::{BufWriter, Seek, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use openvla_kernels::ALIGNMENT;
use tempfile::NamedTempFile;

/// Dropped, it leaves no trace.
pub struct Beside<'a> {
    out: &'a Path,
    file: BufWriter<NamedTempFile>,
}

impl<'a> Beside<'a> {
    /// Starts a file of about `bytes` that will be at `out`.
    ///
    /// # Errors
    /// If nothing can be written there, or the disk has less room.
    pub fn create(out: &'a Path, bytes: u64) -> Result<Self> {
        let folder = match out.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        ensure!(!out.is_dir(), "{} is a folder; name a file with -o", out.display());
        // Such as /dev/null, which would be replaced.
        let replaceable = std::fs::metadata(out).map_or(true, |there| there.is_file());
        ensure!(replaceable, "{} is no regular file; name another with -o", out.display());
        let file = tempfile::Builder::new()
            .prefix(".openvla-")
            .suffix(".gguf.part")
            .permissions(permissions())
            .tempfile_in(folder)
            .with_context(|| format!("cannot write into {}", folder.display()))?;
        let disk = rustix::fs::fstatvfs(file.as_file()).with_context(|| cannot_write(out))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        ensure!(
            bytes <= free,
            "{} needs {bytes} bytes, and its disk has {free} left; free some, or name a file on \
             another disk with -o",
            out.display()
        );
        Ok(Self { out, file: BufWriter::new(file) })
    }

    /// Adds bytes, and zeros up to [`ALIGNMENT`].
    ///
    /// # Errors
    /// What the system says.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let padding = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
        for bytes in [bytes, &[0; ALIGNMENT][..padding]] {
            self.file.write_all(bytes).with_context(|| cannot_write(self.out))?;
        }
        Ok(())
    }

    /// Overwrites the start of the file; nothing can be added after that.
    ///
    /// # Errors
    /// What the system says.
    pub fn replace_start(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.rewind().with_context(|| cannot_write(self.out))?;
        self.append(bytes)
    }

    /// Moves the file to its place, whole and on the disk.
    ///
    /// # Errors
    /// What the system says. What was in its place is then there still.
    pub fn finish(self) -> Result<()> {
        let failed = || cannot_write(self.out);
        let file = self.file.into_inner().map_err(|e| e.into_error()).with_context(failed)?;
        file.as_file().sync_all().with_context(failed)?;
        file.persist(self.out).map_err(|e| e.error).with_context(failed)?;
        Ok(())
    }
}

fn cannot_write(out: &Path) -> String {
    format!("cannot write {}", out.display())
}

/// A model is no secret: as any new file, not as a temporary one.
fn permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o644)
}
