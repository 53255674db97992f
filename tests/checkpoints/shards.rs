//! Shards and tensors: missing, cut off, lying about themselves, of other shapes and types.

use std::fs;

use half::bf16;
use openvla_example::Variant;
use safetensors::Dtype;
use serde_json::json;

use crate::folder::{Checkpoint, INDEX, SHARD, shard};

const EMBED: &str = "language_model.model.embed_tokens.weight";
const HEAD: &str = "language_model.lm_head.weight";
const FIRST: &str = "model-00001-of-00003.safetensors";
const SECOND: &str = "model-00002-of-00003.safetensors";

fn sharded() -> Checkpoint {
    Checkpoint::new(Variant::OpenVla, 3)
}

#[test]
fn shards_that_are_missing_or_cut_off_are_named() {
    let missing = sharded();
    missing.remove(SECOND);
    missing.refused(&[SECOND, "is the checkpoint complete?"]);
    let whole = sharded().read(SECOND);
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        let cut = sharded();
        cut.write(SECOND, &whole[..length]);
        cut.refused(&[
            SECOND,
            "is cut off or not a safetensors file; delete it and download it again",
        ]);
    }
    for (bytes, wanted) in [
        ([whole.as_slice(), b"\0"].concat(), "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "git lfs pull"),
    ] {
        let other = sharded();
        other.write(SECOND, &bytes);
        other.refused(&[SECOND, wanted]);
    }
    let folder = sharded();
    folder.remove(SECOND);
    fs::create_dir(folder.path().join(SECOND)).unwrap();
    folder.refused(&[SECOND, "is a folder; a file is needed"]);
}

#[test]
fn an_index_that_is_wrong_is_named() {
    for (place, to, wanted) in [
        (EMBED, "model-00009-of-00003.safetensors", "model-00009-of-00003.safetensors"),
        (
            EMBED,
            "../model.safetensors",
            "names the shard \"../model.safetensors\", which is not a plain file",
        ),
        (EMBED, "/etc/passwd", "not a plain file name"),
        (EMBED, "..", "not a plain file name"),
        (EMBED, "", "not a plain file name"),
        ("new.weight", FIRST, "holds the tensor new.weight, which is in no shard; download"),
    ] {
        let checkpoint = sharded();
        checkpoint.json(INDEX, |index| index["weight_map"][place] = json!(to));
        checkpoint.refused(&[wanted]);
    }
    let twice = sharded();
    twice.write(SECOND, &twice.read(FIRST));
    twice.refused(&["which another shard holds too"]);
    let none = sharded();
    none.json(INDEX, |index| index["weight_map"] = json!({}));
    none.refused(&["lacks the tensor"]);
}

#[test]
fn headers_that_lie_are_refused() {
    let cut_off = "is cut off or not a safetensors file";
    let data = [0_u8; 64];
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        let text =
            format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        shard(&text, &data)
    };
    let most = u64::MAX;
    for bytes in [
        tensor("U8", &format!("[{most}]"), &format!("[0,{most}]")),
        tensor("F64", "[4611686018427387904]", "[0,64]"),
        tensor("BF16", "[2,9223372036854775808]", "[0,64]"),
        tensor("BF16", "[32]", "[64,0]"),
        tensor("BF16", "[32]", &format!("[{most},{most}]")),
        tensor("BF16", "[31]", "[0,64]"),
        tensor("BF16", "[16]", "[0,32]"),
        tensor("BF16", "[64]", "[0,128]"),
        tensor("BF16", "[-32]", "[0,64]"),
        tensor("STRING", "[32]", "[0,64]"),
        shard("", &data),
        shard("[]", &data),
        shard(&"[".repeat(9999), &data),
        [most.to_le_bytes().as_slice(), &data].concat(),
        [(1_u64 << 40).to_le_bytes().as_slice(), &data].concat(),
    ] {
        let checkpoint = Checkpoint::plain();
        checkpoint.write(SHARD, &bytes);
        checkpoint.refused(&[SHARD, cut_off]);
    }
    // Nothing at all, of any number of columns.
    let checkpoint = Checkpoint::plain();
    let name = "vision_backbone.featurizer.blocks.0.mlp.fc1.weight";
    checkpoint.tensors(|tensors| {
        tensors.insert(name.into(), (Dtype::BF16, vec![usize::MAX, 0], vec![]));
    });
    checkpoint.refused(&[SHARD, name, "[18446744073709551615, 0]: nothing"]);
}

#[test]
fn tensors_that_are_missing_or_strange_are_named() {
    for name in [EMBED, HEAD, "projector.fc2.bias", "vision_backbone.featurizer.pos_embed"] {
        let missing = Checkpoint::plain();
        missing.tensors(|tensors| drop(tensors.remove(name)));
        missing.refused(&[&format!("lacks the tensor {name}")]);
        let flat = Checkpoint::plain();
        flat.tensors(|tensors| {
            let (_, shape, data) = tensors.get_mut(name).unwrap();
            (*shape, *data) = (vec![data.len()], data.repeat(2));
        });
        flat.refused(&[name, "has shape ["]);
        for (dtype, of_bf16) in [(Dtype::I64, 4), (Dtype::F64, 4), (Dtype::I16, 1)] {
            let integer = Checkpoint::plain();
            integer.tensors(|tensors| {
                let (found, _, data) = tensors.get_mut(name).unwrap();
                (*found, *data) = (dtype, data.repeat(of_bf16));
            });
            integer.refused(&[SHARD, name, &format!("is {dtype:?}; BF16, F16 and F32 are read")]);
        }
    }
    for name in ["lora.weight", "language_model.model.layers.2.mlp.up_proj.weight"] {
        let extra = Checkpoint::plain();
        extra.tensors(|tensors| {
            tensors.insert(name.into(), (Dtype::BF16, vec![1], vec![0, 0]));
        });
        extra.refused(&[&format!("the tensor {name} belongs to no part of OpenVLA")]);
    }
}

#[test]
fn blocks_are_counted_by_what_is_there() {
    let shallow = Checkpoint::plain();
    let block = "vision_backbone.featurizer.blocks.1.";
    shallow.tensors(|tensors| tensors.retain(|name, _| !name.starts_with(block)));
    shallow.refused(&["vision_backbone.featurizer has 1 blocks; two are the least"]);
    let absurd = Checkpoint::plain();
    let last = format!("vision_backbone.featurizer.blocks.{}.norm1.weight", usize::MAX);
    absurd.tensors(|tensors| {
        tensors.insert(last, (Dtype::BF16, vec![1], vec![0, 0]));
    });
    absurd.refused(&["lacks the tensor vision_backbone.featurizer.blocks.2."]);
}

/// The first, a middle and the last number of a tensor that is rounded and of one that is not.
#[test]
fn numbers_that_are_none_are_refused() {
    for name in [EMBED, "vision_backbone.featurizer.blocks.0.ls1.scale_factor"] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0.0, 0.5, 1.0] {
                let checkpoint = Checkpoint::plain();
                checkpoint.tensors(|tensors| {
                    let data = &mut tensors.get_mut(name).unwrap().2;
                    let at = ((data.len() / 2 - 1) as f64 * place) as usize * 2;
                    data[at..at + 2].copy_from_slice(&bf16::from_f32(bad).to_le_bytes());
                });
                checkpoint.refused(&[&format!("cannot convert {name}: it holds {bad} at [")]);
            }
        }
    }
    // Finite where it was, infinite as the f16 scale of a block.
    let checkpoint = Checkpoint::plain();
    checkpoint.tensors(|tensors| {
        let data = &mut tensors.get_mut(EMBED).unwrap().2;
        data[..2].copy_from_slice(&bf16::from_f32(1e30).to_le_bytes());
    });
    checkpoint.refused(&[EMBED, "at [0, 0] is more than IQ4_NL holds", "--tensor-type"]);
}

/// All of a checkpoint in another type of float: its numbers are the same, so the file is.
#[test]
fn the_type_of_floats_does_not_matter() {
    let plain = Checkpoint::plain().convert().unwrap();
    let wide = Checkpoint::plain();
    wide.tensors(|tensors| {
        for (dtype, _, data) in tensors.values_mut() {
            let wider = |b: &[u8; 2]| bf16::from_le_bytes(*b).to_f32().to_le_bytes();
            (*dtype, *data) = (Dtype::F32, data.as_chunks().0.iter().flat_map(wider).collect());
        }
    });
    assert!(wide.convert().unwrap() == plain);
}

/// The header's order and other entries beside the tensors do not matter.
#[test]
fn metadata_of_a_shard_does_not_matter() {
    let plain = Checkpoint::plain().convert().unwrap();
    let checkpoint = Checkpoint::plain();
    checkpoint.header(|header| header["__metadata__"] = json!({"format": "pt", "by": "hand"}));
    assert!(checkpoint.convert().unwrap() == plain);
}
