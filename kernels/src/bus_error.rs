//! A mapped file that was shortened, or whose disk is gone, as a message in place of a signal's.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Addresses of the files that are mapped, and their names.
static MAPS: Mutex<Vec<(usize, usize, PathBuf)>> = Mutex::new(Vec::new());

/// A map that is known to the handler while this lives.
#[derive(Debug)]
pub(crate) struct Registered(usize);

impl Registered {
    /// `map` must not move.
    pub fn new(map: &[u8], path: &Path) -> Self {
        let start = map.as_ptr().addr();
        let mut maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
        maps.push((start, start + map.len(), path.to_owned()));
        Self(start)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
        maps.retain(|(start, ..)| *start != self.0);
    }
}

/// From now on, a read that finds no file behind a [`crate::Mapped`] any more ends the process with a
/// message and exit code 1. Without this, the system ends it with SIGBUS and no word. For programs:
/// a library leaves signals alone.
pub fn exit_on_bus_error() {
    // SAFETY: the structure is plain data, valid when zeroed, with an empty mask; the handler has the
    // signature that SA_SIGINFO asks for. If the system refuses it, nothing changes.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

/// Runs in the thread that read a map, in the middle of that read, so it holds neither [`MAPS`] nor a lock
/// of the allocator or of stderr, which another thread at most holds for a moment. Any other bus error
/// happens again after the return, and SA_RESETHAND has then put the system's own way back.
extern "C" fn on_bus_error(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: SA_SIGINFO passes a valid structure, which for SIGBUS has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    let maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((.., path)) = maps.iter().find(|(start, end, _)| (*start..*end).contains(&address))
    else {
        return;
    };
    // `eprintln!` would panic where stderr cannot be written to.
    let _ = writeln!(
        std::io::stderr(),
        "error: {} was shortened while it was read, or its disk is gone; to replace a file, move another to its \
         name",
        path.display()
    );
    // SAFETY: ends the process at once: the read cannot go on.
    unsafe { libc::_exit(1) }
}
