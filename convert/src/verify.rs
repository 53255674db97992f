//! Whether a model file, on this machine, acts as its checkpoint does: every tensor's checksum,
//! and the reference cases that the converter put into the file.
//!
//! Each step of a case is given the reference's tokens so far, so that one wrong choice counts
//! once.

use std::path::Path;

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use openvla::{Config, OpenVla, Options, Proof, ProofCase, argmax};
use openvla_kernels::{DType, Gguf, TensorInfo};
use serde::Serialize;

use crate::prove;

/// What was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The file.
    pub file: String,
    /// Tensors that were held against their checksums.
    pub n_checksum: usize,
    /// Those whose bytes are not what the converter wrote.
    pub damaged: Vec<String>,
    /// The reference cases.
    pub cases: Vec<CaseReport>,
    /// Larger errors of logits than this are not quantisation's.
    pub logits_error_limit: f64,
    /// Whether everything that could be checked is as it should be.
    pub sound: bool,
}

/// What came of one case.
#[derive(Debug, Serialize)]
pub struct CaseReport {
    /// Which picture.
    pub image: String,
    /// What the robot was asked.
    pub instruction: String,
    /// The units of the actions.
    pub unnorm_key: String,
    /// What the checkpoint chooses in f32.
    pub expected_tokens: Vec<u32>,
    /// What this file chooses.
    pub tokens: Vec<u32>,
    /// Of the dimensions, how many are the same.
    pub agreement: f64,
    /// How many bins of 256 each dimension is off.
    pub bins_off: Vec<u32>,
    /// How far each dimension is off, in the data set's units.
    pub action_off: Vec<f64>,
    /// Root mean square of the difference of the action ids' logits, over that of the reference's,
    /// each step's logits around their own mean; the worst step.
    pub logits_error: f64,
}

/// Checks a file on the device that `options` name.
///
/// # Errors
/// If the file cannot be read or run, or says nothing to hold it against.
pub fn verify(path: &Path, options: &Options, progress: &ProgressBar) -> Result<Report> {
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
        (prove::checksum(bytes) != *wanted).then(|| tensor.name.clone())
    };
    let damaged: Vec<String> =
        file.tensors().iter().zip(&proof.checksums).filter_map(damaged).collect();
    let logits_error_limit = limit(&file);
    drop(file); // gives its pages back before the model takes them
    let mut cases = Vec::new();
    if damaged.is_empty() && !proof.cases.is_empty() {
        let mut policy = OpenVla::open(path, options)?;
        let run = proof.cases.iter().map(|case| replay(&mut policy, case));
        cases = run.collect::<Result<Vec<_>>>()?;
    }
    let sound = damaged.is_empty() && cases.iter().all(|c| c.logits_error <= logits_error_limit);
    let n_checksum = proof.checksums.len();
    let file = path.display().to_string();
    Ok(Report { file, n_checksum, damaged, cases, logits_error_limit, sound })
}

/// What the coarsest type of a matrix can do to logits: the worst that `tests/golden.rs` allows on
/// random networks, and far more than happens to a trained model.
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
    let picture = prove::picture(&case.image)?;
    ensure!(
        prove::hash(&picture) == case.image_hash,
        "this version's picture {:?} is another than the one the file was made with",
        case.image
    );
    let config = policy.config();
    let actions = config.actions;
    let (_, dataset) = config.statistics.select(Some(&case.unnorm_key))?;
    let dataset = dataset.clone();
    let planes = config.preprocess.planes(&picture)?;
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
    let motion = |tokens: &[u32]| dataset.action.unnormalize(&actions.normalized(tokens));
    let pairs = || tokens.iter().zip(&case.tokens);
    let off =
        motion(&tokens).iter().zip(motion(&case.tokens)).map(|(a, b)| (a - b).abs()).collect();
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

/// Of logits around their mean, since what is added to all of them changes nothing.
fn relative_error(got: &[f32], wanted: &[f32]) -> f64 {
    let centred = |x: &[f32]| {
        let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / x.len() as f64;
        x.iter().map(|x| f64::from(*x) - mean).collect::<Vec<_>>()
    };
    let (got, wanted) = (centred(got), centred(wanted));
    let wrong: f64 = got.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum();
    (wrong / wanted.iter().map(|x| x.powi(2)).sum::<f64>()).sqrt()
}
