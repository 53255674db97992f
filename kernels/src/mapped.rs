//! Files, and parts of files, as byte slices.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::{Advice, Mmap, MmapMut, MmapOptions, UncheckedAdvice};

use crate::{Error, Result};

/// A read-only memory map. Dropping it gives its pages back.
#[derive(Debug)]
pub struct Mapped {
    map: Mmap,
    /// Of a file, where the system finds again what was forgotten.
    of_file: bool,
}

impl Mapped {
    /// Maps a whole file, which nobody may shorten or rewrite while it is mapped. No program can check that:
    /// a read past the new end would be a bus error.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be opened, is a folder, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |why| Error::Read { path: path.to_owned(), why };
        let file = File::open(path).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(read(std::io::Error::other("it is not a regular file")));
        }
        let length = usize::try_from(metadata.len())
            .map_err(|_| read(std::io::ErrorKind::FileTooLarge.into()))?;
        Self::range(&file, 0, length).map_err(read)
    }

    /// Maps `length` bytes from `offset`, which must lie inside the file. As for [`Mapped::open`], it must
    /// stay as it is.
    ///
    /// # Errors
    /// `UnexpectedEof` if they do not, or what the system says.
    pub fn range(file: &File, offset: u64, length: usize) -> std::io::Result<Self> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| file.metadata().is_ok_and(|m| m.len() < end)) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the range lies inside the file, checked above, and the map is read-only. That
        // nobody shortens or rewrites the file meanwhile is what the documentation asks of the user.
        let map = unsafe { MmapOptions::new().offset(offset).len(length).map(file)? };
        // Advice only: where a system refuses it, reading is slower and otherwise the same.
        let _ = map.advise(Advice::WillNeed);
        Ok(Self { map, of_file: true })
    }

    /// Gives the pages of a range back to the system for now, if they are a file's.
    pub(crate) fn forget(&self, range: Range<usize>) {
        if self.of_file {
            // SAFETY: the map is shared with a file and never written, so the same bytes are read
            // again when they are asked for.
            let _ = unsafe {
                self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
    }

    /// Memory of its own, at the start of a page as a file's would be. `fill` gets zeros.
    ///
    /// # Errors
    /// If the system has no room, as [`std::io::Error`], or what `fill` says.
    pub fn filled<E: From<std::io::Error>>(
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let mut map = MmapMut::map_anon(length)?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(Advice::HugePage); // fewer, cheaper page faults
        fill(&mut map)?;
        Ok(Self { map: map.make_read_only()?, of_file: false })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
