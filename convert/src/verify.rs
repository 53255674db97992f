//! Checks that a model file, on this machine, acts as its checkpoint does: by every tensor's checksum, and
//! by the reference cases that the converter stored in the file.
//!
//! Each decode step of a case continues the reference's tokens, so that one wrong choice counts once.

use std::path::Path;

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use openvla::{Config, OpenVla, Options, Proof, ProofCase, argmax};
use openvla_kernels::{DType, Gguf, TensorInfo};
use serde::Serialize;

use crate::proof;

/// The result of all checks.
#[derive(Debug, Serialize)]
pub struct Verification {
    /// The file.
    pub file: String,
    /// The number of tensors with a checksum.
    pub n_checksum: usize,
    /// Names of the tensors whose bytes are not those that the converter wrote.
    pub damaged: Vec<String>,
    /// The reference cases.
    pub cases: Vec<CaseReport>,
    /// Quantization alone does not cause larger errors of the logits than this.
    pub logits_error_limit: f64,
    /// Whether all checks passed.
    pub sound: bool,
}

/// The result of one case.
#[derive(Debug, Serialize)]
pub struct CaseReport {
    /// The built-in image's name.
    pub image: String,
    /// The instruction.
    pub instruction: String,
    /// The data set whose units the actions have.
    pub unnorm_key: String,
    /// The checkpoint's tokens in f32.
    pub expected_tokens: Vec<u32>,
    /// This file's tokens.
    pub tokens: Vec<u32>,
    /// The fraction of dimensions with equal tokens.
    pub agreement: f64,
    /// The difference of each dimension in bins, of 256.
    pub bins_off: Vec<u32>,
    /// The difference of each dimension in the data set's units.
    pub action_off: Vec<f64>,
    /// The worst step's relative error of the action tokens' logits: root mean square of the
    /// differences over that of the reference's logits, each step centered on its mean.
    pub logits_error: f64,
}

/// Checks a file on the device that `options` name.
///
/// # Errors
/// If the file cannot be read or run, or holds nothing to check it by.
pub fn verify(path: &Path, options: &Options, progress: &ProgressBar) -> Result<Verification> {
    let file = Gguf::open(path)?;
    let config = Config::read(&file)?;
    let proof = Proof::read(&file, &config)?;
    ensure!(
        !proof.checksums.is_empty() || !proof.cases.is_empty(),
        "{} holds neither checksums nor reference cases; write it again with this version's \
         openvla-convert",
        path.display()
    );
    progress.set_length(file.tensors().iter().map(|tensor| tensor.range.len() as u64).sum());
    let damaged = |(tensor, wanted): (&TensorInfo, &u64)| {
        let bytes = &file.bytes()[tensor.range.clone()];
        progress.inc(bytes.len() as u64);
        (proof::checksum(bytes) != *wanted).then(|| tensor.name.clone())
    };
    let damaged: Vec<String> =
        file.tensors().iter().zip(&proof.checksums).filter_map(damaged).collect();
    let logits_error_limit = limit(&file);
    drop(file); // frees its pages before the model is loaded
    let mut cases = Vec::new();
    if damaged.is_empty() && !proof.cases.is_empty() {
        let mut policy = OpenVla::open(path, options)?;
        let run = proof.cases.iter().map(|case| replay(&mut policy, case));
        cases = run.collect::<Result<Vec<_>>>()?;
    }
    let sound = damaged.is_empty() && cases.iter().all(|c| c.logits_error <= logits_error_limit);
    let n_checksum = proof.checksums.len();
    let file = path.display().to_string();
    Ok(Verification { file, n_checksum, damaged, cases, logits_error_limit, sound })
}

/// The relative error of logits that the file's coarsest type can cause: the worst that
/// `tests/golden.rs` allows on random networks, and far more than a trained model shows.
fn limit(file: &Gguf) -> f64 {
    let of = |dtype: DType| match dtype {
        DType::F32 => 1e-2,
        DType::F16 | DType::BF16 => 5e-2,
        DType::Q8_0 | DType::Q6_K => 3e-1,
        DType::Q5_K => 6e-1,
        _ => 1.0,
    };
    file.tensors().iter().map(|tensor| of(tensor.dtype)).fold(0.0, f64::max)
}

fn replay(policy: &mut OpenVla, case: &ProofCase) -> Result<CaseReport> {
    let image = proof::image(&case.image)?;
    ensure!(
        proof::image_hash(&image) == case.image_hash,
        "this version's image {:?} differs from the one that the file was made with",
        case.image
    );
    let config = policy.config();
    let actions = config.actions;
    let (_, dataset) = config.statistics.select(Some(&case.unnorm_key))?;
    let dataset = dataset.clone();
    let planes = config.preprocess.planes(&image)?;
    let prompt = policy.prompt_ids(&case.instruction)?;
    let network = policy.network();
    let features = network.encode(&planes)?;
    let soft = network.project(&features)?;
    let mut sequence = network.prefill(&prompt, &soft)?;
    let (mut tokens, mut worst) = (Vec::new(), 0.0_f64);
    for (step, (expected, wanted)) in case.tokens.iter().zip(&case.logits).enumerate() {
        let logits = sequence.logits();
        tokens.push(argmax(logits, actions.ids(), step)?);
        worst = worst.max(relative_error(&logits[actions.rows()], wanted));
        if step + 1 < case.tokens.len() {
            sequence.step(*expected)?;
        }
    }
    let action = |tokens: &[u32]| dataset.action.unnormalize(&actions.normalized(tokens));
    let pairs = || tokens.iter().zip(&case.tokens);
    let off =
        action(&tokens).iter().zip(action(&case.tokens)).map(|(a, b)| (a - b).abs()).collect();
    Ok(CaseReport {
        image: case.image.clone(),
        instruction: case.instruction.clone(),
        unnorm_key: case.unnorm_key.clone(),
        agreement: pairs().filter(|(a, b)| a == b).count() as f64 / tokens.len() as f64,
        bins_off: pairs().map(|(a, b)| actions.bin(*a).abs_diff(actions.bin(*b))).collect(),
        expected_tokens: case.tokens.clone(),
        tokens,
        action_off: off,
        logits_error: worst,
    })
}

/// Of logits centered on their mean, since a constant added to all of them changes nothing.
fn relative_error(got: &[f32], wanted: &[f32]) -> f64 {
    let centered = |x: &[f32]| {
        let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / x.len() as f64;
        x.iter().map(|x| f64::from(*x) - mean).collect::<Vec<_>>()
    };
    let (got, wanted) = (centered(got), centered(wanted));
    let wrong: f64 = got.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum();
    (wrong / wanted.iter().map(|x| x.powi(2)).sum::<f64>()).sqrt()
}
