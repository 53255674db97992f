//! `openvla-convert export-llama` as a user meets it. That llama.cpp loads what it writes and
//! computes the same with it is held by `benches/llama_cpp`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use openvla_kernels::{Gguf, Value};

fn example() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../example/example.gguf"))
}

fn export(args: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_openvla-convert"))
        .arg("export-llama")
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap()
}

/// A folder with the example's model as `model.gguf`, changed.
fn folder(change: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = fs::read(example()).unwrap();
    change(&mut bytes);
    fs::write(dir.path().join("model.gguf"), bytes).unwrap();
    dir
}

/// Exit code 1, nothing on stdout, words that help, and no file but the model, as it was.
fn assert_refused(dir: &Path, out: &str, words: &[&str]) {
    let before = fs::read(dir.join("model.gguf")).unwrap();
    let output = export(&["model.gguf", "-o", out], dir);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in:\n{said}");
    }
    assert!(said.starts_with("error: ") || said.contains("\nerror: "), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1, "something was left behind");
    assert!(fs::read(dir.join("model.gguf")).unwrap() == before, "the model has changed");
}

#[test]
fn the_file_has_the_llamas_tensors_byte_for_byte_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let output = export(&[&example().display().to_string(), "-o", "llama.gguf"], dir.path());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "{said}");
    assert!(said.contains("21 tensors") && said.contains("wrote llama.gguf"), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the file, and nothing beside it");

    let (from, to) = (Gguf::open(example()), Gguf::open(&dir.path().join("llama.gguf")));
    let (from, to) = (from.unwrap(), to.unwrap());
    let parts = |name: &str| {
        let head = ["token_embd.weight", "output_norm.weight", "output.weight"];
        head.contains(&name) || name.starts_with("blk.")
    };
    let wanted: Vec<_> = from.tensors().iter().filter(|t| parts(&t.name)).collect();
    assert_eq!((to.tensors().len(), wanted.len()), (3 + 2 * 9, 3 + 2 * 9));
    for t in wanted {
        let found = to.tensor(&t.name).expect(&t.name);
        assert_eq!((found.dtype, found.shape), (t.dtype, t.shape), "{}", t.name);
        assert!(to.bytes()[found.range.clone()] == from.bytes()[t.range.clone()], "{}", t.name);
    }
    assert_eq!(to.get::<String>("general.architecture").unwrap(), "llama");
    for key in ["general.name", "general.file_type", "tokenizer.ggml.tokens"] {
        assert_eq!(to.metadata()[key], from.metadata()[key], "{key}");
    }
    assert_eq!(to.metadata()["llama.rope.dimension_count"], Value::U32(32));
    let strange = |key: &&String| key.starts_with("openvla.") || key.ends_with("merges");
    assert_eq!(to.metadata().keys().find(strange), None);
}

#[test]
fn outputs_that_would_do_harm_are_refused() {
    let dir = folder(|_| ());
    assert_refused(dir.path(), "model.gguf", &["model.gguf would be replaced", "-o"]);
    assert_refused(dir.path(), ".", &["folder", "-o"]);
    assert_refused(dir.path(), "missing/llama.gguf", &["missing", "No such file"]);
    let output = export(&["model.gguf"], dir.path());
    assert_eq!(output.status.code(), Some(2), "-o is needed");
}

#[test]
fn models_without_a_whole_llama_are_refused() {
    /// Puts other bytes of the same number in the place of some.
    fn replace(bytes: &mut [u8], from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
        bytes[at..][..to.len()].copy_from_slice(to.as_bytes());
    }
    let refused = |words: &[&str], change: fn(&mut Vec<u8>)| {
        assert_refused(folder(change).path(), "llama.gguf", words);
    };
    refused(&["model.gguf", "GGUF"], |bytes| bytes.truncate(1000));
    refused(&["model.gguf", "cut off"], |bytes| bytes.truncate(bytes.len() - 64));
    let cannot = "model.gguf cannot be exported";
    refused(&[cannot, "`unknown` model"], |bytes| replace(bytes, "openvla", "unknown"));
    refused(&[cannot, "`blk.1.attn_q.weight` is missing"], |bytes| {
        replace(bytes, "blk.1.attn_q.weight", "blk.1.attn_x.weight");
    });
}

#[test]
fn an_exported_file_is_no_model_of_ours() {
    let dir = folder(|_| ());
    assert!(export(&["model.gguf", "-o", "llama.gguf"], dir.path()).status.success());
    fs::rename(dir.path().join("llama.gguf"), dir.path().join("model.gguf")).unwrap();
    assert_refused(dir.path(), "again.gguf", &["it is a `llama` model, not `openvla`"]);
}
