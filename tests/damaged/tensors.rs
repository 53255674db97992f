//! Tensors: each kind missing, misnamed, of another shape or type, and full of NaN.

use std::collections::BTreeSet;

use openvla::Error;
use openvla_example::Variant;
use openvla_kernels::DType;

use crate::model::{Model, Outcome, Tensor, memory_stayed_small, refused, sound};

/// One tensor of each kind: the first block represents all blocks.
fn kinds(model: &Model) -> Vec<&Tensor> {
    let kind = |name: &str| name.split('.').filter(|part| part.parse::<u32>().is_err()).collect();
    let mut seen = BTreeSet::<String>::new();
    model.tensors.iter().filter(|tensor| seen.insert(kind(&tensor.name))).collect()
}

/// The same number of bytes or fewer, as another tensor.
fn retyped(tensor: &mut Tensor, dtype: DType) {
    tensor.dtype = dtype;
    let n = tensor.shape[1..].iter().product::<usize>();
    tensor.data = vec![0; dtype.row_bytes(tensor.shape[0]).unwrap() * n];
}

#[test]
fn every_tensor_is_needed_by_its_own_name_in_its_own_shape() {
    for model in [sound(Variant::OpenVla), sound(Variant::V01)] {
        for Tensor { name, shape, .. } in kinds(model) {
            let mut without = model.clone();
            without.tensors.retain(|tensor| tensor.name != *name);
            refused(&without, &format!("tensor `{name}` is missing"));
            let renamed = model.with_tensor(name, |tensor| tensor.name.push('x'));
            refused(&renamed, &format!("tensor `{name}` is missing"));
            let wrong = format!("tensor `{name}` has shape [");
            let [a, b, c, d] = *shape;
            for other in [[a, b * c * d, 1, 1], [a, 1, b, c * d], [a, b, d, c]] {
                if other != *shape {
                    refused(&model.with_tensor(name, |tensor| tensor.shape = other), &wrong);
                }
            }
            let doubled = model.with_tensor(name, |tensor| {
                tensor.shape[3] *= 2;
                tensor.data = tensor.data.repeat(2);
            });
            refused(&doubled, &wrong);
        }
    }
}

#[test]
fn types_are_exchangeable_only_among_matrices() {
    let model = sound(Variant::OpenVla);
    for Tensor { name, dtype, .. } in kinds(model) {
        for integer in [DType::I32, DType::I64] {
            let ids = model.with_tensor(name, |tensor| retyped(tensor, integer));
            refused(&ids, &format!("tensor `{name}` holds {integer} elements, not weights"));
        }
        for float in [DType::F32, DType::F16, DType::BF16].into_iter().filter(|to| to != dtype) {
            let retyped = model.with_tensor(name, |tensor| retyped(tensor, float));
            if *dtype == DType::F32 {
                refused(&retyped, &format!("tensor `{name}` is {float}; F32 is needed"))
            } else {
                assert!(!matches!(retyped.outcome(), Outcome::Refused(_)), "{name} {float}")
            }
        }
    }
}

/// A motion that depends on a number that is not finite must not be made.
#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let model = sound(Variant::OpenVla);
    for Tensor { name, dtype, .. } in kinds(model) {
        // As a float's or a scale's upper bits: NaN, infinity.
        for special in match dtype {
            DType::F32 | DType::BF16 => [0x7fc0_u16, 0xff80],
            _ => [0x7e00, 0xfc00],
        } {
            for at_end in [false, true] {
                let damaged = model.with_tensor(name, |tensor| {
                    let block = dtype.block_bytes();
                    let block = if at_end { tensor.data.len() - block } else { 0 };
                    let at = match dtype {
                        DType::F32 => 2,
                        DType::Q6_K => 208,
                        _ => 0,
                    };
                    tensor.data[block + at..][..2].copy_from_slice(&special.to_le_bytes());
                });
                refused(&damaged, &format!("tensor `{name}` holds a number that is not finite"));
            }
        }
    }
}

/// Finite weights from which a number overflows on the way: in a tower, the projector, the Llama.
#[test]
fn what_overflows_on_the_way_gives_no_motion() {
    let model = sound(Variant::OpenVla);
    for name in [
        "dinov2.blk.0.ln2.weight",
        "siglip.blk.0.ln1.weight",
        "projector.fc1.bias",
        "blk.0.attn_norm.weight",
        "blk.1.ffn_norm.weight",
    ] {
        let huge = model.with_tensor(name, |tensor| {
            assert_eq!(tensor.dtype, DType::F32, "{name}");
            tensor
                .data
                .chunks_exact_mut(4)
                .for_each(|x| x.copy_from_slice(&3e38_f32.to_le_bytes()));
        });
        let outcome = huge.outcome();
        let not_finite = matches!(
            outcome,
            Outcome::Failed(
                Error::NotFinite { .. } | Error::Kernels(openvla_kernels::Error::NotFinite { .. })
            )
        );
        assert!(not_finite, "{name}: {outcome:?}");
    }
}

#[test]
fn what_belongs_to_no_part_of_the_model_is_refused() {
    let model = sound(Variant::OpenVla);
    let extra = |name: &str| {
        let mut model = model.clone();
        let tensor =
            Tensor { name: name.into(), dtype: DType::F32, shape: [1; 4], data: vec![0; 4] };
        model.tensors.push(tensor);
        model
    };
    for name in ["blk.0.attn_q.bias", "blk.2.attn_q.weight", "dinov2.blk.1.ln1.bias", "action_head"]
    {
        refused(&extra(name), &format!("tensor `{name}` belongs to no part of this model"));
    }
    let none = Model { tensors: Vec::new(), ..model.clone() };
    refused(&none, "it holds no tensors");
    memory_stayed_small();
}
