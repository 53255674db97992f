//! What the doctor says, for people.

use std::fmt::Write;

use serde::Serialize;

use crate::examine::Evidence;
use crate::file::File;
use crate::hypothesis::Cause;
use crate::input::Input;
use crate::machine::{Machine, gigabytes};
use crate::verdict::{Finding, Level, Verdict};

/// All that was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The machine.
    pub machine: Machine,
    /// The model's file.
    pub file: File,
    /// The first picture and the instruction, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<Input>,
    /// The episode, if there is one.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
}

/// What an episode says.
#[derive(Debug, Clone, Serialize)]
pub struct Diagnosis {
    /// What is wrong.
    pub verdict: Verdict,
    /// How likely the demonstration is as it is.
    pub level: Level,
    /// From the best to the worst.
    pub hypotheses: Vec<Finding>,
    /// What was asked for.
    pub instruction: String,
    /// The data set whose statistics were taken.
    pub unnorm_key: String,
    /// The moments that were judged.
    pub moments: Vec<usize>,
}

impl Diagnosis {
    /// That of the evidence.
    pub fn new(evidence: &Evidence) -> Self {
        let (level, hypotheses, verdict) = crate::verdict::decide(evidence);
        Self {
            verdict,
            level,
            hypotheses,
            instruction: evidence.instruction.clone(),
            unnorm_key: evidence.key.clone(),
            moments: evidence.moments.clone(),
        }
    }

    /// The verdict in a sentence, with what to do.
    pub fn sentence(&self) -> String {
        let Verdict { cause, confidence, evidence, fix } = &self.verdict;
        let percent = 100.0 * confidence;
        match (cause, fix) {
            (Cause::None, _) => format!("nothing wrong is found ({percent:.0} %): {evidence}"),
            (Cause::Unknown, _) => format!("no cause is found: {evidence}"),
            (_, Some(fix)) => {
                format!("{} ({percent:.0} %): {fix}\n  since {evidence}", cause.name())
            }
            (_, None) => format!("{} ({percent:.0} %): {evidence}", cause.name()),
        }
    }
}

/// Hypotheses that are shown; JSON has all.
const SHOWN: usize = 10;

impl Report {
    /// As text, the verdict last.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Machine { cpu, kernels, cores_granted, cores, threads, .. } = &self.machine;
        let state = |warnings: &[String]| match warnings.len() {
            0 => "ok".to_owned(),
            1 => "1 warning".to_owned(),
            n => format!("{n} warnings"),
        };
        writeln!(out, "machine: {}", state(&self.machine.warnings))?;
        writeln!(
            out,
            "  {cpu}, {threads} threads on {cores_granted} of {cores} cores, {kernels} kernels"
        )?;
        let free = self.machine.memory_free.map_or("unknown".to_owned(), gigabytes);
        let load = self.machine.load.map_or("unknown".to_owned(), |load| format!("{load:.1}"));
        writeln!(
            out,
            "  weights {}, free {free}; load {load}",
            gigabytes(self.machine.memory_needed)
        )?;
        let hz = self.machine.expected_hz;
        writeln!(
            out,
            "  a copy of {:.1} GB/s and products of {:.0} GFLOP/s allow about {hz:.*} Hz",
            self.machine.copy_bytes_per_s / 1e9,
            self.machine.product_flop_per_s / 1e9,
            if hz < 10.0 { 2 } else { 0 },
        )?;
        list(out, &self.machine.devices)?;
        warn(out, &self.machine.warnings)?;
        let File { name, model, policy, n_checksum, damaged, n_case, datasets, .. } = &self.file;
        writeln!(out, "file: {}", state(&self.file.warnings))?;
        writeln!(out, "  {name}: {model}, an {policy}")?;
        writeln!(
            out,
            "  {} of {n_checksum} checksums are right; {n_case} reference cases, which `openvla-convert verify` runs",
            n_checksum - damaged.len()
        )?;
        writeln!(out, "  data sets: {}", datasets.join(", "))?;
        warn(out, &self.file.warnings)?;
        if let Some(input) = &self.input {
            writeln!(out, "input: {}", state(&input.warnings))?;
            for picture in input.pictures.iter().take(1) {
                writeln!(out, "  {}: {} x {} pixels", picture.file, picture.width, picture.height)?;
            }
            writeln!(out, "  the prompt, {} ids: {:?}", input.n_id, input.prompt)?;
            for (i, number) in input.numbers.iter().enumerate() {
                writeln!(
                    out,
                    "  number {i}: {:>9.5}, probability {:.2}, entropy {:.1} bits",
                    number.value, number.probability, number.entropy_bits
                )?;
            }
            warn(out, &input.warnings)?;
        }
        let Some(diagnosis) = &self.diagnosis else { return Ok(()) };
        writeln!(
            out,
            "demonstration: {} moments, \"{}\"",
            diagnosis.moments.len(),
            diagnosis.instruction
        )?;
        let Level { log_likelihood, expected, .. } = diagnosis.level;
        writeln!(
            out,
            "  an action has {log_likelihood:.2} nats as it is; what the model would draw itself has {expected:.2}"
        )?;
        writeln!(out, "  {:<18} {:<28} {:>8} {:>16}", "hypothesis", "", "nats", "gain")?;
        for finding in diagnosis.hypotheses.iter().take(SHOWN) {
            let Finding { cause, name, log_likelihood, gain, gain_error, .. } = finding;
            let cause = cause.name();
            writeln!(
                out,
                "  {cause:<18} {name:<28} {log_likelihood:>8.2} {gain:>8.2} ± {gain_error:>5.2}"
            )?;
        }
        writeln!(out, "verdict: {}", diagnosis.sentence())
    }
}

fn list(out: &mut String, lines: &[String]) -> std::fmt::Result {
    lines.iter().try_for_each(|line| writeln!(out, "  {line}"))
}

fn warn(out: &mut String, warnings: &[String]) -> std::fmt::Result {
    warnings.iter().try_for_each(|warning| writeln!(out, "  warning: {warning}"))
}
