//! Damaged model files: refused with a reason that names the key or tensor, or harmless. Never a
//! panic, never ggml's abort, never a giant allocation.

mod keys;
mod model;
mod mutated;
mod tensors;

use model::{Outcome, sound};
use openvla_example::Variant;

#[test]
fn undamaged_models_act() {
    for variant in [Variant::OpenVla, Variant::V01] {
        let outcome = sound(variant).outcome();
        assert!(matches!(outcome, Outcome::Acted), "{outcome:?}");
    }
}
