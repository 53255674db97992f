//! One of a checkpoint's files in place of the example's: words, or settings and weights.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla_convert::checkpoint::CheckpointInfo;
use openvla_convert::{Conversion, Options, checkpoint::StatisticsText};

const FILES: [&str; 4] =
    ["config.json", "preprocessor_config.json", "dataset_statistics.json", "model.safetensors"];

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = common::example("openvla-example");
    let files = folder.read_dir().expect("an example").map(|entry| entry.expect("a file").path());
    let files: Vec<PathBuf> = files.collect();
    common::folder("checkpoint", &files.iter().map(PathBuf::as_path).collect::<Vec<_>>())
});

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let name = FILES[usize::from(*which) % FILES.len()];
    common::with_file(&FOLDER.join(name), bytes, || {
        if let Ok(info) = CheckpointInfo::open(&FOLDER) {
            let _ = info.config.check();
            let _ = StatisticsText::of(&info);
        }
        if let Ok(conversion) = Conversion::new(&FOLDER, &Options::default()) {
            assert!(conversion.data_bytes() > 0 && !conversion.plan.is_empty());
        }
    });
});
