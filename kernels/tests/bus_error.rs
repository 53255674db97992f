//! A mapped file that is cut off: the process says so and ends with 1, and not by a signal.

use std::path::Path;
use std::process::Command;

use openvla_kernels::{Gguf, Header, exit_on_bus_error};

/// In a process of its own: the file whose map this test reads after it was cut off.
const FILE: &str = "OPENVLA_TEST_CUT_OFF";

#[test]
fn a_file_that_is_cut_off_while_it_is_mapped_ends_the_process_with_words() {
    if let Some(path) = std::env::var_os(FILE) {
        read_past_the_end(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let pages = [Header::default().encode(), vec![0; 1 << 16]].concat();
    std::fs::write(&path, &pages).unwrap();
    let itself = std::env::current_exe().unwrap();
    let output = Command::new(itself).arg("--nocapture").env(FILE, &path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("error: {} was shortened", path.display())), "{said}");
}

fn read_past_the_end(path: &Path) {
    exit_on_bus_error();
    let other = Gguf::open(path).unwrap();
    let file = Gguf::open(path).unwrap();
    drop(other); // the handler must still know the other map
    std::fs::File::options().write(true).open(path).unwrap().set_len(0).unwrap();
    let sum: u32 = file.bytes().iter().map(|byte| u32::from(*byte)).sum();
    std::process::exit(40 + i32::try_from(sum.min(1)).unwrap());
}
