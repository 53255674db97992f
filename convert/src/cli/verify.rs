//! `verify`: checks that a file, on this machine, acts as its checkpoint does, and writes and checks certificates.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use openvla::cli::{self, DeviceArgs, output_file, say, signature};
use openvla_convert::certificate::{Certificate, ModelFile};
use openvla_convert::hub::Content;
use openvla_convert::inputs::{self, Checked, Found, Places};
use openvla_convert::interrupt;
use openvla_convert::sha256;
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
    /// Check first that this public key of minisign, or of this file, signed the model: MODEL.gguf.minisig; with
    /// --check-certificate, that it signed the certificate, which names the model's SHA-256: FILE.minisig
    #[arg(long, value_name = "KEY", value_parser = signature::public_key)]
    key: Option<signature::PublicKey>,
    /// If all checks pass, write what was found to this file, to be signed and handed on with the model
    #[arg(long, value_name = "FILE", value_parser = output_file())]
    #[arg(conflicts_with = "check_certificate")]
    certificate: Option<PathBuf>,
    /// Check that this certificate is of this very file, and that this machine computes what it says
    #[arg(long, value_name = "FILE")]
    check_certificate: Option<PathBuf>,
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
    /// What is other than a certificate says, if there is one and all other checks pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate_differences: Option<Vec<String>>,
}

pub fn run(args: &Verify) -> Result<()> {
    let Verify { model, key, certificate, check_certificate, json, device, source } = args;
    if let Some(key) = key {
        let signed = check_certificate.as_ref().unwrap_or(model);
        say(format_args!("signed: {}", signature::check(signed, key)?));
    }
    let given = check_certificate.as_deref().map(|file| open_certificate(file, model));
    let given = given.transpose()?;
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
    let here = match (&given, certificate) {
        _ if !verification.sound => None,
        (None, None) => None,
        (Some(given), _) => Some(given.model.sha256.clone()),
        (None, Some(_)) => Some(hash(model)?),
    };
    let here = here.map(|sha256| Certificate::new(model, sha256, &verification, &options));
    let here = here.transpose()?;
    let differences =
        given.as_ref().zip(here.as_ref()).map(|(given, here)| given.differences(here));
    let report = Report { verification, source_files, certificate_differences: differences };
    let text = if *json {
        serde_json::to_string(&report)?.chars().map(json_char).collect::<String>() + "\n"
    } else {
        describe(&report)
    };
    std::io::stdout().write_all(text.as_bytes())?;
    report.check()?;
    if let (Some(out), Some(here)) = (certificate, here) {
        cli::write(out, here.to_json())?;
        say(format_args!("wrote {}", out.display()));
    }
    Ok(())
}

/// Reads a certificate, and checks that it is of this very file before anything of that is read.
fn open_certificate(file: &Path, model: &Path) -> Result<Certificate> {
    let certificate = Certificate::read(file)?;
    let ModelFile { file: theirs, sha256: wanted, .. } = &certificate.model;
    let found = hash(model)?;
    ensure!(
        *wanted == found,
        "{} is a certificate of another file: of {theirs:?}, whose SHA-256 is {wanted:?}; that of {} is {found}",
        file.display(),
        model.display()
    );
    Ok(certificate)
}

fn hash(model: &Path) -> Result<String> {
    let progress = super::progress(model.metadata().map_or(0, |found| found.len()))?;
    progress.set_message("SHA-256 of the model");
    let hash = sha256::of_file(model, |n| {
        progress.inc(n as u64);
        Ok(interrupt::check()?)
    });
    progress.finish_and_clear();
    hash
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
        let differences = self.certificate_differences.as_deref().unwrap_or_default();
        ensure!(
            differences.is_empty(),
            "this machine does not compute what the certificate says, in {} places",
            differences.len()
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
    match report.certificate_differences.as_deref() {
        Some([]) => line(format_args!("all as in the certificate")),
        Some(differences) => {
            differences
                .iter()
                .for_each(|what| line(format_args!("not as in the certificate: {what}")));
        }
        None => {}
    }
    text
}
