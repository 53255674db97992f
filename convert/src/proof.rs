//! Computes the [proof](openvla::Proof) that a file carries: reference cases, which are what the checkpoint
//! itself computes in f32 on built-in images, and checksums of tensors.

use anyhow::{Context, Result, ensure};
use openvla::image::{RgbImage, imageops};
use openvla::oft::{self, normalized_state};
use openvla::streamed::{self, Case};
use openvla::tokenizer::Tokenizer;
use openvla::{Config, Dataset, Expected, OftHead, ProofCase, Scale};
use openvla_kernels::{Backend, Gguf};
use sha2::{Digest, Sha256};

use crate::mapper::MappedTensor;
use crate::plan::PlannedTensor;
use crate::sha256;

/// What the robot is asked, case by case.
const INSTRUCTIONS: [&str; 2] = ["put eggplant into pot", "move the pot to the left"];

/// The built-in images: a table in all ways to turn it. Camera `j` of case `i` sees number `i + j`, so no two cameras
/// see the same.
const IMAGES: [&str; 8] = [
    "table",
    "table mirrored",
    "table turned",
    "table upside down",
    "table turned back",
    "table flipped",
    "table mirrored and turned",
    "table mirrored and turned back",
];

/// The example's table. Any image would do; one of a table is closer to what robots see.
const TABLE: &[u8] = include_bytes!("table.png");

/// A built-in image by name.
///
/// # Errors
/// If this version has none of that name.
pub fn image(name: &str) -> Result<RgbImage> {
    let table = openvla::decode(TABLE).context("the built-in image is damaged")?;
    let mirrored = || imageops::flip_horizontal(&table);
    Ok(match name {
        "table mirrored" => mirrored(),
        "table turned" => imageops::rotate90(&table),
        "table upside down" => imageops::rotate180(&table),
        "table turned back" => imageops::rotate270(&table),
        "table flipped" => imageops::flip_vertical(&table),
        "table mirrored and turned" => imageops::rotate90(&mirrored()),
        "table mirrored and turned back" => imageops::rotate270(&mirrored()),
        "table" => table,
        _ => anyhow::bail!("this version has no image {name:?}; use the one that wrote the file"),
    })
}

/// SHA-256 of an image's RGB bytes, in hexadecimal.
pub fn image_hash(image: &RgbImage) -> String {
    sha256::hex(&Sha256::digest(image.as_raw()))
}

/// Bytes of tensors that [`run_cases`] asks for: those of layers once per pass, the others once.
pub fn bytes_read(config: &Config, plan: &[PlannedTensor]) -> u64 {
    let n_pass = if config.oft.is_some() { 1 } else { n_token(config) };
    let passes = |name: &str| if name.starts_with("blk.") { n_pass } else { 1 };
    let bytes =
        |tensor: &MappedTensor| 4 * tensor.shape.iter().product::<usize>() * passes(&tensor.name);
    plan.iter().map(|planned| bytes(&planned.tensor) as u64).sum()
}

/// An upper bound of the cases' size in a file.
pub fn bytes_written(config: &Config) -> usize {
    const WORDS: usize = 1 << 12; // of a case
    INSTRUCTIONS.len() * (WORDS + 4 * n_token(config) * (1 + config.actions.n_bin as usize))
}

/// Tokens of a case, or numbers of a head that computes those.
fn n_token(config: &Config) -> usize {
    let n_dimension = || config.statistics.first().1.action.n();
    config.oft.as_ref().map_or_else(n_dimension, |oft| oft.n_slot())
}

/// Runs the cases one layer at a time. `part` returns the model's tensors with a prefix, in F32.
///
/// # Errors
/// An error of `part`, or if the checkpoint computes numbers that are not finite.
pub fn run_cases(
    config: &Config,
    n_threads: usize,
    part: impl FnMut(&str) -> Result<Gguf>,
) -> Result<Vec<ProofCase>> {
    let backend = Backend::cpu(n_threads)?;
    let tokenizer = Tokenizer::new(&config.vocabulary)?;
    let mut cases =
        (0..INSTRUCTIONS.len()).map(|i| asked(config, i)).collect::<Result<Vec<_>>>()?;
    let inputs: Vec<Case> =
        cases.iter().map(|case| input(config, &tokenizer, case)).collect::<Result<_>>()?;
    let expected: Vec<Expected> = if config.oft.is_some() {
        let outputs = oft::streamed::outputs(config, &backend, &inputs, part)?;
        outputs.into_iter().map(|output| expected_chunk(config, output)).collect::<Result<_>>()?
    } else {
        let decoded = streamed::decode(config, &backend, &inputs, n_token(config), part)?;
        let expected =
            |case: streamed::Decoded| Expected::Tokens { tokens: case.tokens, logits: case.logits };
        decoded.into_iter().map(expected).collect()
    };
    ensure!(expected.len() == cases.len(), "a case is missing");
    cases.iter_mut().zip(expected).for_each(|(case, expected)| case.expected = expected);
    Ok(cases)
}

/// Case `i`, of which nothing is expected yet.
fn asked(config: &Config, i: usize) -> Result<ProofCase> {
    let n_camera = config.oft.as_ref().map_or(1, |oft| oft.cameras.len());
    let (unnorm_key, Dataset { state, .. }) = config.statistics.first();
    let images: Vec<String> =
        (0..n_camera).map(|j| IMAGES[(i + j) % IMAGES.len()].to_owned()).collect();
    let hash = |name: &String| Ok(image_hash(&image(name)?));
    Ok(ProofCase {
        image_hashes: images.iter().map(hash).collect::<Result<_>>()?,
        images,
        instruction: INSTRUCTIONS[i].to_owned(),
        state: state.as_ref().map(|scale| some_state(scale, i)).unwrap_or_default(),
        unnorm_key: unnorm_key.to_owned(),
        expected: Expected::Actions(Vec::new()),
    })
}

/// A state within a data set's bounds, with other shares of each dimension and in each case.
fn some_state(scale: &Scale, case: usize) -> Vec<f32> {
    const STEP: f64 = 0.618; // the golden ratio's digits scatter best
    let number = |(i, [low, high]): (usize, [f64; 2])| {
        let share = (0.2 + STEP * (i + case) as f64).fract();
        (low + share * (high - low)).clamp(f32::MIN.into(), f32::MAX.into()) as f32
    };
    scale.ranges().into_iter().enumerate().map(number).collect()
}

/// What the networks see of a case.
///
/// # Errors
/// If this version has not its images, or what the file has of them is not of this config.
pub fn input(config: &Config, tokenizer: &Tokenizer, case: &ProofCase) -> Result<Case> {
    let mut planes = Vec::new();
    for (name, hash) in case.images.iter().zip(&case.image_hashes) {
        let image = image(name)?;
        ensure!(
            image_hash(&image) == *hash,
            "this version's image {name:?} differs from the one that the file was made with"
        );
        planes.extend(config.preprocess.planes(&image)?);
    }
    let (_, dataset) = config.statistics.select(Some(&case.unnorm_key))?;
    let state: Vec<f64> = case.state.iter().map(|x| f64::from(*x)).collect();
    let state = normalized_state(Some(&state), dataset.state.as_ref())?;
    let state = state.iter().map(|x| *x as f32).collect();
    Ok(Case { planes, ids: config.prompt.ids(tokenizer, &case.instruction)?, state })
}

/// What a head's output means.
fn expected_chunk(config: &Config, output: Vec<f32>) -> Result<Expected> {
    if config.oft.as_ref().is_some_and(|oft| oft.head == OftHead::L1) {
        ensure!(output.iter().all(|x| x.is_finite()), "it computes actions that are not finite");
        return Ok(Expected::Actions(output));
    }
    let n_bin = config.actions.n_bin as usize;
    let logits: Vec<Vec<f32>> = output.chunks(n_bin).map(<[f32]>::to_vec).collect();
    Ok(Expected::Tokens { tokens: config.actions.best(&logits)?, logits })
}
