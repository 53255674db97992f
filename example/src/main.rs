//! Writes a checkpoint and `table.png`: without arguments, the committed ones of this folder.

use std::fmt::Display;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use openvla_example::{COMMITTED, Size, Spec, Variant, table_png, write_with_progress};

/// Write the example checkpoint and its picture.
#[derive(Parser)]
struct Args {
    /// Folder that gets table.png and openvla-example/, or openvla-7b/ at full size
    #[arg(default_value = env!("CARGO_MANIFEST_DIR"))]
    folder: PathBuf,
    /// Which checkpoint to imitate
    #[arg(long, value_enum, default_value_t = COMMITTED.variant)]
    variant: Variant,
    /// How large
    #[arg(long, value_enum, default_value_t = COMMITTED.size)]
    size: Size,
    /// Chooses the weights
    #[arg(long, default_value_t = COMMITTED.seed)]
    seed: u64,
    /// Number of safetensors files; at full size 3
    #[arg(long, default_value_t = COMMITTED.shards, default_value_if("size", "full", "3"))]
    shards: usize,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(Args { folder, variant, size, seed, shards }: Args) -> Result<()> {
    let spec = Spec { variant, size, seed, shards };
    let checkpoint = folder.join(spec.folder());
    // indicatif draws nothing when stderr is not a terminal.
    let style = "{bar:40} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let progress = ProgressBar::no_length().with_style(ProgressStyle::with_template(style)?);
    write_with_progress(&checkpoint, &spec, &progress)?;
    progress.finish_and_clear();
    let picture = folder.join("table.png");
    fs::write(&picture, table_png()?)
        .with_context(|| format!("cannot write {}", picture.display()))?;
    say(format_args!("wrote {} and {}", checkpoint.display(), picture.display()));
    Ok(())
}

/// Unlike `eprintln!`, it does not panic where stderr cannot be written to.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
