//! What a model file says about how it should act: reference cases, computed in f32 from the
//! checkpoint before it was quantized, and a checksum of every tensor.
//!
//! A case is a picture of each camera that the project carries, known by its hash, an instruction, and the arm's state
//! where the model reads one. Tokens were decoded greedily among the action ids.

use openvla_kernels::{Gguf, Header, Value};
use twox_hash::XxHash64;

use super::Config;
use super::oft::OftHead;
use crate::{Error, Result};

/// Everything a file can be held against.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Proof {
    /// Reference cases.
    pub cases: Vec<ProofCase>,
    /// The [`checksum`] of every tensor's bytes, in the file's order.
    pub checksums: Vec<u64>,
}

/// One reference case.
#[derive(Debug, Clone, PartialEq)]
pub struct ProofCase {
    /// Which pictures of the project's, one for each camera.
    pub images: Vec<String>,
    /// SHA-256 of their RGB bytes, in hexadecimal.
    pub image_hashes: Vec<String>,
    /// What the robot is asked.
    pub instruction: String,
    /// The arm's state in the data set's units, `[n_state]`; empty if the model reads none.
    pub state: Vec<f32>,
    /// The data set whose motions have as many dimensions.
    pub unnorm_key: String,
    /// What the checkpoint computes of it.
    pub expected: Expected,
}

/// What the checkpoint computes of a case.
#[derive(Debug, Clone, PartialEq)]
pub enum Expected {
    /// Of a model that chooses tokens.
    Tokens {
        /// The tokens to be chosen; of an OpenVLA-OFT those of the whole chunk.
        tokens: Vec<u32>,
        /// Logits of the action ids, by token.
        logits: Vec<Vec<f32>>,
    },
    /// Of a head that computes numbers: the normalized actions, `[n_action, chunk]`.
    Actions(Vec<f32>),
}

const IMAGES: &str = "openvla.proof.images";
const HASHES: &str = "openvla.proof.image_sha256";
const INSTRUCTIONS: &str = "openvla.proof.instructions";
const STATES: &str = "openvla.proof.states";
const UNNORM_KEYS: &str = "openvla.proof.unnorm_keys";
const TOKENS: &str = "openvla.proof.tokens";
const LOGITS: &str = "openvla.proof.logits";
const ACTIONS: &str = "openvla.proof.actions";
const CHECKSUMS: &str = "openvla.checksum.xxh64";

impl Proof {
    /// Reads what a file has of it: older files have nothing.
    ///
    /// # Errors
    /// [`Error::Model`] if its lists do not fit together, [`Error::Kernels`] if a key is missing.
    pub fn read(file: &Gguf, config: &Config) -> Result<Self> {
        let has = |key: &str| file.metadata().contains_key(key);
        let cases = if has(IMAGES) { read_cases(file, config)? } else { Vec::new() };
        if !has(CHECKSUMS) {
            return Ok(Self { cases, checksums: Vec::new() });
        }
        let checksums: Vec<String> = file.get(CHECKSUMS)?;
        let read = |text: &String| u64::from_str_radix(text, 16).ok();
        let read: Option<Vec<u64>> = checksums.iter().map(read).collect();
        let checksums = read.filter(|read| read.len() == file.tensors().len());
        let checksums = checksums.ok_or_else(|| Error::Model {
            why: format!("`{CHECKSUMS}` is not a checksum for each of its tensors"),
        })?;
        Ok(Self { cases, checksums })
    }

    /// Names of the tensors whose bytes are not those that the converter wrote. `read` hears of the bytes as they are read.
    pub fn damaged(&self, file: &Gguf, mut read: impl FnMut(usize)) -> Vec<String> {
        let pairs = file.tensors().iter().zip(&self.checksums);
        let damaged = pairs.filter_map(|(tensor, wanted)| {
            let bytes = &file.bytes()[tensor.range.clone()];
            read(bytes.len());
            (checksum(bytes) != *wanted).then(|| tensor.name.clone())
        });
        damaged.collect()
    }

    /// Adds all keys to the header of a file to be written. However the checksums turn out, the
    /// header is as long.
    pub fn write(&self, to: &mut Header) {
        if !self.cases.is_empty() {
            self.write_cases(to);
        }
        let checksums: Vec<String> = self.checksums.iter().map(|x| format!("{x:016x}")).collect();
        to.set(CHECKSUMS, Value::from(checksums));
    }

    fn write_cases(&self, to: &mut Header) {
        let mut list = |key: &str, of: fn(&ProofCase) -> &[String]| {
            to.set(key, self.cases.iter().flat_map(of).cloned().collect::<Vec<_>>());
        };
        list(IMAGES, |case| &case.images);
        list(HASHES, |case| &case.image_hashes);
        list(INSTRUCTIONS, |case| std::slice::from_ref(&case.instruction));
        list(UNNORM_KEYS, |case| std::slice::from_ref(&case.unnorm_key));
        let (mut ids, mut numbers, mut actions) = (Vec::new(), Vec::new(), Vec::new());
        for case in &self.cases {
            match &case.expected {
                Expected::Tokens { tokens, logits } => {
                    ids.extend(tokens.iter().map(|id| *id as i32));
                    numbers.extend(logits.iter().flatten());
                }
                Expected::Actions(of_case) => actions.extend(of_case),
            }
        }
        if !ids.is_empty() {
            to.set(TOKENS, ids);
        }
        let states: Vec<f32> = self.cases.iter().flat_map(|case| &case.state).copied().collect();
        for (key, list) in [(LOGITS, numbers), (ACTIONS, actions), (STATES, states)] {
            if !list.is_empty() {
                to.set(key, list);
            }
        }
    }
}

/// XXH64 of a tensor's bytes, with seed 0: what llama.cpp's `gguf-hash` prints.
pub fn checksum(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

fn read_cases(file: &Gguf, config: &Config) -> Result<Vec<ProofCase>> {
    let oft = config.oft.as_ref();
    let (n_camera, n_state) = oft.map_or((1, 0), |oft| (oft.cameras.len(), oft.n_state));
    let instructions: Vec<String> = file.get(INSTRUCTIONS)?;
    let n = instructions.len();
    let strings = |key: &str, n: usize| {
        let list: Vec<String> = file.get(key)?;
        if list.len() == n { Ok(list) } else { Err(wrong(key, list.len())) }
    };
    let (images, hashes) = (strings(IMAGES, n * n_camera)?, strings(HASHES, n * n_camera)?);
    let keys = strings(UNNORM_KEYS, n)?;
    let states = if n_state > 0 { numbers(file, STATES, n * n_state)? } else { Vec::new() };
    let expected = match oft {
        Some(oft) if oft.head == OftHead::L1 => {
            let actions = numbers(file, ACTIONS, n * oft.n_slot())?;
            actions.chunks(oft.n_slot()).map(|x| Expected::Actions(x.to_vec())).collect()
        }
        _ => read_tokens(file, config, &keys)?,
    };
    let cases = instructions.into_iter().zip(keys).zip(expected).enumerate();
    let case = |(i, ((instruction, unnorm_key), expected))| ProofCase {
        images: images[i * n_camera..][..n_camera].to_vec(),
        image_hashes: hashes[i * n_camera..][..n_camera].to_vec(),
        instruction,
        state: states[i * n_state..][..n_state].to_vec(),
        unnorm_key,
        expected,
    };
    Ok(cases.map(case).collect())
}

fn wrong(key: &str, n: usize) -> Error {
    Error::Model { why: format!("`{key}` has {n} elements") }
}

/// A list of `n` finite numbers.
fn numbers(file: &Gguf, key: &str, n: usize) -> Result<Vec<f32>> {
    let list: Vec<f32> = file.get(key)?;
    let is_sound = list.len() == n && list.iter().all(|x| x.is_finite());
    if is_sound { Ok(list) } else { Err(wrong(key, list.len())) }
}

/// Tokens and logits of the cases, whose data sets are `keys`.
fn read_tokens(file: &Gguf, config: &Config, keys: &[String]) -> Result<Vec<Expected>> {
    let ids: Vec<i32> = file.get(TOKENS)?;
    let n_bin = config.actions.n_bin as usize;
    let logits = numbers(file, LOGITS, ids.len() * n_bin)?;
    let (mut left, mut logits) = (ids.as_slice(), logits.chunks(n_bin));
    let mut all = Vec::new();
    for key in keys {
        let n_dimension = config.statistics.select(Some(key))?.1.action.n();
        let n_token = config.oft.as_ref().map_or(n_dimension, |oft| oft.n_slot());
        let (its, rest) = left.split_at_checked(n_token).ok_or(wrong(TOKENS, ids.len()))?;
        left = rest;
        let token =
            |id: &i32| u32::try_from(*id).ok().filter(|id| config.actions.ids().contains(id));
        let tokens: Option<Vec<u32>> = its.iter().map(token).collect();
        let tokens = tokens.ok_or_else(|| Error::Model {
            why: format!("`{TOKENS}` holds ids that are not actions"),
        })?;
        let logits = logits.by_ref().take(n_token).map(<[f32]>::to_vec).collect();
        all.push(Expected::Tokens { tokens, logits });
    }
    if left.is_empty() { Ok(all) } else { Err(wrong(TOKENS, ids.len())) }
}
