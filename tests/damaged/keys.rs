//! Metadata: each key missing, of another kind, and of each absurd value.

use openvla::Error;
use openvla_example::Variant;
use openvla_kernels::{Array, Value};

use crate::model::{Model, Outcome, memory_stayed_small, refused, sound};

/// Keys that a file may lack: for people.
const OPTIONAL: [&str; 15] = [
    "general.description",
    "general.finetune",
    "general.languages",
    "general.license",
    "general.license.link",
    "general.license.name",
    "general.organization",
    "general.quantization_version",
    "general.repo_url",
    "general.tags",
    "openvla.action_cards",
    "openvla.checksum.xxh64",
    "openvla.converter.version",
    "openvla.source.fingerprint",
    "openvla.source.sha256",
];

const VARIANTS: [Variant; 2] = [Variant::OpenVla, Variant::V01];

#[test]
fn every_key_is_needed_and_named_when_it_is_missing() {
    for model in VARIANTS.map(sound) {
        for key in model.metadata.keys() {
            if OPTIONAL.contains(&key.as_str()) {
                assert!(matches!(model.without(key).outcome(), Outcome::Acted), "{key}")
            } else {
                refused(&model.without(key), &format!("metadata key `{key}` is missing"))
            }
        }
    }
}

#[test]
fn every_key_is_named_when_it_is_of_another_kind() {
    let model = sound(Variant::V01);
    let others = [
        Value::U32(1),
        Value::I32(1),
        Value::F32(1.0),
        Value::Bool(true),
        Value::String("1".into()),
        Value::from(vec![1_i32]),
        Value::from(vec![1.0_f32]),
        Value::from(vec!["1".to_owned()]),
        Value::Array(Array::U32(vec![1])),
        Value::U64(1),
    ];
    // Acting reads no hashes; `tests/proof.rs` and `convert/tests/source.rs` break those.
    let is_read = |key: &str| !["openvla.checksum.xxh64", "openvla.source.sha256"].contains(&key);
    for (key, value) in model.metadata.iter().filter(|(key, _)| is_read(key)) {
        let kind = |value: &Value| match value {
            Value::Array(array) => {
                (std::mem::discriminant(value), Some(std::mem::discriminant(array)))
            }
            _ => (std::mem::discriminant(value), None),
        };
        for other in others.iter().filter(|other| kind(other) != kind(value)) {
            refused(&model.with(key, other.clone()), &format!("metadata key `{key}` is "));
        }
    }
}

/// Whatever the number: refused, naming something in backticks; or harmless.
#[test]
fn no_number_is_dangerous() {
    let model = sound(Variant::OpenVla);
    for (key, value) in &model.metadata {
        let changed: Vec<Value> = match value {
            Value::U32(n) => [0, 1, 2, 3, n - n.min(&1), n + 1, 2 * n, 1 << 14, 1 << 16, 1 << 20]
                .into_iter()
                .chain([1 << 31, u32::MAX])
                .map(Value::U32)
                .collect(),
            Value::F32(_) => {
                let numbers = [0.0, -0.0, -1.0, 1e-45, 1e-30, 1e30, f32::MAX];
                let absurd = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
                numbers.into_iter().chain(absurd).map(Value::F32).collect()
            }
            Value::Bool(yes) => vec![Value::Bool(!yes)],
            _ => continue,
        };
        for value in changed {
            let what = format!("{key} = {value:?}");
            match model.with(key, value).outcome() {
                Outcome::Refused(why) => {
                    let named = why.contains('`') || why.contains("tokenizer: the");
                    assert!(named, "{what}: {why}");
                }
                Outcome::Failed(
                    Error::NotFinite { .. }
                    | Error::Kernels(openvla_kernels::Error::NotFinite { .. })
                    | Error::InstructionTooLong { .. },
                ) => {}
                Outcome::Failed(error) => panic!("{what}: {error}"),
                Outcome::Acted => {}
            }
        }
    }
    memory_stayed_small();
}

#[test]
fn sizes_of_image_and_llama_that_cannot_be_are_refused_by_name() {
    let model = sound(Variant::OpenVla);
    let n = Value::U32;
    for (key, value, wanted) in [
        ("general.quantization_version", n(3), "`general.quantization_version` is 3; this version"),
        (
            "openvla.format_version",
            n(0),
            "`openvla.format_version` is 0; this version reads 1 and 2",
        ),
        ("openvla.format_version", n(3), "`openvla.format_version` is 3"),
        ("openvla.image.size", n(0), "`openvla.image.size` is 0, not 14 to 1024"),
        ("openvla.image.size", n(1025), "`openvla.image.size` is 1025"),
        (
            "openvla.image.size",
            n(225),
            "`openvla.image.size` is 225, no whole number of patches of 14",
        ),
        ("openvla.image.size", n(238), "tensor `dinov2.position_embd.weight` has shape [32, 256"),
        ("openvla.vision.patch_size", n(0), "`openvla.vision.patch_size` is 0"),
        ("openvla.vision.patch_size", n(7), "tensor `dinov2.patch_embd.weight` has shape"),
        ("openvla.vision.patch_size", n(1), "which the image's 50176 patches do not fit"),
        ("openvla.embedding_length", n(0), "`openvla.embedding_length` is 0; 1 to 65536"),
        (
            "openvla.embedding_length",
            n(128),
            "`openvla.projector.widths` is [96, 384, 64, 64]; from the towers' 96 to 128",
        ),
        ("openvla.block_count", n(0), "`openvla.block_count` is 0; 1 to 128 is possible"),
        ("openvla.block_count", n(129), "`openvla.block_count` is 129"),
        ("openvla.block_count", n(1), "tensor `blk.1."),
        ("openvla.block_count", n(3), "tensor `blk.2.attn_q.weight` is missing"),
        ("openvla.attention.head_count", n(0), "`openvla.attention.head_count` is 0"),
        (
            "openvla.attention.head_count",
            n(3),
            "head_count` is 3 and `openvla.attention.head_count_kv` 2 for 64",
        ),
        (
            "openvla.attention.head_count",
            n(64),
            "head_count` is 64 and `openvla.attention.head_count_kv` 2 for 64",
        ),
        (
            "openvla.attention.head_count_kv",
            n(3),
            "head_count` is 2 and `openvla.attention.head_count_kv` 3 for 64",
        ),
        ("openvla.attention.head_count_kv", n(1), "tensor `blk.0.attn_k.weight` has shape"),
        ("openvla.feed_forward_length", n(97), "tensor `blk.0.ffn_gate.weight` has shape"),
        ("openvla.context_length", n(0), "`openvla.context_length` is 0; 1 to 16384"),
        (
            "openvla.context_length",
            n(256),
            "`openvla.context_length` is 256, which the image's 256 patches",
        ),
        ("openvla.vocab_size", n(0), "`openvla.vocab_size` is 0"),
    ] {
        refused(&model.with(key, value), wanted);
    }
}

#[test]
fn numbers_of_towers_and_motions_that_cannot_be_are_refused_by_name() {
    let model = sound(Variant::OpenVla);
    let n = Value::U32;
    for (key, value, wanted) in [
        ("openvla.dinov2.block_count", n(u32::MAX), "`openvla.dinov2.block_count` is 4294967295"),
        (
            "openvla.dinov2.attention.head_count",
            n(5),
            "head_count` is 5, which does not divide 32 channels",
        ),
        ("openvla.dinov2.prefix_length", n(0), "tensor `dinov2.prefix_embd.weight` belongs to no"),
        ("openvla.dinov2.prefix_length", n(65), "`openvla.dinov2.prefix_length` is 65; 0 to 64"),
        ("openvla.siglip.prefix_length", n(1), "tensor `siglip.prefix_embd.weight` is missing"),
        (
            "openvla.dinov2.layer_scale",
            Value::Bool(false),
            "tensor `dinov2.blk.0.ls1.weight` belongs",
        ),
        (
            "openvla.siglip.layer_scale",
            Value::Bool(true),
            "tensor `siglip.blk.0.ls1.weight` is missing",
        ),
        ("openvla.rope.freq_base", Value::F32(0.0), "`openvla.rope.freq_base` is 0; more than 0"),
        (
            "openvla.attention.layer_norm_rms_epsilon",
            Value::F32(f32::NAN),
            "`openvla.attention.layer_norm_rms_epsilon` is NaN",
        ),
        (
            "openvla.siglip.attention.layer_norm_epsilon",
            Value::F32(-1e-6),
            "`openvla.siglip.attention.layer_norm_epsilon` is -0.000001",
        ),
        ("openvla.action.token_count", n(0), "`openvla.action.token_count` is 0 and"),
        ("openvla.action.token_count", n(2), "`openvla.action.token_count` is 2 and"),
        ("openvla.action.token_end", n(u32::MAX), "`openvla.action.token_end` 4294967295"),
        ("openvla.prompt.suffix_token_id", n(u32::MAX), "`openvla.prompt.suffix_token_id` is"),
        (
            "openvla.prompt.suffix_token_id",
            n(1),
            "`openvla.prompt.suffix_token_id` is 1, which cannot",
        ),
    ] {
        refused(&model.with(key, value), wanted);
    }
}

#[test]
fn words_that_cannot_be_are_refused() {
    let (model, v01) = (sound(Variant::OpenVla), sound(Variant::V01));
    let text = |key, text: &str| model.with(key, text.to_owned());
    for (model, wanted) in [
        (text("general.architecture", "llama"), "it is a `llama` model, not `openvla`"),
        (text("general.architecture", ""), "it is a `` model"),
        (text("openvla.image.resize", "stretch"), "its images are resized by `stretch`, unknown"),
        (text("openvla.image.resize", "letterbox"), "`openvla.image.letterbox_fill` is missing"),
        (
            text("openvla.prompt.template", "go"),
            "the prompt template holds `{instruction}` 0 times",
        ),
        (text("tokenizer.ggml.model", "gpt2"), "its tokenizer is `gpt2`; `llama` is needed"),
        (text("openvla.statistics", ""), "its action statistics: EOF"),
        (text("openvla.statistics", "no json"), "its action statistics: expected"),
        (text("openvla.statistics", "{}"), "there is no data set"),
        (text("openvla.statistics", &"[".repeat(9999)), "its action statistics:"),
        (
            text("openvla.statistics", &format!("{{\"d\":{}", "{\"action\":".repeat(999))),
            "recursion",
        ),
        (text("openvla.action_cards", "no json"), "its action cards (`openvla.action_cards`): exp"),
        (
            text("openvla.action_cards", r#"{"d": {"dimensions": []}}"#),
            "that of `d` disagrees with the statistics",
        ),
        (v01.with("openvla.image.letterbox_fill", vec![0, 0]), "letterbox_fill` is [0, 0]"),
        (v01.with("openvla.image.letterbox_fill", vec![0, 256, 0]), "three bytes are needed"),
        (v01.with("openvla.siglip.image_mean", vec![0.5_f32]), "siglip.image_mean` is 1 numbers"),
        (
            v01.with("openvla.siglip.image_std", vec![0.5_f32, 0.0, 1.0]),
            "`openvla.siglip.image_std`",
        ),
        (v01.with("openvla.siglip.image_mean", vec![f32::NAN; 3]), "`openvla.siglip.image_mean`"),
        (
            v01.with("openvla.vision.towers", Vec::<String>::new()),
            "`openvla.vision.towers` names 0",
        ),
        (
            v01.with("openvla.vision.towers", vec!["clip".to_owned()]),
            "key `openvla.clip.image_mean`",
        ),
        (
            v01.with("openvla.vision.towers", vec!["siglip".to_owned(); 3]),
            "`openvla.vision.towers` names 3",
        ),
        (
            v01.with("openvla.vision.towers", vec!["siglip".to_owned(); 2]),
            "`openvla.projector.widths` is [64, 64, 64]; from",
        ),
        (v01.with("openvla.projector.widths", Vec::<i32>::new()), "projector.widths` is 0 widths"),
        (v01.with("openvla.projector.widths", vec![64]), "projector.widths` is 1 widths"),
        (v01.with("openvla.projector.widths", vec![64, -1, 64]), "projector.widths` is 3 widths"),
        (v01.with("openvla.projector.widths", vec![64; 9999]), "projector.widths` is 9999 widths"),
        (v01.with("openvla.projector.widths", vec![64, 64]), "tensor `projector.fc2."),
        (
            v01.with("openvla.projector.widths", vec![64, 32, 64]),
            "tensor `projector.fc1.weight` has",
        ),
        (
            v01.with("openvla.projector.widths", vec![64; 5]),
            "tensor `projector.fc3.weight` is missing",
        ),
    ] {
        refused(&model, wanted);
    }
}

/// Data sets whose numbers would make a motion that is none.
#[test]
fn statistics_that_give_no_motion_are_refused() {
    let model = sound(Variant::OpenVla);
    let many = vec!["0"; 65].join(",");
    for (action, wanted) in [
        (r#"{"q01": [0], "q99": [1, 2]}"#.to_owned(), "`d` has 1 q01, 2 q99, 1 mask"),
        (r#"{"q01": [], "q99": []}"#.to_owned(), "`d` has 0 q01"),
        (r#"{"q01": [0], "q99": [1], "mask": []}"#.to_owned(), "0 mask"),
        (format!(r#"{{"q01": [{many}], "q99": [{many}]}}"#), "`d` has 65 q01"),
        (r#"{"q01": [-1e308], "q99": [1e308]}"#.to_owned(), "`d` has a range that is not finite"),
        (
            r#"{"q01": ["0"], "q99": [1]}"#.to_owned(),
            "`d` has 0 for action.q01[0]; a finite number",
        ),
        (r#"{"q99": [1]}"#.to_owned(), "`d` lacks action.q01"),
        ("7".to_owned(), "`d` lacks action.q01"),
        (r#"{"q01": [0], "q99": ["NaN"]}"#.to_owned(), "`d` has NaN for action.q99[0]"),
    ] {
        refused(
            &model.with("openvla.statistics", format!(r#"{{"d": {{"action": {action}}}}}"#)),
            wanted,
        );
    }
}

#[test]
fn damaged_vocabularies_are_refused() {
    let model = sound(Variant::OpenVla);
    let n = model.metadata["openvla.vocab_size"].clone();
    let Value::U32(n) = n else { panic!("{n:?}") };
    let strings = |key: &str, change: &dyn Fn(&mut Vec<String>)| {
        let mut list: Vec<String> = model.metadata[key].clone().try_into().unwrap();
        change(&mut list);
        model.with(key, list)
    };
    let tokens = |change: &dyn Fn(&mut Vec<String>)| strings("tokenizer.ggml.tokens", change);
    let merges = |change: &dyn Fn(&mut Vec<String>)| strings("tokenizer.ggml.merges", change);
    let types = |change: &dyn Fn(&mut Vec<i32>)| {
        let mut list: Vec<i32> =
            model.metadata["tokenizer.ggml.token_type"].clone().try_into().unwrap();
        change(&mut list);
        model.with("tokenizer.ggml.token_type", list)
    };
    let id = |key: &str, id: u32| -> Model { model.with(&format!("tokenizer.ggml.{key}"), id) };
    for (model, wanted) in [
        (
            tokens(&|list| drop(list.pop())),
            format!("`tokenizer.ggml.tokens` has {} pieces for {n}", n - 1),
        ),
        (
            tokens(&|list| list.push("new".into())),
            format!("`tokenizer.ggml.tokens` has {} pieces for {n}", n + 1),
        ),
        (tokens(&|list| list.clear()), format!("`tokenizer.ggml.tokens` has 0 pieces for {n}")),
        (tokens(&|list| list[300] = list[301].clone()), "has two ids, 300 and 301".into()),
        (types(&|list| list.truncate(300)), format!("{n} pieces with {n} scores and 300 types")),
        (types(&|list| list[300] = 0), "token type 0, wanted 1 to 6".into()),
        (types(&|list| list[300] = -1), "token type -1".into()),
        (types(&|list| list.iter_mut().for_each(|kind| *kind = 5)), "tokenizer: ".into()),
        (model.with("tokenizer.ggml.scores", vec![0.0_f32; 3]), "with 3 scores".into()),
        (merges(&|list| list.push("no pieces".into())), "tokenizer: ".into()),
        (merges(&|list| list.push("one".into())), "merge `one` is not two pieces".into()),
        (merges(&|list| list.push("x".repeat(999) + " y")), "is not two pieces".into()),
        (id("bos_token_id", n), format!("the bos id is {n}, but there are {n} pieces")),
        (id("eos_token_id", u32::MAX), "the eos id is 4294967295".into()),
        (id("unknown_token_id", 300), "the unknown id 300 is `".into()),
        (id("padding_token_id", 300), "the padding id 300 is `".into()),
    ] {
        refused(&model, &wanted);
    }
}
