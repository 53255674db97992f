//! A model file: words, or a header whose tensors are in the file and settings that were checked.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla::{Config, Proof};
use openvla_convert::export::Export;
use openvla_convert::inspect::inspect;
use openvla_kernels::Gguf;

static PATH: LazyLock<PathBuf> = LazyLock::new(|| common::folder("gguf", &[]).join("model.gguf"));

fuzz_target!(|bytes: &[u8]| {
    std::fs::write(&*PATH, bytes).expect("memory");
    let Ok(file) = Gguf::open(&PATH) else { return };
    for tensor in file.tensors() {
        assert!(tensor.range.end <= file.bytes().len());
    }
    if let Ok(config) = Config::read(&file) {
        assert!(config.n_patch() > 0 && !config.statistics.datasets().is_empty());
        let _ = Proof::read(&file, &config).map(|proof| proof.damaged(&file, |_| {}));
        let _ = inspect(&PATH).map(|inspection| format!("{inspection:?}"));
        let _ = Export::new(&PATH).map(|export| export.data_bytes());
    }
});
