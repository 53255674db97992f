//! A device that fails ends the program with words and exit code 1, not with a core dump.

use std::process::Command;

use llama_cpp_sys_2 as sys;
use openvla_kernels::Backend;

const CHILD: &str = "OPENVLA_TEST_DEVICE_FAILS";

unsafe extern "C" {
    /// C++'s `std::terminate`, where an exception ends that has nowhere to go.
    #[link_name = "_ZSt9terminatev"]
    fn terminate() -> !;
}

/// Runs one of these tests again, as a child that fails, and holds that it ends with words.
fn assert_ends(test: &str, words: &str) {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    let output = command.env(CHILD, "1").args(["--exact", test, "--nocapture"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(words), "{said}");
}

#[test]
fn ggml_gives_up_with_words() {
    if std::env::var_os(CHILD).is_some() {
        let _started = Backend::cpu(1).unwrap();
        // SAFETY: C strings, and a format without arguments.
        unsafe { sys::ggml_abort(c"device.cu".as_ptr(), 7, c"out of memory".as_ptr()) };
    }
    let words = "error: the device failed: device.cu:7: out of memory";
    assert_ends("ggml_gives_up_with_words", words);
}

#[test]
fn an_exception_that_nobody_takes_ends_with_words() {
    if std::env::var_os(CHILD).is_some() {
        let _started = Backend::cpu(1).unwrap();
        // SAFETY: it ends the process.
        unsafe { terminate() };
    }
    let words = "error: the device failed: C++ gave up";
    assert_ends("an_exception_that_nobody_takes_ends_with_words", words);
}
