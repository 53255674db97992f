//! What the tests of the program share: the example, and the program as a process.

#![allow(dead_code, unused_imports)] // each test binary uses its own part

#[path = "../../../tests/common/process.rs"]
mod process;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub use process::{assert_fails, stderr, stdout};

/// A file of the example's folder.
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("example").join(name)
}

/// The example checkpoint, as an argument.
pub fn checkpoint() -> String {
    example("openvla-example").display().to_string()
}

pub fn openvla_convert(args: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_openvla-convert"))
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap()
}
