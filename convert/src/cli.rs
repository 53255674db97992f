//! The program's arguments and commands.

mod convert;
mod example;
mod export;
mod imatrix;
mod inspect;
mod random;
mod verify;

use anyhow::Result;
use clap::{ArgGroup, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use openvla::cli::{CenterCrop, Threads};
use openvla_convert::plan::Encoding;

/// Turns an OpenVLA checkpoint into one self-contained GGUF file.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    convert: Option<convert::Convert>,
    // Not in `Convert`: clap ignores an optional group that has groups of its own.
    #[command(flatten)]
    kind: Type,
    #[command(flatten)]
    oft: convert::OftArgs,
    #[command(flatten)]
    crop: CenterCrop,
    #[command(flatten)]
    threads: Threads,
}

#[derive(Subcommand)]
enum Command {
    Verify(verify::Verify),
    ExportLlama(export::ExportLlama),
    Inspect(inspect::Inspect),
    Imatrix(imatrix::Imatrix),
    Random(random::Random),
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Some(Command::Verify(args)) => verify::run(&args),
        Some(Command::ExportLlama(args)) => export::run(&args),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Imatrix(args)) => imatrix::run(&args),
        Some(Command::Random(args)) => random::run(&args),
        None => {
            let convert = args.convert.expect("clap requires it without a command");
            let mut options = convert.options(&args.oft, args.kind.encoding()?)?;
            options.center_crop = args.crop.choice();
            options.n_threads = args.threads.count();
            convert::run(&convert, &options)
        }
    }
}

/// The type that a file is named after.
#[derive(clap::Args)]
#[command(group(ArgGroup::new("type")))]
struct Type {
    /// 4 bits (Q4_K_M): the default
    #[arg(long, group = "type")]
    q4: bool,
    /// 8 bits (Q8_0)
    #[arg(long, group = "type")]
    q8: bool,
    /// 16 bits, as the checkpoint (BF16)
    #[arg(long, group = "type")]
    bf16: bool,
    /// F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, Q4_0, IQ4_NL or IQ4_XS
    #[arg(long, group = "type", value_name = "TYPE")]
    outtype: Option<Encoding>,
}

impl Type {
    fn encoding(&self) -> Result<Encoding> {
        match self {
            Self { outtype: Some(encoding), .. } => Ok(*encoding),
            Self { q8: true, .. } => "Q8_0".parse(),
            Self { bf16: true, .. } => "BF16".parse(),
            _ => Ok(Encoding::default()),
        }
    }
}

/// A progress bar in bytes; indicatif draws nothing when stderr is not a terminal.
fn progress(bytes: u64) -> Result<ProgressBar> {
    let style =
        "{msg} {bar:40} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    Ok(ProgressBar::new(bytes).with_style(ProgressStyle::with_template(style)?))
}
