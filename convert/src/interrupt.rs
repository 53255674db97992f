//! Ctrl-C, and other polite requests to stop, as an error like any other: what is half done is
//! then taken back where errors are.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Somebody asked the program to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Turns SIGINT, SIGTERM and SIGHUP into [`Interrupted`].
///
/// # Errors
/// If the system refuses.
pub fn listen() -> Result<()> {
    ctrlc::set_handler(|| REQUESTED.store(true, Ordering::Relaxed)).context(
        "cannot start the thread that watches signals; raise `ulimit -u` or the container's limit on \
         processes",
    )
}

/// Whether to go on.
///
/// # Errors
/// [`Interrupted`], once it was asked for.
pub fn check() -> Result<(), Interrupted> {
    if REQUESTED.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
}
