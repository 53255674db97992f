//! A file that appears under its name only when it is complete: written to a temporary file in the
//! same folder, then renamed.

use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use openvla::cli::place;
use openvla_kernels::ALIGNMENT;
use tempfile::NamedTempFile;

/// An output file. Dropped before [`AtomicFile::finish`], it leaves no trace.
pub struct AtomicFile<'a> {
    out: &'a Path,
    /// The same, or what it links to.
    behind_links: PathBuf,
    file: BufWriter<NamedTempFile>,
}

impl<'a> AtomicFile<'a> {
    /// Starts a file of about `bytes` bytes that will appear at `out`.
    ///
    /// # Errors
    /// If the folder is not writable, or the disk has less space.
    pub fn create(out: &'a Path, bytes: u64) -> Result<Self> {
        let (behind_links, folder) = place(out);
        ensure!(!out.is_dir(), "{} is a folder; name a file with -o", out.display());
        // A device such as /dev/null would be replaced.
        let replaceable = std::fs::metadata(out).map_or(true, |found| found.is_file());
        ensure!(replaceable, "{} is not a regular file; name another with -o", out.display());
        let file = tempfile::Builder::new()
            .prefix(".openvla-")
            .suffix(".gguf.part")
            .permissions(permissions())
            .tempfile_in(&folder)
            .with_context(|| format!("cannot write into {}", folder.display()))?;
        let disk = rustix::fs::fstatvfs(file.as_file()).with_context(|| cannot_write(out))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        ensure!(
            bytes <= free,
            "{} needs {bytes} bytes, and its disk has {free} left; free some, or name a file on \
             another disk with -o",
            out.display()
        );
        Ok(Self { out, file: BufWriter::new(file), behind_links })
    }

    /// Appends bytes, and zeros up to [`ALIGNMENT`].
    ///
    /// # Errors
    /// If the system cannot write.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let padding = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
        for bytes in [bytes, &[0; ALIGNMENT][..padding]] {
            self.file.write_all(bytes).with_context(|| cannot_write(self.out))?;
        }
        Ok(())
    }

    /// Overwrites the start of the file. Must come last: [`AtomicFile::append`] would go on from there.
    ///
    /// # Errors
    /// If the system cannot write.
    pub fn replace_start(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.rewind().with_context(|| cannot_write(self.out))?;
        self.append(bytes)
    }

    /// Flushes the file to the disk and renames it to its final name.
    ///
    /// # Errors
    /// If the system cannot. A file that had the name before is then left unchanged.
    pub fn finish(self) -> Result<()> {
        let failed = || cannot_write(self.out);
        let file = self.file.into_inner().map_err(|e| e.into_error()).with_context(failed)?;
        file.as_file().sync_all().with_context(failed)?;
        file.persist(self.behind_links).map_err(|e| e.error).with_context(failed)?;
        Ok(())
    }
}

fn cannot_write(out: &Path) -> String {
    format!("cannot write {}", out.display())
}

/// Readable by all, as any new file; a temporary file would be its owner's alone.
fn permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o644)
}
