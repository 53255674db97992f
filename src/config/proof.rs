//! What a model file says about how it should act: reference cases, computed in f32 from the
//! checkpoint before it was quantized, and a checksum of every tensor.
//!
//! A case is a picture that the project carries, known by its hash, and an instruction. Its
//! tokens were decoded greedily among the action ids.

use openvla_kernels::{Gguf, Header, Value};

use super::Config;
use crate::{Error, Result};

/// Everything a file can be held against.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Proof {
    /// Reference cases.
    pub cases: Vec<ProofCase>,
    /// XXH64, with seed 0, of every tensor's bytes, in the file's order: what llama.cpp's
    /// `gguf-hash` prints.
    pub checksums: Vec<u64>,
}

/// One reference case.
#[derive(Debug, Clone, PartialEq)]
pub struct ProofCase {
    /// Which picture of the project's.
    pub image: String,
    /// SHA-256 of its RGB bytes, in hexadecimal.
    pub image_hash: String,
    /// What the robot is asked.
    pub instruction: String,
    /// The data set whose motions have as many dimensions.
    pub unnorm_key: String,
    /// The tokens to be chosen.
    pub tokens: Vec<u32>,
    /// Logits of the action ids, by step.
    pub logits: Vec<Vec<f32>>,
}

const IMAGES: &str = "openvla.proof.images";
const HASHES: &str = "openvla.proof.image_sha256";
const INSTRUCTIONS: &str = "openvla.proof.instructions";
const UNNORM_KEYS: &str = "openvla.proof.unnorm_keys";
const TOKENS: &str = "openvla.proof.tokens";
const LOGITS: &str = "openvla.proof.logits";
const CHECKSUMS: &str = "openvla.checksum.xxh64";

impl Proof {
    /// Reads what a file has of it: older files have nothing.
    ///
    /// # Errors
    /// [`Error::Model`] if its lists do not fit together, [`Error::Kernels`] if a key is missing.
    pub fn read(file: &Gguf, config: &Config) -> Result<Self> {
        let cases = if file.metadata().contains_key(IMAGES) {
            read_cases(file, config)?
        } else {
            Vec::new()
        };
        let checksums: Vec<String> = if file.metadata().contains_key(CHECKSUMS) {
            file.get(CHECKSUMS)?
        } else {
            return Ok(Self { cases, checksums: Vec::new() });
        };
        let read = |text: &String| u64::from_str_radix(text, 16).ok();
        let read: Option<Vec<u64>> = checksums.iter().map(read).collect();
        let checksums = read.filter(|read| read.len() == file.tensors().len());
        let checksums = checksums.ok_or_else(|| Error::Model {
            why: format!("`{CHECKSUMS}` is not a checksum for each of its tensors"),
        })?;
        Ok(Self { cases, checksums })
    }

    /// Adds all keys to the header of a file to be written. However the checksums turn out, the
    /// header is as long.
    pub fn write(&self, to: &mut Header) {
        if !self.cases.is_empty() {
            let mut list = |key: &str, of: fn(&ProofCase) -> &String| {
                to.set(key, self.cases.iter().map(|case| of(case).clone()).collect::<Vec<_>>());
            };
            list(IMAGES, |case| &case.image);
            list(HASHES, |case| &case.image_hash);
            list(INSTRUCTIONS, |case| &case.instruction);
            list(UNNORM_KEYS, |case| &case.unnorm_key);
            let tokens = self.cases.iter().flat_map(|case| &case.tokens);
            to.set(TOKENS, tokens.map(|id| *id as i32).collect::<Vec<_>>());
            let logits = self.cases.iter().flat_map(|case| case.logits.iter().flatten());
            to.set(LOGITS, logits.copied().collect::<Vec<f32>>());
        }
        let checksums: Vec<String> = self.checksums.iter().map(|x| format!("{x:016x}")).collect();
        to.set(CHECKSUMS, Value::from(checksums));
    }
}

fn read_cases(file: &Gguf, config: &Config) -> Result<Vec<ProofCase>> {
    let wrong = |key: &str, n| Error::Model { why: format!("`{key}` has {n} elements") };
    let images: Vec<String> = file.get(IMAGES)?;
    let strings = |key: &str| {
        let list: Vec<String> = file.get(key)?;
        if list.len() == images.len() { Ok(list) } else { Err(wrong(key, list.len())) }
    };
    let (hashes, instructions, keys) =
        (strings(HASHES)?, strings(INSTRUCTIONS)?, strings(UNNORM_KEYS)?);
    let (tokens, logits): (Vec<i32>, Vec<f32>) = (file.get(TOKENS)?, file.get(LOGITS)?);
    let (mut left, mut cases) = (tokens.as_slice(), Vec::new());
    let n_bin = config.actions.n_bin as usize;
    if logits.len() != tokens.len() * n_bin || !logits.iter().all(|x| x.is_finite()) {
        return Err(wrong(LOGITS, logits.len()));
    }
    let mut logits = logits.chunks(n_bin);
    for (i, key) in keys.iter().enumerate() {
        let n_token = config.statistics.select(Some(key))?.1.action.n();
        let (its, rest) = left.split_at_checked(n_token).ok_or(wrong(TOKENS, tokens.len()))?;
        left = rest;
        let token =
            |id: &i32| u32::try_from(*id).ok().filter(|id| config.actions.ids().contains(id));
        let its: Option<Vec<u32>> = its.iter().map(token).collect();
        cases.push(ProofCase {
            image: images[i].clone(),
            image_hash: hashes[i].clone(),
            instruction: instructions[i].clone(),
            unnorm_key: key.clone(),
            tokens: its.ok_or_else(|| Error::Model {
                why: format!("`{TOKENS}` holds ids that are no actions"),
            })?,
            logits: logits.by_ref().take(n_token).map(<[f32]>::to_vec).collect(),
        });
    }
    if left.is_empty() { Ok(cases) } else { Err(wrong(TOKENS, tokens.len())) }
}
