//! Folders as other people have them: two sets of weights, links to nothing, other formats.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use openvla_convert::plan::Encoding;
use openvla_convert::{Conversion, Options};
use openvla_example::Variant;
use safetensors::Dtype;
use serde_json::json;

use crate::folder::{Checkpoint, INDEX, SHARD};

const STATISTICS: &str = "dataset_statistics.json";
const EMBED: &str = "language_model.model.embed_tokens.weight";

fn warnings(checkpoint: &Checkpoint) -> Vec<String> {
    Conversion::new(&checkpoint.path(), &Encoding::default().into()).unwrap().warnings
}

/// Transformers looks for `model.safetensors` first, and so did the run that wrote it last.
#[test]
fn of_two_sets_of_weights_the_one_that_transformers_loads_is_taken() {
    let plain = Checkpoint::plain();
    let wanted = plain.convert().unwrap();
    assert_eq!(warnings(&plain), [""; 0]);
    let both = Checkpoint::new(Variant::OpenVla, 2);
    assert_eq!(warnings(&both), [""; 0]);
    plain.tensors(|tensors| {
        tensors.get_mut(EMBED).unwrap().2.rotate_left(2);
    });
    both.write(SHARD, &plain.read(SHARD));
    assert!(both.convert().unwrap() == plain.convert().unwrap());
    assert!(both.convert().unwrap() != wanted);
    let said = warnings(&both).join("");
    let shards = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors";
    let wanted = format!("{SHARD} is taken, as transformers would, and the rest is not: {shards}");
    assert!(said.contains(&wanted), "{said}");
    // Shards of another run, which the index does not name.
    let stale = Checkpoint::new(Variant::OpenVla, 2);
    stale.write("model-00001-of-00003.safetensors", b"");
    let said = warnings(&stale).join("");
    assert!(said.contains("the rest is not: model-00001-of-00003.safetensors"), "{said}");
    stale.json(INDEX, |index| index["weight_map"]["old.weight"] = json!(shards[..32]));
    stale.refused(&["old.weight, which is in no shard"]);
    stale.remove(INDEX);
    stale.refused(&["model-00001-of-00002.safetensors, but no model.safetensors.index.json"]);
}

#[test]
fn what_is_taken_for_granted_is_said() {
    let checkpoint = Checkpoint::plain();
    checkpoint.write("adapter_model.safetensors", b"");
    let said = warnings(&checkpoint).join("");
    assert!(said.contains("a LoRA adapter too") && said.contains("--lora"), "{said}");
    checkpoint.remove("adapter_model.safetensors");
    checkpoint.remove(STATISTICS);
    let said = warnings(&checkpoint).join("");
    for word in [STATISTICS, "config.json", "base model's", "finetune.py", "--statistics"] {
        assert!(said.contains(word), "{said}");
    }
}

/// None of these may be taken for a file that is not there.
#[test]
fn what_is_there_and_cannot_be_read_has_no_substitute() {
    let optional = [STATISTICS, "tokenizer.model", "special_tokens_map.json"];
    for name in [SHARD, "config.json", "tokenizer.json"].into_iter().chain(optional) {
        let checkpoint = Checkpoint::plain();
        let path = checkpoint.path().join(name);
        if path.exists() {
            checkpoint.remove(name);
        }
        symlink("../../blobs/0a1b", &path).unwrap();
        checkpoint.refused(&[name, "which is a link to ../../blobs/0a1b", "cp -rL"]);
        checkpoint.remove(name);
        symlink(name, &path).unwrap();
        checkpoint.refused(&[name, "which is a link to"]);
        checkpoint.remove(name);
        fs::create_dir(&path).unwrap();
        checkpoint.refused(&[name, "is a folder; a file is needed"]);
        fs::remove_dir(&path).unwrap();
        checkpoint.write(name, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n");
        checkpoint.refused(&[name, "git lfs pull"]);
    }
    let index = Checkpoint::new(Variant::OpenVla, 2);
    index.remove(INDEX);
    symlink("nowhere", index.path().join(INDEX)).unwrap();
    index.refused(&[INDEX, "which is a link to nowhere"]);
}

#[test]
fn other_formats_are_called_by_their_names() {
    let with = |name: &str| {
        let checkpoint = Checkpoint::plain();
        checkpoint.remove(SHARD);
        checkpoint.write(name, b"x");
        checkpoint
    };
    with("pytorch_model.bin").refused(&["pytorch_model.bin", "safe_serialization=True"]);
    with("consolidated.pt").refused(&["native Prismatic run", "convert_openvla_weights_to_hf.py"]);
    let native = with("config.yaml");
    native.write("config.json", br#"{"run_id": "r", "vla": {"type": "siglip"}}"#);
    native.refused(&["native Prismatic run", "convert_openvla_weights_to_hf.py"]);
    let adapter = with("adapter_config.json");
    adapter.remove("config.json");
    adapter.refused(&["is a LoRA adapter", "--lora"]);
    let file = adapter.path().join("latest-checkpoint.pt");
    fs::write(&file, b"x").unwrap();
    let why = crate::folder::convert(&file, Path::new("none.gguf")).unwrap_err();
    assert!(why.contains("native Prismatic run"), "{why}");
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("example/example.gguf");
    let why = crate::folder::convert(&gguf, Path::new("none.gguf")).unwrap_err();
    assert!(why.contains("which is converted already; openvla-run -m takes it"), "{why}");
}

/// Whatever `config.json` says, such tensors are not the weights themselves.
#[test]
fn quantized_weights_are_called_so() {
    let layer = "language_model.model.layers.0.self_attn.q_proj";
    for (end, by) in [
        (".weight.absmax", "bitsandbytes"),
        (".SCB", "bitsandbytes"),
        (".qweight", "GPTQ or AWQ"),
        (".weight_scale_inv", "FP8"),
    ] {
        let checkpoint = Checkpoint::plain();
        let name = format!("{layer}{end}");
        checkpoint.tensors(|tensors| {
            tensors.insert(name.clone(), (Dtype::U8, vec![1], vec![0]));
        });
        let sign = format!("quantized already, by {by} (the tensor {name})");
        checkpoint.refused(&[&sign, "16 or 32 bits"]);
    }
}

#[test]
fn statistics_may_be_named_outright() {
    let checkpoint = Checkpoint::plain();
    let conversion = |checkpoint: &Checkpoint, path: &Path| {
        let statistics = Some(path.to_owned());
        Conversion::new(&checkpoint.path(), &Options { statistics, ..Options::default() })
    };
    let path = checkpoint.path().join("mine.json");
    let mine = r#"{"mine": {"action": {"q01": [0], "q99": [1], "mean": [NaN]}}}"#;
    fs::write(&path, mine).unwrap();
    checkpoint.remove(STATISTICS); // and with none of its own
    checkpoint.json("config.json", |config| config["norm_stats"] = json!(null));
    let found = conversion(&checkpoint, &path).unwrap();
    assert_eq!(found.config.statistics.select(None).unwrap().0, "mine");
    assert_eq!(found.statistics, path.display().to_string());
    let missing = conversion(&checkpoint, Path::new("none.json")).err().unwrap();
    assert!(format!("{missing:#}").contains("cannot read none.json"), "{missing:#}");
}

/// Its name and place do not matter, nor what it is converted to; its weights do.
#[test]
fn a_fingerprint_tells_weights_apart() {
    let of = |checkpoint: &Checkpoint, encoding: &str| {
        let encoding = encoding.parse::<Encoding>().unwrap();
        let conversion = Conversion::new(&checkpoint.path(), &encoding.into()).unwrap();
        conversion.config.general.source.fingerprint.unwrap()
    };
    let plain = of(&Checkpoint::plain(), "F32");
    assert_eq!(plain, of(&Checkpoint::new(Variant::OpenVla, 3), "Q8_0"));
    let tuned = Checkpoint::plain();
    tuned.tensors(|tensors| tensors.get_mut(EMBED).unwrap().2[0] ^= 1);
    assert_ne!(plain, of(&tuned, "F32"));
}
