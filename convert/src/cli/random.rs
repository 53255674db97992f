//! `random`: a model file of random weights, for benchmarks.

use std::path::PathBuf;

use anyhow::Result;
use openvla::cli::{Threads, output_file, say};
use openvla_convert::Conversion;
use openvla_convert::random::{Size, Spec};

use super::Type;

/// Writes a model file of random weights, without any checkpoint: as large and as slow as openvla-7b,
/// with meaningless actions
#[derive(clap::Args)]
pub struct Random {
    #[command(flatten)]
    kind: Type,
    /// Size of the model
    #[arg(long, value_enum, default_value_t = Size::Full)]
    size: Size,
    /// Seed of the weights
    #[arg(long, default_value_t = Spec::EXAMPLE.seed)]
    seed: u64,
    #[command(flatten)]
    threads: Threads,
    /// File to write
    #[arg(short, long, value_name = "FILE", value_parser = output_file())]
    output: PathBuf,
}

pub fn run(args: &Random) -> Result<()> {
    let spec = Spec { size: args.size, seed: args.seed, ..Spec::EXAMPLE };
    let conversion = Conversion::random(&spec, args.kind.encoding()?, args.threads.count())?;
    say(conversion.summary().trim_end());
    let progress = super::progress(0)?;
    conversion.write(&args.output, &progress)?;
    progress.finish_and_clear();
    say(format_args!("wrote {}", args.output.display()));
    Ok(())
}
