//! The example checkpoint, built in.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

macro_rules! files {
    ($($name:literal)*) => {
        [$((
            $name,
            include_bytes!(concat!("openvla-tabletop/", $name)).as_slice(),
        )),*]
    };
}

/// The files that are read.
const FILES: [(&str, &[u8]); 9] = files! {
    "added_tokens.json" "config.json" "dataset_statistics.json" "model.safetensors"
    "preprocessor_config.json" "special_tokens_map.json" "tokenizer.json" "tokenizer.model"
    "tokenizer_config.json"
};

/// Writes the checkpoint to a folder in `root`.
pub fn unpack(root: &Path) -> Result<PathBuf> {
    let dir = root.join("openvla-tabletop");
    let failed = || format!("cannot write the example to {}", dir.display());
    std::fs::create_dir(&dir).with_context(failed)?;
    for (name, bytes) in FILES {
        std::fs::write(dir.join(name), bytes).with_context(failed)?;
    }
    Ok(dir)
}
