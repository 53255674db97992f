//! Damaged checkpoints: refused with a reason that names the file or tensor, and without a trace.
//! Sound ones give the same file whatever way they are cut into shards.

#[path = "../common/content.rs"]
mod content;
mod folder;
mod foreign;
mod mutated;
mod output;
mod settings;
mod shards;

use folder::Checkpoint;
use openvla_example::Variant;

#[test]
fn shards_do_not_matter_and_neither_does_the_time() {
    for variant in [Variant::OpenVla, Variant::V01] {
        let [one, again, five] = [1, 1, 5].map(|n| Checkpoint::new(variant, n).convert().unwrap());
        assert!(one == again, "{variant:?}: two conversions differ");
        assert!(one == five, "{variant:?}: shards change the file");
    }
}
