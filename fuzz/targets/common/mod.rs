//! Files for what reads files: a folder in memory, for as long as the process runs.

use std::path::{Path, PathBuf};

/// A folder of this process, with copies of some files.
pub fn folder(copies: &[&Path]) -> PathBuf {
    let folder = Path::new("/dev/shm").join(format!("openvla-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder in memory");
    for from in copies {
        std::fs::copy(from, folder.join(from.file_name().expect("a file"))).expect("a copy");
    }
    folder
}

/// The repository's examples.
#[allow(dead_code, reason = "not every target needs one")]
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../example").join(name)
}
