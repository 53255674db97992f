//! Mutated checkpoints: whatever is converted can be opened, and nothing panics.

use openvla_example::Variant;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

use crate::folder::{Checkpoint, INDEX};

const FILES: [&str; 6] = [
    "config.json",
    "preprocessor_config.json",
    "dataset_statistics.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
];

/// That many cases, or `PROPTEST_CASES` if it is set. A failure prints its input.
fn cases(n: u32) -> ProptestConfig {
    ProptestConfig { cases: n, failure_persistence: None, ..ProptestConfig::default() }
}

/// What a place of a JSON file might hold wrongly.
fn strange() -> impl Strategy<Value = Value> {
    let numbers = [0, 1, 2, 3, 13, 64, 1 << 31, 1 << 32, 1 << 40, 1 << 63, u64::MAX - 1, u64::MAX];
    let floats = [-1.0, 0.5, 1e-45, 1e39, -1e300, 1e308];
    let others =
        [json!(null), json!(true), json!(""), json!("x"), json!([]), json!({}), json!([[]])];
    let all = numbers.iter().map(|n| json!(n)).chain(floats.iter().map(|x| json!(x)));
    select(all.chain(others).collect::<Vec<_>>())
}

/// Every place of a JSON value, as what leads there.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, v)| places(v, &format!("{at}/{}", escaped(key)), all));
        }
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, v)| places(v, &format!("{at}/{i}"), all));
        }
        _ => {}
    }
}

fn damage(json: &mut Value, at: Index, to: Value) {
    let mut all = Vec::new();
    places(json, "", &mut all);
    *json.pointer_mut(&all[at.index(all.len())]).unwrap() = to;
}

proptest! {
    #![proptest_config(cases(120))]

    #[test]
    fn no_place_of_a_json_file_makes_the_converter_panic(
        file in select(FILES.to_vec()),
        changes in vec((any::<Index>(), strange()), 1..3),
    ) {
        let checkpoint = Checkpoint::plain();
        let change = |json: &mut Value| {
            changes.into_iter().for_each(|(at, to)| damage(json, at, to));
        };
        match file {
            "model.safetensors" => checkpoint.header(change),
            file => checkpoint.json(file, change),
        }
        let _ = checkpoint.convert();
    }

    #[test]
    fn no_byte_makes_the_converter_panic(
        v01 in any::<bool>(),
        file in any::<Index>(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let variant = if v01 { Variant::V01 } else { Variant::OpenVla };
        let others: &[&str] =
            if v01 { &["tokenizer.model", "added_tokens.json"] } else { &["tokenizer.json"] };
        let shard = "model-00001-of-00002.safetensors";
        let files = [&[shard, INDEX, FILES[0], FILES[1], FILES[2]], others].concat();
        let file = files[file.index(files.len())];
        let checkpoint = Checkpoint::new(variant, 2);
        let mut bytes = checkpoint.read(file);
        // Of a shard, the header: a changed weight is as good as any.
        let end = if file == shard { 4096 } else { bytes.len() };
        changes.iter().for_each(|(at, new)| bytes[at.index(end)] = *new);
        checkpoint.write(file, &bytes);
        let _ = checkpoint.convert();
    }
}
