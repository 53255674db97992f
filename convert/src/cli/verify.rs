//! `verify`: checks that a file, on this machine, acts as its checkpoint does.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use openvla::cli::{DeviceArgs, say, signature};
use openvla_convert::hub::Content;
use openvla_convert::inputs::{self, Checked, Found, Places};
use openvla_convert::verify::{Choice, Verification, verify};
use serde::Serialize;

use super::convert::folder;
use super::inspect::{json_char, printable};

/// Checks a model file: every tensor's checksum, and what it computes on this machine against what
/// the checkpoint computed in f32.
#[derive(clap::Args)]
pub struct Verify {
    /// The model file
    model: PathBuf,
    /// Check first that this public key of minisign, or of this file, signed the model: MODEL.gguf.minisig
    #[arg(long, value_name = "KEY", value_parser = signature::public_key)]
    key: Option<signature::PublicKey>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    source: SourceArgs,
}

/// Where the files are that a model should have been made of.
#[derive(clap::Args)]
#[command(next_help_heading = "Source")]
struct SourceArgs {
    /// Check that the model was made of the files of this checkpoint, byte for byte: a folder or a repository
    #[arg(long, value_name = "CHECKPOINT")]
    source: Option<PathBuf>,
    /// What --base named for the conversion
    #[arg(long, value_name = "CHECKPOINT", requires = "source")]
    base: Option<PathBuf>,
    /// What --lora named for the conversion
    #[arg(long, value_name = "ADAPTER", requires = "source")]
    lora: Option<PathBuf>,
    /// What --statistics named for the conversion
    #[arg(long, value_name = "FILE", requires = "source")]
    statistics: Option<PathBuf>,
    /// What --imatrix named for the conversion
    #[arg(long, value_name = "FILE", requires = "source")]
    imatrix: Option<PathBuf>,
}

impl SourceArgs {
    fn places(&self) -> Result<Option<Places>> {
        let Some(source) = &self.source else { return Ok(None) };
        let content = if self.base.is_some() { Content::Run } else { Content::Checkpoint };
        let fetch = |path: &Option<PathBuf>, content| {
            path.as_deref().map(|path| folder(path, content)).transpose()
        };
        Ok(Some(Places {
            checkpoint: folder(source, content)?,
            base: fetch(&self.base, Content::Checkpoint)?,
            adapter: fetch(&self.lora, Content::Adapter)?,
            statistics: self.statistics.clone(),
            importance: self.imatrix.clone(),
        }))
    }
}

/// Everything that was found.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    verification: Verification,
    /// The files that the model was made of, if that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    source_files: Option<Vec<Checked>>,
}

pub fn run(args: &Verify) -> Result<()> {
    let Verify { model, key, json, device, source } = args;
    if let Some(key) = key {
        say(format_args!("signed: {}", signature::check(model, key)?));
    }
    let options = device.options();
    let progress = super::progress(0)?;
    let source_files = match source.places()? {
        Some(places) => {
            progress.set_message("SHA-256 of the checkpoint");
            Some(inputs::check(model, &places, options.n_threads, &progress)?)
        }
        None => None,
    };
    progress.reset();
    progress.set_message("checksums");
    let verification = verify(model, &options, &progress)?;
    progress.finish_and_clear();
    let report = Report { verification, source_files };
    let text = if *json {
        serde_json::to_string(&report)?.chars().map(json_char).collect::<String>() + "\n"
    } else {
        describe(&report)
    };
    std::io::stdout().write_all(text.as_bytes())?;
    report.check()
}

impl Report {
    /// Whether all is as it should be.
    fn check(&self) -> Result<()> {
        let Verification { file, damaged, sound, error_limit, .. } = &self.verification;
        ensure!(damaged.is_empty(), "{file} is damaged; write or download it again");
        ensure!(
            *sound,
            "{file} does not act as its checkpoint: what it computes is off by more than {error_limit} of its size"
        );
        let checked = self.source_files.iter().flatten();
        let wrong: Vec<_> = checked.filter(|file| file.found != Found::Same).collect();
        let names: Vec<_> = wrong.iter().map(|file| printable(&file.name)).collect();
        ensure!(
            wrong.is_empty(),
            "{file} was not made of these files: {} differ or are missing",
            names.join(", ")
        );
        Ok(())
    }
}

fn describe(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |words: std::fmt::Arguments<'_>| {
        writeln!(text, "{words}").expect("a string takes anything");
    };
    for Checked { name, found } in report.source_files.iter().flatten() {
        let found = match found {
            Found::Same => "same",
            Found::Differs => "differs",
            Found::Missing => "missing",
        };
        line(format_args!("{found:<8}{}", printable(name)));
    }
    let Verification { n_checksum, damaged, cases, error_limit, .. } = &report.verification;
    line(format_args!("{} of {n_checksum} tensors are as written", n_checksum - damaged.len()));
    for name in damaged {
        line(format_args!("damaged: {}", printable(name)));
    }
    if cases.is_empty() && damaged.is_empty() {
        line(format_args!("no reference cases: it was converted with --no-proof"));
    }
    for case in cases {
        let images: Vec<String> = case.images.iter().map(|name| format!("{name:?}")).collect();
        line(format_args!("{:?} on {}", case.instruction, images.join(", ")));
        if let Some(Choice { bins_off, .. }) = &case.choice {
            let (n, most) = (bins_off.len(), bins_off.iter().max().unwrap_or(&0));
            let same = bins_off.iter().filter(|off| **off == 0).count();
            line(format_args!(
                "  tokens: {same} of {n} as in f32, the others off by {most} bins at most"
            ));
        }
        let what = if case.choice.is_some() { "logits" } else { "normalized actions" };
        line(format_args!(
            "  action: off by {:?} in units of {}",
            case.action_off,
            printable(&case.unnorm_key)
        ));
        line(format_args!(
            "  {what}: off by {:.2e} of their size, {error_limit:.0e} is possible for such a file",
            case.error
        ));
    }
    text
}
