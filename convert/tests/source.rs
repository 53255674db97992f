//! The files that a model file was made of: named in it by their SHA-256, and held against files at hand.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;

use common::{assert_fails, example, openvla_convert, stderr, stdout};
use openvla_example::{COMMITTED, Spec, Variant};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A folder with the example's checkpoint in `folder`, converted without reference cases to `model.gguf`.
fn converted(folder: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(&example("openvla-example"), &dir.path().join(folder));
    convert(dir.path(), &[folder]);
    dir
}

fn convert(dir: &Path, args: &[&str]) {
    let usual = ["--q8", "--no-proof", "-o", "model.gguf"];
    let output = openvla_convert(&[&usual, args].concat(), dir);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn verify(dir: &Path, args: &[&str]) -> Output {
    openvla_convert(&[&["verify", "model.gguf", "-t", "2"], args].concat(), dir)
}

fn sha256(path: &Path) -> String {
    Sha256::digest(fs::read(path).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What `inspect --json` says of the files, in its order.
fn listed(dir: &Path) -> Vec<(String, String)> {
    let said = stdout(&openvla_convert(&["inspect", "--json", "model.gguf"], dir));
    let said: Value = serde_json::from_str(&said).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let files = said["source_files"].as_array().unwrap().iter();
    files.map(|file| (text(&file["name"]), text(&file["sha256"]))).collect()
}

/// Not those that are beside them, nor the index of a checkpoint of one shard.
#[test]
fn every_file_that_was_read_is_in_the_model_by_its_hash() {
    let dir = converted("ckpt");
    let files = fs::read_dir(dir.path().join("ckpt")).unwrap().map(|file| file.unwrap());
    let mut wanted: BTreeMap<_, _> =
        files.map(|file| (file.file_name().into_string().unwrap(), sha256(&file.path()))).collect();
    for unread in ["generation_config.json", "added_tokens.json"] {
        wanted.remove(unread).unwrap();
    }
    assert_eq!(listed(dir.path()), wanted.into_iter().collect::<Vec<_>>());
    let said = stdout(&openvla_convert(&["inspect", "model.gguf"], dir.path()));
    assert!(said.contains("  made of     8 files, whose SHA-256 it has (--json)\n"), "{said}");
}

#[test]
fn files_that_came_from_elsewhere_are_named_by_their_options() {
    let dir = tempfile::tempdir().unwrap();
    let (ckpt, lora) = (dir.path().join("ckpt"), dir.path().join("lora"));
    let spec = Spec { variant: Variant::V01, seed: 21, shards: 2, ..COMMITTED };
    openvla_example::write(&ckpt, &spec).unwrap();
    copy(&example("../tests/reference/lora/adapter"), &lora);
    fs::rename(ckpt.join("dataset_statistics.json"), dir.path().join("mine.json")).unwrap();
    convert(dir.path(), &["ckpt", "--lora", "lora", "--statistics", "mine.json"]);
    let files: BTreeMap<_, _> = listed(dir.path()).into_iter().collect();
    for (name, path) in [
        ("config.json", "ckpt/config.json"),
        ("model-00001-of-00002.safetensors", "ckpt/model-00001-of-00002.safetensors"),
        ("model-00002-of-00002.safetensors", "ckpt/model-00002-of-00002.safetensors"),
        ("model.safetensors.index.json", "ckpt/model.safetensors.index.json"),
        ("lora/adapter_config.json", "lora/adapter_config.json"),
        ("lora/adapter_model.safetensors", "lora/adapter_model.safetensors"),
        ("statistics/mine.json", "mine.json"),
    ] {
        assert_eq!(files[name], sha256(&dir.path().join(path)), "{name}");
    }
    assert_fails(&verify(dir.path(), &["--source", "ckpt"]), &["say with --lora where it is"]);
    let elsewhere = ["--lora", "lora", "--statistics", "mine.json"];
    let output = verify(dir.path(), &[&["--source", "ckpt"], &elsewhere[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("same    lora/adapter_config.json\n"), "{}", stdout(&output));
    let usage = verify(dir.path(), &elsewhere);
    assert_eq!(usage.status.code(), Some(2), "without --source there is nothing to look at");
}

/// Neither where the files are nor how many threads read them is in a model file.
#[test]
fn the_same_files_elsewhere_are_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one/openvla-7b", "two/else/openvla-7b"].map(|folder| {
        copy(&example("openvla-example"), &dir.path().join(folder));
        let threads = folder.len().to_string();
        convert(dir.path(), &[folder, "-t", &threads]);
        fs::read(dir.path().join("model.gguf")).unwrap()
    });
    assert!(one == two);
}

#[test]
fn files_that_are_not_the_source_are_named() {
    let dir = converted("ckpt");
    let check = |args: &[&str]| verify(dir.path(), &[&["--source", "ckpt"], args].concat());
    let output = check(&[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stdout(&output);
    assert_eq!(said.matches("same    ").count(), 8, "{said}");
    assert!(said.contains("61 of 61 tensors are as written"), "{said}");

    let at = |name: &str| dir.path().join("ckpt").join(name);
    let config = fs::read_to_string(at("config.json")).unwrap();
    fs::write(at("config.json"), config + " ").unwrap();
    fs::remove_file(at("tokenizer.model")).unwrap();
    fs::write(at("generation_config.json"), "unread").unwrap();
    let output = check(&[]);
    assert_eq!(output.status.code(), Some(1));
    let said = stdout(&output);
    for line in ["differs config.json\n", "missing tokenizer.model\n", "same    tokenizer.json\n"] {
        assert!(said.contains(line), "{line:?} is missing in:\n{said}");
    }
    let words = "model.gguf was not made of these files: config.json, tokenizer.model differ";
    assert!(stderr(&output).contains(words), "{}", stderr(&output));
    let json: Value = serde_json::from_str(&stdout(&check(&["--json"]))).unwrap();
    let found = json["source_files"].as_array().unwrap();
    let of = |name: &str| &found.iter().find(|file| file["name"] == name).unwrap()["found"];
    assert_eq!([of("config.json"), of("tokenizer.model")], ["differs", "missing"]);
    assert_fails(&verify(dir.path(), &["--source", "nowhere"]), &["nowhere", "folder"]);
}

/// In the cache that the Hub's programs share.
#[test]
#[cfg(feature = "hub")]
fn a_repository_is_held_against_a_model_as_a_folder_is() {
    let dir = converted("ckpt");
    let repository = dir.path().join("hub/models--robots--arm");
    copy(&dir.path().join("ckpt"), &repository.join("snapshots/0123abc"));
    fs::create_dir(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), "0123abc").unwrap();
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_openvla-convert"));
        command.args(args).current_dir(dir.path());
        command.env("HF_HUB_CACHE", "hub").env("HF_HUB_OFFLINE", "1").output().unwrap()
    };
    let output = run(&["verify", "model.gguf", "-t", "1", "--source", "robots/arm"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("same    model.safetensors\n"), "{}", stdout(&output));
    let of_folder = listed(dir.path());
    let output = run(&["robots/arm", "--q8", "--no-proof", "-o", "model.gguf"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(listed(dir.path()), of_folder);
}

/// Replaces bytes in the model's header by as many others.
fn replace(dir: &Path, old: &str, new: &str) {
    let path = dir.join("model.gguf");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
    bytes[at..at + old.len()].copy_from_slice(new.as_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_model_of_an_older_version_says_nothing_of_files_and_is_read() {
    let dir = converted("ckpt");
    replace(dir.path(), "openvla.source.sha256", "openvla.source.none__");
    let said = stdout(&openvla_convert(&["inspect", "model.gguf"], dir.path()));
    assert!(said.contains("  made of     files that it does not name\n"), "{said}");
    assert!(verify(dir.path(), &[]).status.success());
    let words = ["does not say which files it was made of", "convert the checkpoint again"];
    assert_fails(&verify(dir.path(), &["--source", "ckpt"]), &words);
}

/// A stranger's model could ask for the hash of any file of this machine.
#[test]
fn names_that_lead_out_of_the_folder_are_refused() {
    let dir = converted("ckpt");
    replace(dir.path(), "  config.json", "  ../etc.json");
    let words = ["`openvla.source.sha256` holds", "../etc.json", "relative name"];
    assert_fails(&verify(dir.path(), &["--source", "ckpt"]), &words);
    assert_fails(&openvla_convert(&["inspect", "model.gguf"], dir.path()), &words);
}
