//! Writes `openvla-example/` and `table.png`: without arguments, the committed ones of this folder.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use openvla_example::{COMMITTED, Spec, Variant, table_png, write};

/// Write the example checkpoint and its picture.
#[derive(Parser)]
struct Args {
    /// Folder that gets `openvla-example/` and `table.png`.
    #[arg(default_value = env!("CARGO_MANIFEST_DIR"))]
    folder: PathBuf,
    /// Which checkpoint to imitate.
    #[arg(long, value_enum, default_value_t = COMMITTED.variant)]
    variant: Variant,
    /// Chooses the weights.
    #[arg(long, default_value_t = COMMITTED.seed)]
    seed: u64,
    /// Number of safetensors files.
    #[arg(long, default_value_t = COMMITTED.shards)]
    shards: usize,
}

fn main() -> Result<()> {
    let Args { folder, variant, seed, shards } = Args::parse();
    let checkpoint = folder.join("openvla-example");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    write(&checkpoint, &Spec { variant, seed, shards })?;
    let picture = folder.join("table.png");
    fs::write(&picture, table_png()?).with_context(|| format!("cannot write {}", picture.display()))
}
