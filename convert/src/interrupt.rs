//! Ctrl-C and other requests to stop as an ordinary error, so that unfinished output is removed as after
//! any other error.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// The program was asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Turns SIGINT, SIGTERM and SIGHUP into [`Interrupted`].
///
/// # Errors
/// If the system refuses.
pub fn listen() -> Result<()> {
    ctrlc::set_handler(request).context(
        "cannot start the thread that watches signals; raise `ulimit -u` or the container's limit on \
         processes",
    )
}

/// Asks whatever converts in this program to stop, as a signal would.
pub fn request() {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// Forgets that it was asked to, once all of it has stopped.
pub fn forget() {
    REQUESTED.store(false, Ordering::Relaxed);
}

/// Checks whether the program was asked to stop.
///
/// # Errors
/// [`Interrupted`], once it was.
pub fn check() -> Result<(), Interrupted> {
    if REQUESTED.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
}
