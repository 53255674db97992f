//! Reference cases: what the checkpoint itself does, in f32, on pictures that the program carries.

use anyhow::{Context, Result, ensure};
use openvla::image::{RgbImage, imageops};
use openvla::streamed::{self, Case};
use openvla::tokenizer::Tokenizer;
use openvla::{Config, ProofCase};
use openvla_kernels::{Backend, Gguf};
use sha2::{Digest, Sha256};
use twox_hash::XxHash64;

use crate::names::Part;
use crate::plan::Planned;

/// The pictures by name, and what the robot is asked on each.
const CASES: [(&str, &str); 2] =
    [("table", "put eggplant into pot"), ("table mirrored", "move the pot to the left")];

/// The example's table; any picture would do, but one of a table says more about robots.
const TABLE: &[u8] = include_bytes!("../../example/table.png");

/// A picture by name.
///
/// # Errors
/// If this version carries none of that name.
pub fn picture(name: &str) -> Result<RgbImage> {
    let table = openvla::decode(TABLE).context("the program's own picture is damaged")?;
    match name {
        "table" => Ok(table),
        "table mirrored" => Ok(imageops::flip_horizontal(&table)),
        _ => anyhow::bail!("this version carries no picture {name:?}; use the one that wrote it"),
    }
}

/// SHA-256 of a picture's RGB bytes, in hexadecimal.
pub fn hash(picture: &RgbImage) -> String {
    Sha256::digest(picture.as_raw()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// XXH64 of a tensor's bytes, with seed 0: what llama.cpp's `gguf-hash` prints.
pub fn checksum(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// Bytes of the parts that [`cases`] asks for: the layers once per token, the rest once.
pub fn bytes(config: &Config, plan: &[Planned]) -> u64 {
    let sweeps = |name: &str| if name.starts_with("blk.") { n_token(config) } else { 1 };
    let bytes = |part: &Part| 4 * part.shape.iter().product::<usize>() * sweeps(&part.name);
    plan.iter().map(|planned| bytes(&planned.part) as u64).sum()
}

fn n_token(config: &Config) -> usize {
    config.statistics.first().1.action.n()
}

/// Runs the cases part by part. `part` gives the model's tensors with a prefix, in F32.
///
/// # Errors
/// What `part` says, or if the checkpoint computes numbers that are not finite.
pub fn cases(
    config: &Config,
    n_threads: usize,
    part: impl FnMut(&str) -> Result<Gguf>,
) -> Result<Vec<ProofCase>> {
    let (unnorm_key, _) = config.statistics.first();
    let tokenizer = Tokenizer::new(&config.vocabulary)?;
    let pictures: Vec<RgbImage> =
        CASES.iter().map(|(name, _)| picture(name)).collect::<Result<_>>()?;
    let case = |(picture, (_, instruction)): (&RgbImage, &(&str, &str))| {
        let planes = config.preprocess.planes(picture)?;
        Ok(Case { planes, ids: config.prompt.ids(&tokenizer, instruction)? })
    };
    let inputs: Vec<Case> = pictures.iter().zip(&CASES).map(case).collect::<Result<_>>()?;
    let backend = Backend::cpu(n_threads)?;
    let decoded = streamed::decode(config, &backend, &inputs, n_token(config), part)?;
    ensure!(decoded.len() == CASES.len(), "a case is missing");
    let proven = CASES.iter().zip(&pictures).zip(decoded).map(
        |(((image, instruction), picture), decoded)| ProofCase {
            image: (*image).to_owned(),
            image_hash: hash(picture),
            instruction: (*instruction).to_owned(),
            unnorm_key: unnorm_key.to_owned(),
            tokens: decoded.tokens,
            logits: decoded.logits,
        },
    );
    Ok(proven.collect())
}
