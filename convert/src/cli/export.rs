//! `export-llama`: the Llama of a model file, for llama.cpp and programs built on it.

use std::path::PathBuf;

use anyhow::Result;
use openvla::cli::{output_file, say};
use openvla_convert::export::Export;

/// Writes the Llama part of a model file as a plain llama.cpp model
#[derive(clap::Args)]
pub struct ExportLlama {
    /// Model file that openvla-convert wrote
    model: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "FILE", value_parser = output_file())]
    output: PathBuf,
}

pub fn run(args: &ExportLlama) -> Result<()> {
    let export = Export::new(&args.model)?;
    let bytes = export.data_bytes();
    say(format_args!("{} tensors of {}", export.n_tensor(), indicatif::BinaryBytes(bytes)));
    let progress = super::progress(bytes)?;
    export.write(&args.output, &progress)?;
    progress.finish_and_clear();
    say(format_args!("wrote {}", args.output.display()));
    Ok(())
}
