//! SHA-256 of files.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::files;

/// Bytes that are read at a time.
const BLOCK: usize = 1 << 20;

/// SHA-256 of a file's bytes, in hexadecimal. `read` hears of the bytes as they are read, and may end it.
///
/// # Errors
/// As [`files::open`], if the file cannot be read, or an error of `read`.
pub fn of_file(path: &Path, read: impl Fn(usize) -> Result<()>) -> Result<String> {
    let mut file = files::open(path)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; BLOCK];
    loop {
        let n = file.read(&mut block).with_context(|| format!("cannot read {}", path.display()))?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&block[..n]);
        read(n)?;
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
