//! `random`: a model file of random weights, for benchmarks.

use std::path::PathBuf;

use anyhow::Result;
use openvla::OftConfig;
use openvla::cli::{Threads, output_file, say};
use openvla_convert::Conversion;
use openvla_convert::oft;
use openvla_convert::random::{Size, Spec, Variant};

use super::Type;

/// Writes a model file of random weights, without any checkpoint: as large and as slow as openvla-7b,
/// or with --oft as OpenVLA-OFT's runs for LIBERO, with meaningless actions
#[derive(clap::Args)]
pub struct Random {
    #[command(flatten)]
    kind: Type,
    /// Size of the model
    #[arg(long, value_enum, default_value_t = Size::Full)]
    size: Size,
    /// An OpenVLA-OFT: chunks of 8 actions from several cameras and the arm's state
    #[arg(long)]
    oft: bool,
    /// Cameras of an OpenVLA-OFT
    #[arg(long, value_name = "N", default_value_t = 2, requires = "oft")]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=OftConfig::MAX_CAMERAS as i64))]
    cameras: u8,
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
    let variant =
        if args.oft { Variant::Oft { n_camera: args.cameras.into() } } else { Variant::OpenVla };
    let spec = Spec { variant, size: args.size, seed: args.seed, ..Spec::EXAMPLE };
    let conversion = Conversion::random(&spec, args.kind.encoding()?, args.threads.count())?;
    if let Some(oft) = &conversion.config.oft {
        say(oft::summary(oft));
    }
    say(conversion.summary().trim_end());
    let progress = super::progress(0)?;
    conversion.write(&args.output, &progress)?;
    progress.finish_and_clear();
    say(format_args!("wrote {}", args.output.display()));
    Ok(())
}
