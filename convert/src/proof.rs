//! Computes the [proof](openvla::Proof) that a file carries: reference cases, which are what the checkpoint
//! itself computes in f32 on built-in images, and checksums of tensors.

use anyhow::{Context, Result, ensure};
use openvla::image::{RgbImage, imageops};
use openvla::streamed::{self, Case};
use openvla::tokenizer::Tokenizer;
use openvla::{Config, ProofCase};
use openvla_kernels::{Backend, Gguf};
use sha2::{Digest, Sha256};
use twox_hash::XxHash64;

use crate::mapper::MappedTensor;
use crate::plan::PlannedTensor;

/// The images by name, and the instruction for each.
const CASES: [(&str, &str); 2] =
    [("table", "put eggplant into pot"), ("table mirrored", "move the pot to the left")];

/// The example's table. Any image would do; one of a table is closer to what robots see.
const TABLE: &[u8] = include_bytes!("table.png");

/// A built-in image by name.
///
/// # Errors
/// If this version has none of that name.
pub fn image(name: &str) -> Result<RgbImage> {
    let table = openvla::decode(TABLE).context("the built-in image is damaged")?;
    match name {
        "table" => Ok(table),
        "table mirrored" => Ok(imageops::flip_horizontal(&table)),
        _ => anyhow::bail!("this version has no image {name:?}; use the one that wrote the file"),
    }
}

/// SHA-256 of an image's RGB bytes, in hexadecimal.
pub fn image_hash(image: &RgbImage) -> String {
    Sha256::digest(image.as_raw()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// XXH64 of a tensor's bytes, with seed 0: what llama.cpp's `gguf-hash` prints.
pub fn checksum(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// Bytes of tensors that [`run_cases`] asks for: those of layers once per token, the others once.
pub fn bytes_read(config: &Config, plan: &[PlannedTensor]) -> u64 {
    let passes = |name: &str| if name.starts_with("blk.") { n_token(config) } else { 1 };
    let bytes =
        |tensor: &MappedTensor| 4 * tensor.shape.iter().product::<usize>() * passes(&tensor.name);
    plan.iter().map(|planned| bytes(&planned.tensor) as u64).sum()
}

fn n_token(config: &Config) -> usize {
    config.statistics.first().1.action.n()
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
    let (unnorm_key, _) = config.statistics.first();
    let tokenizer = Tokenizer::new(&config.vocabulary)?;
    let images: Vec<RgbImage> = CASES.iter().map(|(name, _)| image(name)).collect::<Result<_>>()?;
    let case = |(image, (_, instruction)): (&RgbImage, &(&str, &str))| {
        let planes = config.preprocess.planes(image)?;
        Ok(Case { planes, ids: config.prompt.ids(&tokenizer, instruction)? })
    };
    let inputs: Vec<Case> = images.iter().zip(&CASES).map(case).collect::<Result<_>>()?;
    let backend = Backend::cpu(n_threads)?;
    let decoded = streamed::decode(config, &backend, &inputs, n_token(config), part)?;
    ensure!(decoded.len() == CASES.len(), "a case is missing");
    let cases =
        CASES.iter().zip(&images).zip(decoded).map(|(((name, instruction), image), decoded)| {
            ProofCase {
                image: (*name).to_owned(),
                image_hash: image_hash(image),
                instruction: (*instruction).to_owned(),
                unnorm_key: unnorm_key.to_owned(),
                tokens: decoded.tokens,
                logits: decoded.logits,
            }
        });
    Ok(cases.collect())
}
