//! `openvla-convert`: OpenVLA checkpoints to GGUF files, and what there is to know about those.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use openvla_convert::interrupt::{self, Interrupted};

fn main() -> ExitCode {
    let args = cli::Args::parse();
    match interrupt::listen().and_then(|()| cli::run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            // As shells report a program that SIGINT ended.
            if error.is::<Interrupted>() { ExitCode::from(130) } else { ExitCode::FAILURE }
        }
    }
}
