//! What a measurement gives: one object, written as JSON and read again.

use std::cmp::Reverse;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::machine::{Limits, Machine, Origin};
use crate::work::Work;

/// The version of [`Results`]: another number if a field changes its meaning or goes.
pub const VERSION: u32 = 1;

/// One measurement of one model file on one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`VERSION`].
    pub version: u32,
    /// With which program, when and where.
    #[serde(flatten)]
    pub origin: Origin,
    /// What.
    pub model: Model,
    /// Opening the file and the first step, with the file's pages dropped before.
    pub load_cold: Load,
    /// The same with the file in memory.
    pub load_warm: Load,
    /// Control steps that were measured; all gave the same tokens.
    pub repetitions: usize,
    /// In order, then the whole step, then the whole step drafted where there are drafts.
    pub stages: Vec<Stage>,
    /// Passes of the Llama in a drafted step, on average; 7 without drafts. Null for an OpenVLA-OFT, whose step is one.
    pub drafted_passes: Option<f64>,
    /// Where the device's memory goes.
    pub memory: Vec<Memory>,
    /// The most that the process had until the last step, mapped files among it. Null where it is not known.
    pub peak_bytes: Option<u64>,
    /// What the machine reaches without a model.
    pub limits: Limits,
}

/// A model file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// "OpenVLA 7B v1.0".
    pub name: String,
    /// "Q4_K_M"; null if this version has no name for it.
    pub r#type: Option<String>,
    /// Of the file.
    pub bytes: u64,
    /// Of the model, padding included.
    pub parameters: u64,
    /// Of an OpenVLA-OFT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<Chunks>,
}

/// What an OpenVLA-OFT sees and gives in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunks {
    /// Cameras.
    pub cameras: usize,
    /// Actions of a chunk.
    pub actions: usize,
}

/// How long it takes until a model acts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Opening the file.
    pub open_ms: f64,
    /// The first step.
    pub first_step_ms: f64,
    /// Bytes that came from a disk meanwhile. Null where it is not known.
    pub disk_bytes: Option<u64>,
}

/// One stage of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// `preprocess`, `vision`, `projector`, then `prefill`, `decode_token`, `decode`, or of an OpenVLA-OFT `forward` and
    /// `head`; `step`, `drafted_step`.
    pub name: String,
    /// Rows that it computes: patches, prompt rows, tokens. Null where there are none.
    pub rows: Option<usize>,
    /// Milliseconds.
    pub ms: Summary,
    /// What it has to do; zeros where that is not computed.
    pub work: Work,
}

/// Bytes of one component on the device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// `weights: vision`, `CUDA0: between operations`, …
    pub component: String,
    /// How many.
    pub bytes: u64,
}

/// What many samples come to. Percentiles are samples: of fewer than a hundred, `p99` is the largest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Summary {
    pub n: usize,
    pub min: f64,
    pub p50: f64,
    pub mean: f64,
    pub p99: f64,
    pub max: f64,
}

impl Summary {
    /// Of one sample or more.
    ///
    /// # Panics
    /// Without any.
    pub fn new(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let n = sorted.len();
        // By nearest rank.
        let percentile = |p: usize| sorted[(p * n).div_ceil(100).clamp(1, n) - 1];
        Self {
            n,
            min: sorted[0],
            p50: percentile(50),
            mean: sorted.iter().sum::<f64>() / n as f64,
            p99: percentile(99),
            max: sorted[n - 1],
        }
    }
}

impl Stage {
    /// Per second, at the median.
    pub fn hz(&self) -> f64 {
        1e3 / self.ms.p50
    }

    /// Bytes per second, at the median.
    pub fn bytes_per_s(&self) -> f64 {
        self.work.bytes as f64 * self.hz()
    }

    /// Operations per second, at the median.
    pub fn flop_per_s(&self) -> f64 {
        self.work.flop as f64 * self.hz()
    }
}

impl Results {
    /// The stage of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn stage(&self, name: &str) -> Result<&Stage> {
        let found = self.stages.iter().find(|stage| stage.name == name);
        found.with_context(|| format!("the measurement lacks the stage {name}"))
    }

    /// Reads result files, each of one object, in the order of their machines and types: the larger
    /// files first.
    ///
    /// # Errors
    /// If none is named, or which one is missing, damaged or of another version.
    pub fn read_all(files: &[impl AsRef<Path>]) -> Result<Vec<Self>> {
        ensure!(
            !files.is_empty(),
            "no result files were named; `openvla-bench -o json > results/NAME.json` writes one"
        );
        let mut all: Vec<Self> =
            files.iter().map(|file| Self::read(file.as_ref())).collect::<Result<_>>()?;
        all.sort_by_key(|r| (r.machine_label(), Reverse(r.model.bytes)));
        Ok(all)
    }

    /// Reads one result file.
    ///
    /// # Errors
    /// If it is missing, damaged or of another version.
    pub fn read(file: &Path) -> Result<Self> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let name = file.display();
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
        let damaged = || format!("{name} is not a result of openvla-bench; measure again");
        let Versioned { version } = serde_json::from_str(&text).with_context(damaged)?;
        if version != VERSION {
            bail!(
                "{name} is a result of version {version}, and this openvla-bench reads {VERSION}; \
                 measure again, or use the one that wrote it"
            );
        }
        let results: Self = serde_json::from_str(&text).with_context(damaged)?;
        results.check().with_context(damaged)?;
        Ok(results)
    }

    /// Holds what the tables and pictures rely on.
    fn check(&self) -> Result<()> {
        let of_kind: &[&str] = match self.model.chunks {
            Some(_) => &["forward", "head"],
            None => &["prefill", "decode_token", "decode"],
        };
        for name in ["preprocess", "vision", "projector", "step"].iter().chain(of_kind) {
            let stage = self.stage(name)?;
            ensure!(
                stage.ms.p50 > 0.0 && stage.ms.p50.is_finite(),
                "{name} took {} ms",
                stage.ms.p50
            );
        }
        Ok(())
    }

    /// The device and what computes on it, for people.
    pub fn machine_label(&self) -> String {
        let Machine { device, cpu, threads, kernels, .. } = &self.origin.machine;
        if device != "CPU" {
            return device.to_owned();
        }
        let kernels = if kernels.is_empty() { String::new() } else { format!(", {kernels}") };
        let s = if *threads == 1 { "" } else { "s" };
        format!("{cpu}, {threads} thread{s}{kernels}")
    }

    /// The file's type, for people.
    pub fn type_name(&self) -> &str {
        self.model.r#type.as_deref().unwrap_or("unknown")
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn percentiles_are_samples_by_nearest_rank() {
        let few = Summary::new(&[3.0, 1.0, 2.0, 5.0]);
        assert_eq!((few.min, few.p50, few.p99, few.max), (1.0, 2.0, 5.0, 5.0));
        assert_eq!((few.n, few.mean), (4, 2.75));
        let many: Vec<f64> = (1..=200).map(f64::from).collect();
        let many = Summary::new(&many);
        assert_eq!((many.p50, many.p99, many.max), (100.0, 198.0, 200.0));
        assert_eq!(Summary::new(&[7.0]).p50, 7.0);
    }
}
