//! Certificates: what a model file computed on a machine where all checks passed, to be signed, handed on with the
//! file, and held against what other machines compute.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use openvla::{Config, Options, Source, SourceFile};
use openvla_kernels::Gguf;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files;
use crate::verify::{CaseReport, Verification};

/// What `format` says.
const FORMAT: &str = "openvla-certificate";
/// What `version` says.
const VERSION: u64 = 1;
/// Certificates are shorter: some kilobytes.
const MAX_BYTES: u64 = 1 << 20;

/// The relative error that other kernels and devices may add to a certificate's: what `tests/golden.rs` allows BF16, since
/// kernels differ in whether they round activations to the weights' type. Measured between the sets of kernels of one CPU,
/// over both trained examples and the random one, in nine types: at most 3.7e-2, at Q6_K.
pub const OTHER_KERNELS: f64 = 5e-2;

/// A certificate. Its JSON has these names in this order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// "openvla-certificate"
    format: String,
    /// 1
    version: u64,
    /// The file that it is of.
    pub model: ModelFile,
    /// Version of the `openvla-convert` that wrote the file, if the file says.
    pub converter: Option<String>,
    /// Version of the `openvla-convert` that checked it.
    pub checker: String,
    /// What the file was converted from, as it says.
    pub source: Source,
    /// The files that it was converted from, as it says.
    pub source_files: Vec<SourceFile>,
    /// Where it was checked.
    pub machine: Machine,
    /// When: RFC 3339, in UTC.
    pub date: String,
    /// Tensors whose bytes had the checksums of the file.
    pub n_checksum: usize,
    /// The reference cases.
    pub cases: Vec<Case>,
}

/// A model file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelFile {
    /// The model's name: "OpenVLA 7B v1.0".
    pub name: String,
    /// The file's name, without its folder.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

/// A machine, and how it computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name for itself.
    pub cpu: String,
    /// The GPUs that were used, or "CPU".
    pub devices: Vec<String>,
    /// The kernels that ran: see [`openvla::Kernels`]. Those of GPUs are ggml's.
    pub kernels: String,
    /// CPU threads.
    pub n_threads: usize,
}

/// What was asked in a reference case, and what the file computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// See [`CaseReport::images`].
    pub images: Vec<String>,
    /// The instruction.
    pub instruction: String,
    /// See [`CaseReport::state`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub state: Vec<f32>,
    /// See [`CaseReport::unnorm_key`].
    pub unnorm_key: String,
    /// The file's tokens, of a model that chooses tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<u32>>,
    /// See [`CaseReport::error`].
    pub error: f64,
    /// See [`CaseReport::largest_difference`].
    pub largest_difference: f64,
}

impl Certificate {
    /// Of a model file with that SHA-256, which passed all checks here.
    ///
    /// # Errors
    /// If the file has no reference cases, or cannot be read any more.
    pub fn new(
        model: &Path,
        sha256: String,
        report: &Verification,
        options: &Options,
    ) -> Result<Self> {
        ensure!(report.sound, "{} did not pass all checks", model.display());
        ensure!(
            !report.cases.is_empty(),
            "{} has no reference cases, so there is nothing to certify; convert it again without --no-proof",
            model.display()
        );
        let file = Gguf::open(model)?;
        let general = Config::read(&file)?.general;
        Ok(Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            model: ModelFile {
                name: general.name,
                file: model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                bytes: file.bytes().len() as u64,
                sha256,
            },
            converter: general.converter_version,
            checker: env!("CARGO_PKG_VERSION").to_owned(),
            source: general.source,
            source_files: SourceFile::read_all(&file)?,
            machine: Machine::here(options)?,
            date: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            n_checksum: report.n_checksum,
            cases: report.cases.iter().map(Case::from).collect(),
        })
    }

    /// Its JSON.
    ///
    /// # Panics
    /// Never: all its keys are strings.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("keys are strings") + "\n"
    }

    /// Reads a file.
    ///
    /// # Errors
    /// Says why it is not a certificate of this version.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let mut bytes = Vec::new();
        let read = files::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        read.with_context(|| format!("cannot read {shown}"))?;
        ensure!(
            bytes.len() as u64 <= MAX_BYTES,
            "{shown} has more than {MAX_BYTES} bytes, and certificates are shorter"
        );
        let not_one = || format!("{shown} is not a certificate of `openvla-convert verify`");
        let json: Value = serde_json::from_slice(&bytes).with_context(not_one)?;
        let version = json["version"].as_u64().filter(|_| json["format"] == FORMAT);
        let version = version.with_context(not_one)?;
        ensure!(
            version == VERSION,
            "{shown} is a certificate of version {version}; this openvla-convert reads version {VERSION}"
        );
        serde_path_to_error::deserialize(json)
            .with_context(|| format!("the certificate {shown} is incomplete or damaged"))
    }

    /// What the same file has or computes `here` other than this certificate says, in words.
    pub fn differences(&self, here: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let stated = [
            ("name", self.model.name == here.model.name),
            ("size", self.model.bytes == here.model.bytes),
            ("SHA-256", self.model.sha256 == here.model.sha256),
            ("converter", self.converter == here.converter),
            ("source", self.source == here.source),
            ("source files", self.source_files == here.source_files),
            ("number of checksums", self.n_checksum == here.n_checksum),
            ("number of reference cases", self.cases.len() == here.cases.len()),
        ];
        for (what, _) in stated.iter().filter(|(_, is_same)| !is_same) {
            found.push(format!(
                "the model's {what}: the certificate does not say what the file says"
            ));
        }
        for (case, here) in self.cases.iter().zip(&here.cases) {
            let of_case = case.differences(here).into_iter();
            found.extend(of_case.map(|what| format!("{:?}: {what}", here.instruction)));
        }
        found
    }
}

impl Machine {
    fn here(options: &Options) -> Result<Self> {
        let gpus = options.devices.gpus()?;
        let cpu_kernels = options.kernels.resolve();
        let (devices, kernels) = match (&gpus[..], options.n_gpu_layers) {
            ([], _) => (vec!["CPU".to_owned()], cpu_kernels.to_string()),
            (gpus, layers) => {
                let names = gpus.iter().map(|gpu| format!("{} ({})", gpu.name, gpu.description));
                let rest = layers.map(|n| format!(" for {n} layers, {cpu_kernels} for the others"));
                (names.collect(), format!("ggml{}", rest.unwrap_or_default()))
            }
        };
        Ok(Self { cpu: openvla::cli::processor(), devices, kernels, n_threads: options.n_threads })
    }
}

impl From<&CaseReport> for Case {
    fn from(report: &CaseReport) -> Self {
        Self {
            images: report.images.clone(),
            instruction: report.instruction.clone(),
            state: report.state.clone(),
            unnorm_key: report.unnorm_key.clone(),
            tokens: report.choice.as_ref().map(|choice| choice.tokens.clone()),
            error: report.error,
            largest_difference: report.largest_difference,
        }
    }
}

impl Case {
    fn differences(&self, here: &Self) -> Vec<String> {
        let asked = |case: &Self| {
            let Self { images, instruction, state, unnorm_key, .. } = case.clone();
            (images, instruction, state, unnorm_key)
        };
        if asked(self) != asked(here) {
            return vec!["the certificate has another case in its place".to_owned()];
        }
        let mut found = Vec::new();
        let [theirs, ours] = [self, here].map(|case| case.tokens.as_deref().unwrap_or_default());
        if theirs.len() != ours.len() {
            found.push(format!("{} tokens, the certificate has {}", ours.len(), theirs.len()));
        }
        for (i, (theirs, ours)) in theirs.iter().zip(ours).enumerate().filter(|(_, (a, b))| a != b)
        {
            found.push(format!("token {} is {ours}, in the certificate {theirs}", i + 1));
        }
        if here.error > self.error + OTHER_KERNELS {
            found.push(format!(
                "off by {:.2e} of the numbers' size, in the certificate by {:.2e}; other kernels explain {OTHER_KERNELS:.0e} more",
                here.error, self.error
            ));
        }
        found
    }
}
