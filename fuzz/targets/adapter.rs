//! A LoRA adapter in place of a sound one: its settings, statistics or weights any bytes, or some bytes of its weights
//! changed. Words, or a difference for each tensor that it changes.
#![no_main]

mod common;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla_convert::lora::Adapter;
use openvla_convert::tensors::Tensors;
use openvla_example::{Size, Spec, Variant};

const SETTINGS: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The adapter of the reference's cases.
fn sound(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/lora/adapter").join(name)
}

static FOLDER: LazyLock<PathBuf> =
    LazyLock::new(|| common::folder("adapter", &[&sound(SETTINGS), &sound(WEIGHTS)]));

/// The checkpoint that it belongs to.
static BASE: LazyLock<Tensors> = LazyLock::new(|| {
    let folder = common::folder("base", &[]);
    let spec = Spec { variant: Variant::V01, size: Size::Tiny, seed: 21, shards: 1 };
    openvla_example::write(&folder, &spec).expect("a checkpoint");
    let mut base = Tensors::default();
    base.add(&folder.join("model.safetensors")).expect("a checkpoint's tensors");
    Adapter::open(&FOLDER, &base).expect("the adapter as it was");
    base
});

static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| std::fs::read(sound(WEIGHTS)).expect("a file"));

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let base = &*BASE;
    let changed;
    let (name, bytes) = match which % 4 {
        0 => (SETTINGS, bytes),
        1 => ("dataset_statistics.json", bytes),
        2 => (WEIGHTS, bytes),
        _ => {
            changed = common::edited(&SOUND, bytes);
            (WEIGHTS, changed.as_slice())
        }
    };
    common::with_file(&FOLDER.join(name), bytes, || {
        let Ok(adapter) = Adapter::open(&FOLDER, base) else { return };
        for (name, entry) in base.entries() {
            if let Ok(Some(delta)) = adapter.delta(name) {
                let row: usize = entry.shape[1..].iter().product();
                delta.add((entry.shape[0] - 1) * row, &mut vec![0.0; row]);
            }
        }
    });
});
