//! `verify`: checks that a file, on this machine, acts as its checkpoint does.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use openvla::cli::{DeviceArgs, say, signature};
use openvla_convert::verify::{Choice, Verification, verify};

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
}

pub fn run(args: &Verify) -> Result<()> {
    if let Some(key) = &args.key {
        say(format_args!("signed: {}", signature::check(&args.model, key)?));
    }
    let progress = super::progress(0)?;
    progress.set_message("checksums");
    let report = verify(&args.model, &args.device.options(), &progress)?;
    progress.finish_and_clear();
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(out, "{}", describe(&report))?;
    }
    ensure!(report.damaged.is_empty(), "{} is damaged; write or download it again", report.file);
    ensure!(
        report.sound,
        "{} does not act as its checkpoint: what it computes is off by more than {} of its size",
        report.file,
        report.error_limit
    );
    Ok(())
}

fn describe(report: &Verification) -> String {
    let mut text = String::new();
    let mut line = |words: std::fmt::Arguments<'_>| {
        writeln!(text, "{words}").expect("a string takes anything");
    };
    let Verification { n_checksum, damaged, cases, .. } = report;
    line(format_args!("{} of {n_checksum} tensors are as written", n_checksum - damaged.len()));
    for name in damaged {
        line(format_args!("damaged: {name}"));
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
            case.action_off, case.unnorm_key
        ));
        line(format_args!(
            "  {what}: off by {:.2e} of their size, {:.0e} is possible for such a file",
            case.error, report.error_limit
        ));
    }
    text
}
