//! Checks that a model file, on this machine, acts as its checkpoint does: by every tensor's checksum, and
//! by the reference cases that the converter stored in the file.
//!
//! Each decode step of an OpenVLA's case continues the reference's tokens, so that one wrong choice counts once.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use indicatif::ProgressBar;
use openvla::oft::{OpenVlaOft, unnormalize};
use openvla::streamed::Case;
use openvla::tokenizer::Tokenizer;
use openvla::{Config, Expected, OftHead, OpenVla, Options, Policy, Proof, ProofCase};
use openvla_kernels::{DType, Gguf};
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
    /// Quantization alone does not cause larger errors of the cases than this.
    pub error_limit: f64,
    /// Whether all checks passed.
    pub sound: bool,
}

/// The result of one case.
#[derive(Debug, Serialize)]
pub struct CaseReport {
    /// The built-in images' names, one for each camera.
    pub images: Vec<String>,
    /// The instruction.
    pub instruction: String,
    /// The arm's state in the data set's units, if the model reads one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub state: Vec<f32>,
    /// The data set whose units the actions have.
    pub unnorm_key: String,
    /// Of a model that chooses tokens.
    #[serde(flatten)]
    pub choice: Option<Choice>,
    /// The difference of each dimension in the data set's units: the largest one of a chunk.
    pub action_off: Vec<f64>,
    /// The relative error, root mean square of the differences over that of the reference: of the normalized actions
    /// where the head computes those; else of the action tokens' logits at the worst step, each step centered on its
    /// mean.
    pub error: f64,
    /// The largest difference of such a number.
    pub largest_difference: f64,
}

/// The tokens of one case.
#[derive(Debug, Serialize)]
pub struct Choice {
    /// The checkpoint's tokens in f32.
    pub expected_tokens: Vec<u32>,
    /// This file's tokens.
    pub tokens: Vec<u32>,
    /// The fraction of equal tokens.
    pub agreement: f64,
    /// The difference of each token in bins, of 256.
    pub bins_off: Vec<u32>,
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
    let damaged = proof.damaged(&file, |n| progress.inc(n as u64));
    let error_limit = limit(&file);
    drop(file); // frees its pages before the model is loaded
    let is_run = damaged.is_empty() && !proof.cases.is_empty();
    let run = || cases(&config, &proof, &mut Policy::open(path, options)?);
    let cases = if is_run { run()? } else { Vec::new() };
    let sound = damaged.is_empty() && cases.iter().all(|case| case.error <= error_limit);
    let n_checksum = proof.checksums.len();
    let file = path.display().to_string();
    Ok(Verification { file, n_checksum, damaged, cases, error_limit, sound })
}

/// Runs the reference cases of a file on its policy. `config` is what the file says of itself.
///
/// # Errors
/// If a case cannot be run, such as one of a picture that this version has not.
pub fn cases(config: &Config, proof: &Proof, policy: &mut Policy) -> Result<Vec<CaseReport>> {
    let tokenizer = Tokenizer::new(&config.vocabulary)?;
    let run = |case: &ProofCase| {
        let input = proof::input(config, &tokenizer, case)?;
        let output = match policy {
            Policy::OpenVla(policy) => steps(policy, case, &input)?,
            Policy::Oft(policy) => chunk(policy, &input)?,
        };
        compare(config, case, &output)
    };
    proof.cases.iter().map(run).collect()
}

/// The relative error that the file's coarsest type can cause: the worst that `tests/golden.rs` and `tests/oft.rs`
/// allow on random networks, and far more than a trained model shows.
pub fn limit(file: &Gguf) -> f64 {
    let of = |dtype: DType| match dtype {
        DType::F32 => 1e-2,
        DType::F16 | DType::BF16 => 5e-2,
        DType::Q8_0 | DType::Q6_K => 3e-1,
        DType::Q5_K => 6e-1,
        _ => 1.0,
    };
    file.tensors().iter().map(|tensor| of(tensor.dtype)).fold(0.0, f64::max)
}

/// What a model computes of a case, as [`Expected`] has it.
type Output = Vec<Vec<f32>>;

/// Logits of the action ids, by step. Each step continues the expected tokens.
fn steps(policy: &mut OpenVla, case: &ProofCase, input: &Case) -> Result<Output> {
    let Expected::Tokens { tokens, .. } = &case.expected else {
        bail!("its reference cases are another model's");
    };
    let rows = policy.config().actions.rows();
    let network = policy.network();
    let features = network.encode(&input.planes)?;
    let soft = network.project(&features)?;
    let mut sequence = network.prefill(&input.ids, &soft)?;
    let mut output = vec![sequence.logits()[rows.clone()].to_vec()];
    for token in &tokens[..tokens.len() - 1] {
        output.push(sequence.step(*token)?[rows.clone()].to_vec());
    }
    Ok(output)
}

/// Normalized actions, or logits of the action ids by token.
fn chunk(policy: &mut OpenVlaOft, input: &Case) -> Result<Output> {
    let (config, oft) = (policy.config(), policy.oft());
    let (n_vocab, rows) = (config.llama.n_vocab, config.actions.rows());
    let is_l1 = oft.head == OftHead::L1;
    let network = policy.network();
    let features = network.encode(&input.planes, &input.ids)?;
    let soft = network.project(&features)?;
    let hidden = network.forward(&input.ids, &soft, &input.state)?;
    let output = network.actions(&hidden)?;
    if is_l1 {
        return Ok(vec![output]);
    }
    Ok(output.chunks(n_vocab).map(|logits| logits[rows.clone()].to_vec()).collect())
}

fn compare(config: &Config, case: &ProofCase, output: &Output) -> Result<CaseReport> {
    let (choice, normalized, errors) = match &case.expected {
        Expected::Actions(wanted) => {
            let [got, wanted] = [&output[0], wanted].map(|x| as_f64(x));
            let errors = Errors::of(&got, &wanted);
            (None, [got, wanted], errors)
        }
        Expected::Tokens { tokens: wanted, logits } => {
            let steps = output.iter().zip(logits);
            let of_step = |(got, wanted): (&Vec<f32>, &Vec<f32>)| {
                Errors::of(&centered(&as_f64(got)), &centered(&as_f64(wanted)))
            };
            let errors = steps.map(of_step).fold(Errors::default(), Errors::worse);
            let choice = choice(config, wanted, output)?;
            let normalized =
                [&choice.tokens, wanted].map(|tokens| config.actions.normalized(tokens));
            (Some(choice), normalized, errors)
        }
    };
    let (_, dataset) = config.statistics.select(Some(&case.unnorm_key))?;
    let n_action = config.oft.as_ref().map_or(normalized[0].len(), |oft| oft.n_action);
    let [got, wanted] = normalized.each_ref().map(|all| {
        all.chunks(n_action).map(|action| match &config.oft {
            Some(oft) => unnormalize(&dataset.action, oft.head, action),
            None => dataset.action.unnormalize(action),
        })
    });
    let mut action_off = vec![0.0; n_action];
    for (got, wanted) in got.zip(wanted) {
        for ((off, got), wanted) in action_off.iter_mut().zip(got).zip(wanted) {
            *off = (got - wanted).abs().max(*off);
        }
    }
    Ok(CaseReport {
        images: case.images.clone(),
        instruction: case.instruction.clone(),
        state: case.state.clone(),
        unnorm_key: case.unnorm_key.clone(),
        choice,
        action_off,
        error: errors.relative,
        largest_difference: errors.largest,
    })
}

fn choice(config: &Config, wanted: &[u32], logits: &Output) -> Result<Choice> {
    let actions = config.actions;
    let tokens = actions.best(logits)?;
    let pairs = || tokens.iter().zip(wanted);
    Ok(Choice {
        expected_tokens: wanted.to_vec(),
        agreement: pairs().filter(|(a, b)| a == b).count() as f64 / tokens.len() as f64,
        bins_off: pairs().map(|(a, b)| actions.bin(*a).abs_diff(actions.bin(*b))).collect(),
        tokens,
    })
}

fn as_f64(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|x| f64::from(*x)).collect()
}

/// Less their mean: a constant added to all logits changes nothing.
fn centered(logits: &[f64]) -> Vec<f64> {
    let mean = logits.iter().sum::<f64>() / logits.len() as f64;
    logits.iter().map(|x| x - mean).collect()
}

/// How far numbers are from those that are wanted: see [`CaseReport`].
#[derive(Default)]
struct Errors {
    relative: f64,
    largest: f64,
}

impl Errors {
    fn of(got: &[f64], wanted: &[f64]) -> Self {
        let differences = || got.iter().zip(wanted).map(|(a, b)| (a - b).abs());
        let wrong: f64 = differences().map(|x| x.powi(2)).sum();
        let relative = (wrong / wanted.iter().map(|x| x.powi(2)).sum::<f64>()).sqrt();
        Self { relative, largest: differences().fold(0.0, f64::max) }
    }

    fn worse(self, other: Self) -> Self {
        let (relative, largest) =
            (self.relative.max(other.relative), self.largest.max(other.largest));
        Self { relative, largest }
    }
}
