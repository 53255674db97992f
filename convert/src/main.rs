//! `openvla-convert`: converts OpenVLA checkpoints to GGUF files, and describes and checks those.

mod cli;

use std::process::ExitCode;

use openvla_convert::interrupt::{self, Interrupted};

fn main() -> ExitCode {
    let args: cli::Args = openvla::cli::start();
    let result = interrupt::listen().and_then(|()| cli::run(args));
    let interrupted = result.as_ref().is_err_and(|error| error.is::<Interrupted>());
    let code = openvla::cli::end(result);
    // The code that shells report for a program that SIGINT ended.
    if interrupted { ExitCode::from(130) } else { code }
}
