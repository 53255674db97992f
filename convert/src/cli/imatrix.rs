//! `imatrix`: collects an importance matrix from a model, images and instructions.

use std::path::PathBuf;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use openvla::Options;
use openvla::cli::{Threads, output_file, say};
use openvla_convert::imatrix::collect::{Collector, Sources};

/// Collects an importance matrix for --imatrix, which makes files of 4 and 5 bits more accurate
///
/// Runs the model on images and instructions like those it is for, and writes how large the inputs of
/// each matrix were, by column, in llama.cpp's format. A few dozen different prompts are enough. The
/// activations of a whole prompt are kept in memory meanwhile.
#[derive(clap::Args)]
pub struct Imatrix {
    /// Model file of any type, preferably F32 or BF16
    model: PathBuf,
    /// Folder of PNG, JPEG, WebP or BMP images, in the order of their names, f2 before f10
    #[arg(long, value_name = "FOLDER")]
    images: PathBuf,
    /// OpenVLA-OFT: folder of a wrist camera's images, as many; one for each, in the order that the model was trained with
    /// (left, right)
    #[arg(long, value_name = "FOLDER")]
    wrist: Vec<PathBuf>,
    /// OpenVLA-OFT: text file with the arm's state at each image, a JSON list on each line
    #[arg(long, value_name = "FILE")]
    states: Option<PathBuf>,
    /// Text file with an instruction on each line; the first is for the first image, and so on; the
    /// shorter of the two lists is repeated
    #[arg(long, value_name = "FILE")]
    instructions: PathBuf,
    #[command(flatten)]
    threads: Threads,
    /// File to write
    #[arg(short, long, value_name = "FILE", value_parser = output_file())]
    output: PathBuf,
}

pub fn run(args: &Imatrix) -> Result<()> {
    let mut options = Options::default();
    options.n_threads = args.threads.count();
    let sources = Sources {
        images: args.images.clone(),
        wrists: args.wrist.clone(),
        states: args.states.clone(),
        instructions: args.instructions.clone(),
    };
    let collector = Collector::new(&args.model, &sources, options)?;
    let n = collector.n_prompt();
    // indicatif draws nothing when stderr is not a terminal.
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} prompts, {eta} left")?;
    let progress = ProgressBar::new(n as u64).with_style(style);
    progress.tick(); // the first prompt of a large model takes minutes
    let n_matrix = collector.write(&args.output, &progress)?;
    progress.finish_and_clear();
    let out = args.output.display();
    say(format_args!("wrote {out}: {n_matrix} matrices, from {n} prompts"));
    Ok(())
}
