//! `openvla-convert imatrix` and `--imatrix` as a user meets them: what they say, where, and how
//! they end.

mod common;

use std::fs;
use std::path::Path;
use std::process::Output;

use common::{assert_fails, checkpoint, example, openvla_convert, stderr};
use openvla_kernels::{ALIGNMENT, DType, Gguf, Header, Shape};
use tempfile::TempDir;

/// A folder with a model, prompts, and a matrix collected on them.
fn collected() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("images")).unwrap();
    fs::copy(example("table.png"), at("images/b.PNG")).unwrap();
    fs::copy(example("table.png"), at("images/a.png")).unwrap();
    fs::write(at("images/notes.txt"), "not an image").unwrap();
    fs::write(at("tasks.txt"), "put eggplant into pot\n\n  open the drawer \r\nmove it").unwrap();
    succeeds(&openvla_convert(
        &["--outtype", "F32", &checkpoint(), "-o", "model.gguf"],
        dir.path(),
    ));
    let output = imatrix(dir.path(), &[]);
    succeeds(&output);
    let said = stderr(&output);
    assert_eq!(said, "wrote calibration.gguf: 27 matrices, from 3 prompts\n");
    dir
}

/// Collects with usual arguments, of which some may be others.
fn imatrix(dir: &Path, others: &[(&str, &str)]) -> Output {
    let usual = [
        ("", "model.gguf"),
        ("--images", "images"),
        ("--instructions", "tasks.txt"),
        ("--threads", "1"),
        ("-o", "calibration.gguf"),
    ];
    let with = |(flag, usual)| {
        let other = others.iter().find(|(other, _)| *other == flag);
        [flag, other.map_or(usual, |(_, value)| *value)]
    };
    let args = usual.into_iter().flat_map(with).filter(|word| !word.is_empty());
    openvla_convert(&[vec!["imatrix"], args.collect()].concat(), dir)
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
    assert_eq!(output.stdout, b"");
}

/// A mistake of the user's, in a few words and nothing else.
fn fails(output: &Output, words: &[&str]) {
    assert_fails(output, words);
    let said = stderr(output);
    assert!(said.starts_with("error: ") && said.len() < 500, "{said}");
}

#[test]
fn collecting_writes_a_file_that_converting_reads() {
    let dir = collected();
    let file = Gguf::open(&dir.path().join("calibration.gguf")).unwrap();
    assert_eq!(file.get::<String>("general.type").unwrap(), "imatrix");
    assert_eq!(file.get::<Vec<String>>("imatrix.datasets").unwrap(), ["images", "tasks.txt"]);
    assert_eq!(file.get::<u32>("imatrix.chunk_count").unwrap(), 3);
    let rows = file.get::<u32>("imatrix.chunk_size").unwrap();
    assert!((257..320).contains(&rows), "{rows} rows of the image and of the longest prompt");
    let names: Vec<_> = file.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(&names[..2], ["action_head.weight.in_sum2", "action_head.weight.counts"]);
    let bases = names.iter().step_by(2).map(|name| name.strip_suffix(".in_sum2").unwrap());
    assert!(bases.is_sorted(), "{names:?}");
    let convert = |args: &[&str], out| {
        succeeds(&openvla_convert(
            &[&[&checkpoint(), "--outtype", "IQ4_NL", "-o", out], args].concat(),
            dir.path(),
        ));
        let file = Gguf::open(&dir.path().join(out)).unwrap();
        let data = file.tensors().iter().map(|tensor| file.bytes()[tensor.range.clone()].to_vec());
        let files = file.get::<Vec<String>>("openvla.source.sha256").unwrap();
        (data.collect::<Vec<_>>().concat(), files)
    };
    let (plain, files) = convert(&[], "plain.gguf");
    let (weighed, more) = convert(&["--imatrix", "calibration.gguf"], "weighed.gguf");
    assert!(plain.len() == weighed.len() && plain != weighed, "other scales, and nothing else");
    let added: Vec<_> = more.iter().filter(|file| !files.contains(file)).collect();
    assert!(added.len() == 1 && added[0].ends_with("  imatrix/calibration.gguf"), "{added:?}");
    // The same prompts give the same file; and any file of the model will do.
    succeeds(&imatrix(dir.path(), &[("-o", "again.gguf")]));
    let [first, again] =
        ["calibration.gguf", "again.gguf"].map(|name| fs::read(dir.path().join(name)).unwrap());
    assert_eq!(first, again);
    succeeds(&imatrix(dir.path(), &[("", "weighed.gguf"), ("-o", "again.gguf")]));
}

#[test]
fn mistakes_with_collecting_are_named() {
    let dir = collected();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("none")).unwrap();
    fs::write(at("empty.txt"), "\n \n").unwrap();
    fs::write(at("latin1.txt"), b"caf\xe9\n").unwrap();
    fs::write(at("long.txt"), format!("open the drawer\n{}\n", "very ".repeat(3000))).unwrap();
    for (name, bytes) in [("cut", &b"\x89PNG\r\n\x1a\n"[..]), ("void", b"")] {
        fs::create_dir(at(name)).unwrap();
        fs::copy(example("table.png"), at(name).join("1.png")).unwrap();
        fs::write(at(name).join("2.jpeg"), bytes).unwrap();
    }
    fs::create_dir_all(at("folder/inner.png")).unwrap();
    let before = fs::read(at("calibration.gguf")).unwrap();
    for (flag, value, words) in [
        ("", "none.gguf", &["none.gguf", "No such file"][..]),
        ("", "tasks.txt", &["tasks.txt", "GGUF"]),
        ("", "calibration.gguf", &["calibration.gguf", "general.architecture"]),
        ("", "images", &["images", "not a regular file"]),
        ("--images", "nowhere", &["nowhere", "No such file"]),
        ("--images", "tasks.txt", &["tasks.txt", "Not a directory"]),
        ("--images", "none", &["none holds no images", "*.png"]),
        ("--images", "cut", &["cut/2.jpeg", "it is a PNG without a header"]),
        ("--images", "void", &["void/2.jpeg", "image"]),
        ("--images", "folder", &["folder/inner.png", "not a regular file"]),
        ("--instructions", "nowhere", &["instructions in nowhere", "No such file"]),
        ("--instructions", "images", &["instructions in images"]),
        ("--instructions", "empty.txt", &["empty.txt holds no instructions"]),
        ("--instructions", "latin1.txt", &["latin1.txt", "UTF-8"]),
        ("--instructions", "long.txt", &["very very", "long.txt", "too long", "2048"]),
        ("-o", ".", &["folder", "-o"]),
        ("-o", "missing/out.gguf", &["missing", "No such file"]),
    ] {
        fails(&imatrix(dir.path(), &[(flag, value)]), words);
    }
    let usage = openvla_convert(&["imatrix", "model.gguf"], dir.path());
    assert_eq!(usage.status.code(), Some(2), "{}", stderr(&usage));
    assert!(stderr(&usage).contains("--images"), "{}", stderr(&usage));
    assert_eq!(fs::read(at("calibration.gguf")).unwrap(), before, "as it was");
    let left = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().starts_with(".openvla")));
}

/// A matrix with some tensors changed, as `new.gguf`.
fn edited(dir: &Path, kind: &str, edit: impl Fn(&str, &mut Shape, &mut Vec<f32>)) {
    let file = Gguf::open(&dir.join("calibration.gguf")).unwrap();
    let mut header = Header::default();
    header.set("general.type", kind.to_owned());
    let mut data = Vec::new();
    for tensor in file.tensors() {
        let mut shape = tensor.shape;
        let mut numbers = tensor.dtype.decode(&file.bytes()[tensor.range.clone()]);
        edit(&tensor.name, &mut shape, &mut numbers);
        if numbers.is_empty() {
            continue;
        }
        header.tensor(&tensor.name, DType::F32, shape);
        data.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
    }
    fs::write(dir.join("new.gguf"), [header.encode(), data].concat()).unwrap();
}

const Q: &str = "blk.0.attn_q.weight.in_sum2";

#[test]
fn a_matrix_that_cannot_be_is_refused() {
    let dir = collected();
    let refused = |words: &[&str]| {
        let args = [&checkpoint(), "--imatrix", "new.gguf", "-o", "out.gguf"];
        let output = openvla_convert(&args, dir.path());
        fails(&output, &[words, &["new.gguf"]].concat());
        assert!(!dir.path().join("out.gguf").exists());
    };
    for wrong in [f32::NAN, f32::INFINITY, -1.0] {
        edited(dir.path(), "imatrix", |name, _, numbers| {
            if name == Q {
                numbers[5] = wrong;
            }
        });
        refused(&["blk.0.attn_q", "not sums of squares"]);
    }
    edited(dir.path(), "imatrix", |name, shape, numbers| {
        if name == Q {
            (*shape, *numbers) = ([32, 1, 1, 1], vec![1.0; 32]);
        }
    });
    refused(&["blk.0.attn_q", "[32, 1, 1, 1]", "64 columns", "another model"]);
    edited(dir.path(), "imatrix", |name, _, numbers| {
        if name == "blk.0.attn_q.weight.counts" {
            numbers.clear();
        }
    });
    refused(&["it lacks blk.0.attn_q.weight.counts"]);
    edited(dir.path(), "imatrix", |name, _, numbers| {
        if !name.starts_with("output") {
            numbers.clear();
        }
    });
    let one = openvla_convert(&[&checkpoint(), "--imatrix", "new.gguf", "--dry-run"], dir.path());
    assert!(one.status.success(), "one matrix is better than none: {}", stderr(&one));
    edited(dir.path(), "imatrix", |_, _, numbers| numbers.fill(0.0));
    refused(&["none of this one's tensors"]);
    edited(dir.path(), "model", |_, _, _| ());
    refused(&["`general.type` is \"model\", not \"imatrix\""]);
    fs::copy(dir.path().join("model.gguf"), dir.path().join("new.gguf")).unwrap();
    refused(&["`general.type`", "not \"imatrix\""]);
    let whole = fs::read(dir.path().join("calibration.gguf")).unwrap();
    for n in [0, 3, 30, whole.len() / 2, whole.len() - 33] {
        fs::write(dir.path().join("new.gguf"), &whole[..n]).unwrap();
        refused(&[]);
    }
}

/// ggml makes a block of zeros of columns that do not count at all.
#[test]
fn columns_that_calibration_did_not_reach_are_kept() {
    let dir = collected();
    edited(dir.path(), "imatrix", |name, _, numbers| {
        if name == Q {
            numbers[..32].fill(0.0);
        }
    });
    let args = [&checkpoint(), "--outtype", "IQ4_NL", "--imatrix", "new.gguf", "-o", "out.gguf"];
    succeeds(&openvla_convert(&args, dir.path()));
    let file = Gguf::open(&dir.path().join("out.gguf")).unwrap();
    let q = file.tensor("blk.0.attn_q.weight").unwrap();
    let row = q.dtype.decode(&file.bytes()[q.range.clone()][..q.dtype.row_bytes(64).unwrap()]);
    assert!(row[..32].iter().filter(|x| **x != 0.0).count() > 16, "{row:?}");
}
