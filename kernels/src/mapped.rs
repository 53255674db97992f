//! Files, and parts of files, as byte slices.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::{Deref, Range};
use std::os::unix::fs::FileExt;
use std::path::Path;

use memmap2::{Advice, Mmap, MmapMut, MmapOptions, UncheckedAdvice};

use crate::bus_error::Registered;
use crate::{Error, Result};

/// Read-only memory: a map of a file where possible, else its own. Dropping it gives its pages back.
#[derive(Debug)]
pub struct Mapped {
    /// If it is a file's, where the system finds again what was forgotten. Dropped before the map, whose addresses
    /// may then be another's.
    file: Option<Registered>,
    map: Mmap,
}

impl Mapped {
    /// Maps a whole file, which nobody may shorten or rewrite while it is mapped. No program can check that:
    /// a read past the new end is a bus error, see [`crate::exit_on_bus_error`]. Where the file system cannot
    /// map files, it is read.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be opened or read, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |why| Error::Read { path: path.to_owned(), why };
        // Looked at before it is opened: opening a pipe would wait for a writer.
        if !path.metadata().map_err(read)?.is_file() {
            return Err(read(std::io::Error::other("it is not a regular file")));
        }
        let file = File::open(path).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        let length =
            usize::try_from(metadata.len()).map_err(|_| read(ErrorKind::FileTooLarge.into()))?;
        // SAFETY: the map is read-only. That nobody shortens or rewrites the file meanwhile is what the
        // documentation asks of the user.
        let map = match unsafe { MmapOptions::new().len(length).map(&file) } {
            Ok(map) => map,
            Err(why) if cannot_map(&why) => return Self::read(&file, 0, length).map_err(read),
            Err(why) => return Err(read(why)),
        };
        // Advice only: where a system refuses it, reading is slower and otherwise the same.
        let _ = map.advise(Advice::WillNeed);
        let file = Some(Registered::new(&map, path));
        Ok(Self { map, file })
    }

    /// Reads `length` bytes from `offset` into memory of its own.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file has fewer, or what the system says.
    pub fn read(file: &File, offset: u64, length: usize) -> std::io::Result<Self> {
        // Before memory is taken: headers of files from strangers ask for it.
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| file.metadata().is_ok_and(|m| m.len() < end)) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Self::filled(length, |bytes| file.read_exact_at(bytes, offset))
    }

    /// Whether others can change it: it is a file's.
    pub(crate) fn is_file(&self) -> bool {
        self.file.is_some()
    }

    /// Releases the pages of a range for now, if they are a file's.
    pub(crate) fn forget(&self, range: Range<usize>) {
        if self.is_file() {
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
        Ok(Self { map: map.make_read_only()?, file: None })
    }
}

/// Whether it is the file system that maps no files, such as 9p, or FUSE with direct I/O.
fn cannot_map(why: &std::io::Error) -> bool {
    why.kind() == ErrorKind::Unsupported || why.raw_os_error() == Some(libc::ENODEV)
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// sysfs maps no files.
    #[test]
    #[cfg(target_os = "linux")]
    fn files_that_cannot_be_mapped_are_read() {
        let path = Path::new("/sys/devices/system/cpu/online");
        let Ok(text) = std::fs::read(path) else {
            eprintln!("SKIPPED: there is no {}", path.display());
            return;
        };
        let file = File::open(path).unwrap();
        // SAFETY: sysfs refuses, so nothing is mapped.
        let refused = unsafe { MmapOptions::new().len(text.len()).map(&file) };
        assert!(refused.is_err_and(|why| cannot_map(&why)));
        assert_eq!(*Mapped::read(&file, 0, text.len()).unwrap(), text[..]);
        assert_eq!(*Mapped::read(&file, 1, text.len() - 1).unwrap(), text[1..]);
    }
}
