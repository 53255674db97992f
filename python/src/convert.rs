//! `convert`, on a thread of its own, so that Ctrl-C is heard.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use openvla_convert::hub::{self, Content};
use openvla_convert::oft::RunOptions;
use openvla_convert::{Conversion, Options, interrupt};
use pyo3::prelude::*;

use crate::errors::{failure, input, thread_count};

/// How often Python is asked whether it was interrupted.
const PATIENCE: Duration = Duration::from_millis(20);

/// Turns a checkpoint into one GGUF file.
#[pyfunction]
#[pyo3(signature = (checkpoint, output=None, *, r#type="Q4_K_M", lora=None, base=None, platform=None, imatrix=None, proof=true, threads=None))]
#[expect(clippy::too_many_arguments, reason = "all but two are named")]
pub fn convert(
    py: Python<'_>,
    checkpoint: PathBuf,
    output: Option<PathBuf>,
    r#type: &str,
    lora: Option<PathBuf>,
    base: Option<PathBuf>,
    platform: Option<&str>,
    imatrix: Option<PathBuf>,
    proof: bool,
    threads: Option<usize>,
) -> PyResult<PathBuf> {
    let mut options = Options { importance: imatrix, proof, ..Options::default() };
    options.encoding = r#type.parse().map_err(|why| input(py, &format!("type: {why}"), None))?;
    if let Some(n) = thread_count(py, threads)? {
        options.n_threads = n;
    }
    if let Some(name) = platform {
        let platform = name.parse().map_err(|why| input(py, &format!("platform: {why}"), None))?;
        options.run = RunOptions { platform: Some(platform), ..RunOptions::default() };
    }
    let worker = std::thread::spawn(move || run(&checkpoint, output, lora, base, options));
    let mut interrupted = None;
    while !worker.is_finished() {
        py.detach(|| std::thread::sleep(PATIENCE));
        if let Err(signal) = py.check_signals() {
            interrupt::request();
            interrupted = Some(signal);
        }
    }
    let done = worker.join();
    if let Some(signal) = interrupted {
        interrupt::forget();
        return Err(signal);
    }
    let done = done.map_err(|_| failure(py, "the conversion failed", None))?;
    done.map_err(|error| failure(py, &format!("{error:#}"), None))
}

fn run(
    checkpoint: &Path,
    output: Option<PathBuf>,
    lora: Option<PathBuf>,
    base: Option<PathBuf>,
    mut options: Options,
) -> Result<PathBuf> {
    options.adapter = lora.map(|lora| hub::locate(&lora, Content::Adapter)).transpose()?;
    options.base = base.map(|base| hub::locate(&base, Content::Checkpoint)).transpose()?;
    let content = if options.base.is_some() { Content::Run } else { Content::Checkpoint };
    let conversion = Conversion::new(&hub::locate(checkpoint, content)?, &options)?;
    for warning in &conversion.warnings {
        openvla::cli::say(format_args!("warning: {warning}"));
    }
    let out = output.unwrap_or_else(|| conversion.file_name());
    // indicatif draws nothing when stderr is not a terminal.
    let style = "{bar:40} {binary_bytes} of {binary_total_bytes}, {eta} left";
    let progress = ProgressBar::new(0).with_style(ProgressStyle::with_template(style)?);
    conversion.write(&out, &progress)?;
    progress.finish_and_clear();
    Ok(out)
}
