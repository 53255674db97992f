//! A device that fails ends the program with words and exit code 1, not with a core dump.

use std::process::Command;

use llama_cpp_sys_2 as sys;
use openvla_kernels::Backend;

const CHILD: &str = "OPENVLA_TEST_DEVICE_FAILS";

#[test]
fn ggml_gives_up_with_words() {
    if std::env::var_os(CHILD).is_some() {
        let _started = Backend::cpu(1).unwrap();
        // SAFETY: C strings, and a format without arguments.
        unsafe { sys::ggml_abort(c"device.cu".as_ptr(), 7, c"out of memory".as_ptr()) };
    }
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program).env(CHILD, "1").arg("--nocapture").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: the device failed: device.cu:7: out of memory"), "{said}");
}
