//! `openvla-convert` as a user meets it: what it prints, where, and how it ends.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../example")
}

fn checkpoint() -> String {
    example().canonicalize().unwrap().join("openvla-example").display().to_string()
}

fn openvla_convert(args: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_openvla-convert"))
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A mistake of the user's: exit code 1, nothing on stdout, and words that help.
fn assert_fails(output: &Output, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(stdout(output), "", "errors go to stderr");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in:\n{said}");
    }
    assert!(said.contains("error: ") && !said.contains("panicked"), "{said}");
}

#[test]
fn converting_names_the_file_and_keeps_stdout_clean() {
    let dir = tempfile::tempdir().unwrap();
    let output = openvla_convert(&["--q4", &checkpoint()], dir.path());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    assert!(stderr(&output).contains("43 left out as unused"), "{}", stderr(&output));
    assert!(!stderr(&output).contains('\r'), "no progress bar where nobody watches");
    let name = "OpenVLA-424K-example-v1.0-IQ4_NL.gguf";
    let files: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(files, [name], "the file by its name, and nothing beside it");
}

#[test]
fn a_dry_run_says_what_the_file_would_hold_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = openvla_convert(&["--q4", "--dry-run", &checkpoint()], dir.path());
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stdout(&output);
    let bytes = |line: &str| line.split_whitespace().nth(4)?.parse::<u64>().ok();
    let total: u64 = said.lines().filter(|l| l.ends_with(" bytes")).filter_map(bytes).sum();
    assert!(said.contains("Llama      IQ4_NL     14 tensors"), "{said}");
    assert!(said.contains("vision_backbone.featurizer.blocks.1.norm1.weight"), "{said}");
    let built_in = std::fs::metadata(example().join("example.gguf")).unwrap().len();
    assert!(total < built_in && total > built_in * 9 / 10, "{total} of {built_in}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn mistakes_with_converting_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = &checkpoint();
    let run = |args: &[&str]| openvla_convert(args, dir.path());
    assert_fails(&run(&["nowhere"]), &["nowhere", "folder"]);
    let output = run(&[checkpoint, "--outtype", "Q3"]);
    assert_eq!(output.status.code(), Some(2), "a wrong flag is a matter of usage");
    assert!(stderr(&output).contains("IQ4_NL"), "lists the types: {}", stderr(&output));
    assert_eq!(run(&[checkpoint, "--q4", "--q8"]).status.code(), Some(2));
    assert_fails(&run(&[checkpoint, "-o", "missing/out.gguf"]), &["missing", "No such file"]);
    assert_fails(&run(&[checkpoint, "-o", "."]), &["folder", "-o"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}
