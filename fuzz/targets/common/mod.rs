//! What targets share: files in memory, for as long as the process runs, and sound files that are changed a little.

#![allow(dead_code, reason = "not every target needs all of it")]

use std::path::{Path, PathBuf};

/// A folder of this process, with copies of some files.
pub fn folder(name: &str, copies: &[&Path]) -> PathBuf {
    let folder = Path::new("/dev/shm").join(format!("openvla-fuzz-{}", std::process::id()));
    let folder = folder.join(name);
    std::fs::create_dir_all(&folder).expect("a folder in memory");
    for from in copies {
        std::fs::copy(from, folder.join(from.file_name().expect("a file"))).expect("a copy");
    }
    folder
}

/// The repository's examples.
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../example").join(name)
}

/// Does something while a file holds these bytes. It is as before afterwards.
pub fn with_file(path: &Path, bytes: &[u8], work: impl FnOnce()) {
    let before = std::fs::read(path).ok();
    std::fs::write(path, bytes).expect("memory");
    work();
    match before {
        Some(before) => std::fs::write(path, before).expect("memory"),
        None => std::fs::remove_file(path).expect("memory"),
    }
}

/// A sound file with up to 16 of its bytes changed. An edit is four bytes: the place, and the new value.
pub fn edited(file: &[u8], edits: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    for edit in edits.chunks_exact(4).take(16) {
        let place = u32::from_le_bytes([edit[0], edit[1], edit[2], 0]) as usize;
        let length = file.len();
        file[place % length] = edit[3];
    }
    file
}
