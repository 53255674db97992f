//! Arguments of the program, and which command they are for.

mod convert;
mod imatrix;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
    Imatrix(imatrix::Imatrix),
}

/// Runs what was asked for.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Some(Command::Imatrix(args)) => imatrix::run(&args),
        None => convert::run(&args.convert.expect("clap asks for it where no command is given")),
    }
}
