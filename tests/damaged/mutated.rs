//! Mutated model files: whatever still opens acts, or says why not.

use openvla::Decoding;
use openvla_example::Variant;
use openvla_kernels::{Array, Value};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use crate::model::{memory_stayed_small, outcome, sound};

/// That many cases, or `PROPTEST_CASES` if it is set. A failure prints its input.
fn cases(n: u32) -> ProptestConfig {
    ProptestConfig { cases: n, failure_persistence: None, ..ProptestConfig::default() }
}

fn variant() -> impl Strategy<Value = Variant> {
    select(vec![Variant::OpenVla, Variant::V01])
}

fn decoding() -> impl Strategy<Value = Decoding> {
    select(vec![Decoding::Actions, Decoding::Reference])
}

/// A number to put in the place of another: near it, small, or absurd.
fn number(old: u32, new: u32) -> u32 {
    match new % 4 {
        0 => old.wrapping_add(new >> 30).wrapping_sub(1),
        1 => old.rotate_left(new >> 27),
        2 => new >> 22,
        _ => new,
    }
}

/// A value of the same kind, other in one place.
fn changed(value: &Value, at: Index, new: u32) -> Value {
    let swap = |text: &str| {
        let mut letters: Vec<char> = text.chars().collect();
        let letter = char::from_u32(new % 0x250).unwrap_or(' ');
        if letters.is_empty() {
            letters.push(letter)
        } else {
            letters[at.index(text.chars().count())] = letter
        }
        letters.into_iter().collect::<String>()
    };
    let float = |x: f32| f32::from_bits(number(x.to_bits(), new));
    match value.clone() {
        Value::U32(n) => Value::U32(number(n, new)),
        Value::F32(x) => Value::F32(float(x)),
        Value::Bool(yes) => Value::Bool(!yes),
        Value::String(text) => Value::String(swap(&text)),
        Value::Array(Array::I32(mut list)) if !list.is_empty() => {
            let i = at.index(list.len());
            list[i] = number(list[i] as u32, new) as i32;
            list.into()
        }
        Value::Array(Array::F32(mut list)) if !list.is_empty() => {
            let i = at.index(list.len());
            list[i] = float(list[i]);
            list.into()
        }
        Value::Array(Array::String(mut list)) if !list.is_empty() => {
            let i = at.index(list.len());
            match new % 3 {
                0 => drop(list.remove(i)),
                _ => list[i] = swap(&list[i]),
            }
            list.into()
        }
        other => other,
    }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn no_value_makes_a_model_panic(
        variant in variant(),
        decoding in decoding(),
        changes in vec((any::<Index>(), any::<Index>(), any::<u32>()), 1..4),
    ) {
        let mut model = sound(variant).clone();
        let keys: Vec<String> = model.metadata.keys().cloned().collect();
        for (key, at, new) in changes {
            let key = &keys[key.index(keys.len())];
            let value = changed(&model.metadata[key], at, new);
            model.metadata.insert(key.clone(), value);
        }
        outcome(&model.bytes(), decoding);
        memory_stayed_small();
    }

    #[test]
    fn no_byte_makes_a_model_panic(
        variant in variant(),
        decoding in decoding(),
        changes in vec((any::<Index>(), any::<Index>(), any::<u8>()), 1..4),
    ) {
        let model = sound(variant);
        let mut bytes = model.bytes();
        // Any byte of the header, and as often one of the few that are neither vocabulary nor tensor data.
        let data: usize = model.tensors.iter().map(|t| t.data.len().next_multiple_of(32)).sum();
        let header = bytes.len() - data;
        let vocabulary = bytes.windows(20).position(|at| at == b"tokenizer.ggml.merge").unwrap();
        for (near, at, new) in changes {
            let end = [header, vocabulary][near.index(2)];
            bytes[at.index(end)] = new;
        }
        outcome(&bytes, decoding);
        memory_stayed_small();
    }
}
