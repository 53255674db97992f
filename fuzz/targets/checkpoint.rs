//! One of a checkpoint's files in place of the example's: words, or settings, statistics and a vocabulary.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla::Statistics;
use openvla_convert::checkpoint::CheckpointInfo;
use openvla_convert::lora::Adapter;
use openvla_convert::tensors::Tensors;
use openvla_convert::tokenizer;

const FILES: [&str; 7] = [
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "dataset_statistics.json",
    "adapter_config.json",
    "model.safetensors",
];

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let small = FILES.map(|name| common::example("openvla-example").join(name));
    let small: Vec<_> = small.iter().filter(|path| path.is_file()).map(PathBuf::as_path).collect();
    common::folder(&small)
});

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let name = FILES[usize::from(*which) % FILES.len()];
    let path = FOLDER.join(name);
    let before = std::fs::read(&path).ok();
    std::fs::write(&path, bytes).expect("memory");
    let _ = CheckpointInfo::open(&FOLDER).map(|info| info.config.check());
    match name {
        "tokenizer.json" | "tokenizer.model" => {
            if let Ok(vocabulary) = tokenizer::read(&FOLDER, 768) {
                assert_eq!(vocabulary.tokens.len(), 768);
            }
        }
        "dataset_statistics.json" => {
            if let Ok(text) = std::str::from_utf8(bytes) {
                let _ = Statistics::parse(text.to_owned());
            }
        }
        "model.safetensors" => {
            let mut tensors = Tensors::default();
            if tensors.add(&path).is_ok() {
                for name in tensors.entries().keys() {
                    let _ = tensors.matrix(name);
                }
            }
        }
        "adapter_config.json" => drop(Adapter::open(&FOLDER, &Tensors::default())),
        _ => {}
    }
    match before {
        Some(before) => std::fs::write(&path, before).expect("memory"),
        None => std::fs::remove_file(&path).expect("memory"),
    }
});
