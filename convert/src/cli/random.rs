//! `random`: a model file without a model, to measure with.

use std::num::NonZero;
use std::path::PathBuf;

use anyhow::Result;
use openvla_convert::{Conversion, Options};
use openvla_example::{COMMITTED, Size, Spec};

use super::Type;

/// Writes a model file of random weights, as large as openvla-7b's, without any checkpoint: it acts
/// without meaning, and as slowly as the real one
#[derive(clap::Args)]
pub struct Random {
    #[command(flatten)]
    kind: Type,
    /// How large
    #[arg(long, value_enum, default_value_t = Size::Full)]
    size: Size,
    /// Chooses the weights
    #[arg(long, default_value_t = COMMITTED.seed)]
    seed: u64,
    /// Threads to write with [default: all cores]
    #[arg(short, long)]
    threads: Option<NonZero<u16>>,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub fn run(args: &Random) -> Result<()> {
    let spec = Spec { size: args.size, seed: args.seed, ..COMMITTED };
    let n_threads = args.threads.map_or(Options::default().n_threads, |n| n.get().into());
    let conversion = Conversion::random(&spec, args.kind.encoding()?, n_threads)?;
    eprint!("{}", conversion.summary());
    let progress = super::progress(0)?;
    conversion.write(&args.output, &progress)?;
    progress.finish_and_clear();
    eprintln!("wrote {}", args.output.display());
    Ok(())
}
