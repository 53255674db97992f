//! Tells the program which commit it was built from, and where ggml's shared libraries are.

use std::process::Command;

mod programs;

fn main() {
    for path in ["../src", "../kernels/src", "../convert/src", "src", "../Cargo.lock"] {
        println!("cargo::rerun-if-changed={path}");
    }
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
    let commit = git(&["describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]);
    println!("cargo::rustc-env=COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    programs::main();
}

/// What git says, if there is one and this is its repository.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
