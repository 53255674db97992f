//! Arguments of the program, and which command they are for.

mod convert;
mod example;
mod export;
mod imatrix;
mod inspect;
mod verify;

use anyhow::Result;
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

/// Turns an OpenVLA checkpoint into one self-contained GGUF file.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    convert: Option<convert::Convert>,
}

#[derive(Subcommand)]
enum Command {
    Verify(verify::Verify),
    ExportLlama(export::ExportLlama),
    Inspect(inspect::Inspect),
    Imatrix(imatrix::Imatrix),
}

/// Runs what was asked for.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Some(Command::Verify(args)) => verify::run(&args),
        Some(Command::ExportLlama(args)) => export::run(&args),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Imatrix(args)) => imatrix::run(&args),
        None => convert::run(&args.convert.expect("clap asks for it where no command is given")),
    }
}

/// A bar over that many bytes; indicatif draws nothing when stderr is no terminal.
fn progress(bytes: u64) -> Result<ProgressBar> {
    let style =
        "{msg} {bar:40} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    Ok(ProgressBar::new(bytes).with_style(ProgressStyle::with_template(style)?))
}
