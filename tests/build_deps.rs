//! `kernels/build-deps` on folders as distributions have them: what it calls missing.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A root with those files, all of them empty, and a `bin` whose tools say so.
fn root(files: &[&str], tools: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for file in files {
        let path = root.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    let bin = root.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for (name, script) in tools {
        std::fs::write(bin.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(bin.join(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    for tool in ["sed", "head", "id", "cat"] {
        let found = ["/usr/bin", "/bin"].map(|folder| Path::new(folder).join(tool));
        symlink(found.iter().find(|path| path.exists()).unwrap(), bin.join(tool)).unwrap();
    }
    root
}

const TOOLS: [(&str, &str); 3] =
    [("cmake", "echo cmake version 3.25.1"), ("make", ""), ("c++", "cat >/dev/null")];
const HEADER: &str = "usr/lib/llvm-14/lib/clang/14.0.6/include/stddef.h";

fn check(root: &Path, libclang: Option<&Path>) -> Output {
    let mut command = Command::new("/bin/sh");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/build-deps")).arg("--check");
    command.env_clear().env("PATH", root.join("bin")).env("BUILD_DEPS_ROOT", root);
    command.envs(libclang.map(|path| ("LIBCLANG_PATH", path)));
    command.output().unwrap()
}

/// What apt-get would be asked for, at the end of the last line.
fn missing(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(i32::from(!said.is_empty())), "{said}");
    said.trim().rsplit("--no-install-recommends").next().unwrap().trim().to_owned()
}

#[test]
fn libclang_is_what_bindgen_accepts() {
    for (files, is_found) in [
        (&["usr/lib/llvm-14/lib/libclang.so", HEADER][..], true),
        (&["usr/lib/llvm-14/lib/libclang-14.so.1", HEADER], true),
        (
            &["usr/lib/llvm-19/lib/libclang.so.1", "usr/lib/llvm-19/lib/clang/19/include/stddef.h"],
            true,
        ),
        (&["usr/lib/x86_64-linux-gnu/libclang-14.so.13", HEADER], true),
        (&["usr/lib64/libclang.so.18.1", "usr/lib/clang/18/include/stddef.h"], true),
        (&["usr/local/lib/libclang-3.9.so", "usr/local/lib/clang/3.9/include/stddef.h"], true),
        (&[], false),
        (&["usr/lib/x86_64-linux-gnu/libclang-cpp.so.14", HEADER], false),
        (
            &[
                "usr/lib/llvm-14/lib/libclang-cpp.so",
                "usr/lib/llvm-14/lib/libclang-cpp.so.14",
                HEADER,
            ],
            false,
        ),
        (&["usr/lib/llvm-14/lib/libclang.a", HEADER], false),
        (&["usr/lib/llvm-14/lib/libclangBasic.so", HEADER], false),
        (&["usr/lib/x86_64-linux-gnu/libclang-14.so.1"], false), // and no headers
    ] {
        let root = root(files, &TOOLS);
        let wanted = if is_found { "" } else { "libclang-dev" };
        assert_eq!(missing(&check(root.path(), None)), wanted, "{files:?}");
    }
}

#[test]
fn a_link_to_nothing_is_not_a_library() {
    let root = root(&[HEADER], &TOOLS);
    symlink("libclang-14.so", root.path().join("usr/lib/llvm-14/lib/libclang.so")).unwrap();
    assert_eq!(missing(&check(root.path(), None)), "libclang-dev");
}

#[test]
fn the_variable_decides_alone() {
    let root = root(&["wheel/libclang.so", "other/readme", "usr/lib/libclang.so", HEADER], &TOOLS);
    let [wheel, other] = ["wheel", "other"].map(|folder| root.path().join(folder));
    assert_eq!(missing(&check(root.path(), Some(&wheel))), "");
    assert_eq!(missing(&check(root.path(), Some(&wheel.join("libclang.so")))), "");
    let output = check(root.path(), Some(&other));
    assert_eq!(missing(&output), "libclang-dev");
    assert!(String::from_utf8(output.stderr).unwrap().contains(other.to_str().unwrap()));
}

#[test]
fn tools_that_are_there_but_do_not_do_are_missing() {
    let library = ["usr/lib/llvm-14/lib/libclang.so", HEADER];
    let with = |changed: (&'static str, &'static str)| {
        let tools = TOOLS.map(|tool| if tool.0 == changed.0 { changed } else { tool });
        missing(&check(root(&library, &tools).path(), None))
    };
    assert_eq!(with(("cmake", "echo cmake version 3.13.4")), "cmake");
    assert_eq!(with(("cmake", "exit 1")), "cmake");
    assert_eq!(with(("cmake", "echo cmake version 4.0.0")), "");
    assert_eq!(with(("c++", "echo 'c++: error: cc1plus' >&2; exit 1")), "g++");
    let nothing = root(&[], &[]);
    assert_eq!(missing(&check(nothing.path(), None)), "cmake make g++ libclang-dev");
}
