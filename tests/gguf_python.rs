//! The converter's files as others read them: the PyPI package `gguf`, and ggml's naming scheme.
//!
//! The tests that need the package are ignored; `python3` must have it, or the Python that
//! `$OPENVLA_GGUF_PYTHON` names:
//!
//! ```sh
//! python3 -m venv /tmp/gguf && /tmp/gguf/bin/pip install gguf
//! OPENVLA_GGUF_PYTHON=/tmp/gguf/bin/python cargo test --test gguf_python -- --ignored
//! ```

mod common;

use std::path::Path;
use std::process::Command;

use common::floats;
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, Spec, Variant};
use openvla_kernels::{DType, Gguf, TensorInfo};
use serde_json::{Value, json};

/// What the package finds in a file.
fn read(file: &Path, encoding: &str) -> Value {
    let python = std::env::var("OPENVLA_GGUF_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf_reader.py");
    let output = Command::new(python).arg(script).arg(file).arg(encoding).output().unwrap();
    let (out, errors) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&out).unwrap_or_else(|e| panic!("gguf_reader.py: {e}\n{errors}"))
}

/// A folder `name` with an example checkpoint, as a conversion and the file it becomes.
fn converted(root: &Path, name: &str, variant: Variant, encoding: &str) -> (Conversion, Gguf) {
    let folder = root.join(name);
    openvla_example::write(&folder, &Spec { variant, ..COMMITTED }).unwrap();
    let encoding: Encoding = encoding.parse().unwrap();
    let conversion = Conversion::new(&folder, &encoding.into()).unwrap();
    let file = root.join(conversion.file_name());
    conversion.write(&file, &indicatif::ProgressBar::hidden()).unwrap();
    (conversion, Gguf::open(&file).unwrap())
}

#[test]
#[ignore = "needs Python's package gguf"]
fn the_package_finds_every_tensor_as_planned() {
    let root = tempfile::tempdir().unwrap();
    for encoding in ["F32", "F16", "BF16", "Q8_0", "Q4_0", "IQ4_NL"] {
        let (conversion, file) = converted(root.path(), encoding, Variant::OpenVla, encoding);
        let found = read(Path::new(file.file()), encoding);
        let tensors = found["tensors"].as_object().unwrap();
        assert_eq!(tensors.len(), conversion.plan.len());
        for (planned, info) in conversion.plan.iter().zip(file.tensors()) {
            let name = &planned.tensor.name;
            let wanted = [json!(planned.dtype.to_string()), json!(shape(info))];
            assert_eq!(
                [&tensors[name]["type"], &tensors[name]["shape"]],
                wanted.each_ref(),
                "{name}"
            );
            let ours = info.dtype.decode(&file.bytes()[info.range.clone()]);
            let theirs = floats(&tensors[name]["first"]);
            let ends = ours.iter().take(8).chain(ours.last()).map(|x| f64::from(*x));
            let last = tensors[name]["last"].as_f64();
            assert_eq!(
                ends.collect::<Vec<_>>(),
                [theirs, last.into_iter().collect()].concat(),
                "{name}"
            );
        }
        if encoding == "IQ4_NL" {
            let count = |dtype| conversion.plan.iter().filter(|p| p.dtype == dtype).count();
            assert!([DType::F32, DType::Q8_0, DType::IQ4_NL].map(count).iter().all(|n| *n > 8));
        }
    }
}

/// ggml writes no ones at the end of a shape, and at least one number.
fn shape(info: &TensorInfo) -> &[usize] {
    let n = info.shape.iter().rposition(|n| *n != 1).map_or(1, |last| last + 1);
    &info.shape[..n]
}

#[test]
#[ignore = "needs Python's package gguf"]
fn the_package_finds_every_key() {
    let root = tempfile::tempdir().unwrap();
    let name = "openvla-7b-finetuned-libero-spatial";
    let (conversion, file) = converted(root.path(), name, Variant::OpenVla, "IQ4_NL");
    let found = read(Path::new(file.file()), "IQ4_NL");
    let keys = found["keys"].as_object().unwrap();
    assert_eq!(keys.keys().collect::<Vec<_>>(), file.metadata().keys().collect::<Vec<_>>());
    for (key, wanted) in [
        ("general.architecture", json!("openvla")),
        ("general.name", json!("OpenVLA 424K libero-spatial v1.0")),
        ("general.basename", json!("OpenVLA")),
        ("general.size_label", json!("424K")),
        ("general.finetune", json!("libero-spatial")),
        ("general.version", json!("v1.0")),
        ("general.file_type", json!(25)),
        ("general.quantization_version", json!(2)),
        ("general.license", json!("llama2")),
        ("openvla.vision.towers", json!(["dinov2", "siglip"])),
        ("openvla.projector.widths", json!([96, 384, 64, 64])),
        ("openvla.dinov2.layer_scale", json!(true)),
        ("openvla.prompt.template", json!(openvla::prompt::OPENVLA)),
        ("tokenizer.ggml.model", json!("llama")),
        ("tokenizer.ggml.tokens", json!(conversion.config.vocabulary.tokens)),
        ("tokenizer.ggml.merges", json!(conversion.config.vocabulary.merges)),
        ("openvla.statistics", json!(conversion.config.statistics.json())),
    ] {
        assert_eq!(keys[key]["value"], wanted, "{key}");
    }
    for (key, kind) in [
        ("general.file_type", "UINT32"),
        ("openvla.attention.layer_norm_rms_epsilon", "FLOAT32"),
        ("openvla.dinov2.image_mean", "ARRAY FLOAT32"),
        ("tokenizer.ggml.scores", "ARRAY FLOAT32"),
        ("tokenizer.ggml.token_type", "ARRAY INT32"),
        ("tokenizer.ggml.bos_token_id", "UINT32"),
    ] {
        assert_eq!(keys[key]["kind"], kind, "{key}");
    }
}

/// Folders, and what their files are called: `BaseName-SizeLabel-FineTune-Version-Encoding.gguf`.
const NAMES: [(&str, Variant, &str, &str); 6] = [
    ("openvla-7b", Variant::OpenVla, "Q8_0", "OpenVLA-424K-v1.0-Q8_0.gguf"),
    ("openvla-v01-7b", Variant::V01, "Q4_0", "OpenVLA-313K-v0.1-Q4_0.gguf"),
    (
        "openvla-7b-finetuned-libero-spatial",
        Variant::OpenVla,
        "IQ4_NL",
        "OpenVLA-424K-libero-spatial-v1.0-IQ4_NL.gguf",
    ),
    (
        "openvla-7b+bridge_orig+b16+lr-0.0005+lora-r32+dropout-0.0--image_aug",
        Variant::OpenVla,
        "BF16",
        "OpenVLA-424K-bridge-orig-b16-lr-0-0005-lora-r32-dropout-0-0-image-aug-v1.0-BF16.gguf",
    ),
    ("抓取_放置", Variant::OpenVla, "F16", "OpenVLA-424K-抓取-放置-v1.0-F16.gguf"),
    ("Straße 7", Variant::OpenVla, "F16", "OpenVLA-424K-Straße-7-v1.0-F16.gguf"),
];

#[test]
fn file_names_follow_ggmls_scheme() {
    let root = tempfile::tempdir().unwrap();
    for (folder, variant, encoding, wanted) in NAMES {
        let (_, file) = converted(root.path(), folder, variant, encoding);
        assert_eq!(Path::new(file.file()).file_name().unwrap(), wanted, "{folder}");
    }
}

/// Whichever the folder, a reader of the name finds the size after the base name, and version and
/// encoding at the end.
#[test]
#[ignore = "needs Python's package gguf"]
fn the_package_composes_and_parses_the_same_names() {
    let root = tempfile::tempdir().unwrap();
    for (folder, variant, encoding, wanted) in NAMES {
        let (conversion, file) = converted(root.path(), folder, variant, encoding);
        let found = read(Path::new(file.file()), encoding);
        assert_eq!(found["composed"], wanted, "{folder}");
        let general = &conversion.config.general;
        let parts = json!({
            "base": general.basename,
            "size": general.size_label,
            "finetune": general.finetune,
            "version": general.version,
            "encoding": encoding,
        });
        assert_eq!(found["parsed"], parts, "{folder}");
    }
}
