//! What a soak found: how often what was answered, what the server took, and which promises were broken.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::soak::server::Sample;
use crate::soak::target::Target;

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    pub command: String,
    pub version: &'static str,
    /// Seconds since 1970 when it began.
    pub began: u64,
    pub cpu: String,
    pub cores: usize,
    pub minutes: f64,
    pub clients: usize,
    /// Answers, by protocol or trick and by what was answered.
    pub outcomes: BTreeMap<String, BTreeMap<String, u64>>,
    /// How servers ended that were asked to.
    pub ends: Vec<String>,
    /// Before the load, without a client.
    pub before: Option<Sample>,
    pub samples: Vec<Sample>,
    /// After it, without a client.
    pub after: Option<Sample>,
    /// Promises that were broken: how often, and how at first.
    pub broken: BTreeMap<&'static str, (u64, String)>,
}

/// Memory may grow by this share between a run's second quarter and its last, and by so many bytes: a sample is of a
/// moment, in which more or fewer pictures are being decoded.
const GROWTH: f64 = 0.05;
const BYTES: u64 = 8 << 20;

/// Lines of the table: after so many minutes, as far as the run goes.
const TABLE: [f64; 4] = [1.0, 10.0, 30.0, 60.0];

impl Report {
    /// Holds what the server took against what it may.
    pub fn check_growth(&self, target: &Target) {
        let n = self.samples.len() / 4;
        if n > 0 {
            let median = |samples: &[Sample]| {
                let mut bytes: Vec<_> = samples.iter().map(|s| s.resident_bytes).collect();
                bytes.sort_unstable();
                bytes[bytes.len() / 2]
            };
            let early = median(&self.samples[n..2 * n]);
            let late = median(&self.samples[self.samples.len() - n..]);
            if late > early + BYTES.max((early as f64 * GROWTH) as u64) {
                let how = format!("{early} bytes in the second quarter, {late} in the last");
                target.broke("memory does not grow", how);
            }
        }
        let (Some(before), Some(after)) = (self.before, self.after) else { return };
        for (what, before, after) in [
            ("descriptors are given back", before.descriptors as u64, after.descriptors as u64),
            ("threads are given back", before.threads, after.threads),
        ] {
            if after > before {
                target.broke(what, format!("{before} before the load, {after} after it"));
            }
        }
    }

    /// Prints it.
    ///
    /// # Errors
    /// If a promise was broken.
    pub fn end(&self, as_json: bool) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if as_json {
            writeln!(out, "{}", serde_json::to_string(self)?)?;
        } else {
            self.print(&mut out)?;
        }
        if let Some((promise, (n, how))) = self.broken.iter().next() {
            let others = match self.broken.len() - 1 {
                0 => String::new(),
                others => format!("; {others} more in the report"),
            };
            bail!("broken {n} times: {promise}; first, {how}{others}");
        }
        Ok(())
    }

    fn print(&self, out: &mut impl Write) -> Result<()> {
        for (who, outcomes) in &self.outcomes {
            let outcomes: Vec<_> = outcomes.iter().map(|(what, n)| format!("{n} {what}")).collect();
            writeln!(out, "{who:<28} {}", outcomes.join(", "))?;
        }
        self.ends.iter().try_for_each(|end| writeln!(out, "{end}"))?;
        let line = |out: &mut dyn Write, when: &str, sample: &Sample| {
            let megabytes = sample.resident_bytes as f64 / 1e6;
            let Sample { descriptors, threads, load, .. } = sample;
            writeln!(
                out,
                "{when:<10} {megabytes:>6.1} MB {descriptors:>5} descriptors {threads:>4} threads, load {load:.1}"
            )
        };
        self.before.iter().try_for_each(|sample| line(out, "before", sample))?;
        for minutes in TABLE {
            if let Some(sample) = self.samples.iter().find(|sample| sample.minutes >= minutes) {
                line(out, &format!("{minutes:.0} min"), sample)?;
            }
        }
        self.samples.last().iter().try_for_each(|sample| line(out, "the last", sample))?;
        self.after.iter().try_for_each(|sample| line(out, "after", sample))?;
        Ok(())
    }
}
