//! Bytes and operations of each stage, computed from the model's sizes.
//!
//! Operations are those of matrix products and attention, two for a product and its sum. Bytes are
//! those that cannot be avoided: every weight of the stage once, and in a decode step the cache.
//! Activations are not counted, nor the few rows of the embedding that are looked up.

use std::iter::Sum;
use std::ops::{Add, Mul};

use openvla::{Config, LlamaConfig, OftConfig, OftHead, TowerConfig};
use openvla_convert::inspect::Inspection;
use serde::{Deserialize, Serialize};

/// What a stage has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Work {
    /// Bytes read.
    pub bytes: u64,
    /// Floating-point operations, or their equivalent in quantized products.
    pub flop: u64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, flop: self.flop + other.flop }
    }
}

impl Mul<usize> for Work {
    type Output = Self;

    fn mul(self, n: usize) -> Self {
        Self { bytes: self.bytes * n as u64, flop: self.flop * n as u64 }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Self::add)
    }
}

/// Both towers over the images of `n_camera` cameras.
pub fn vision(config: &Config, file: &Inspection, n_camera: usize) -> Work {
    let flop = config.towers.iter().map(|t| tower(config, t)).sum::<usize>() * n_camera;
    let is_tower = |name: &str| config.towers.iter().any(|t| t.name == name);
    Work { bytes: weights(file, is_tower), flop: flop as u64 }
}

/// The projector over the patches of those images.
pub fn projector(config: &Config, file: &Inspection, n_camera: usize) -> Work {
    let products: usize = config.projector.windows(2).map(|w| w[0] * w[1]).sum();
    let flop = (2 * products * config.n_patch() * n_camera) as u64;
    Work { bytes: weights(file, |name| name == "projector"), flop }
}

/// The Llama over a prompt of `n_row` rows, and the head over the last.
pub fn prefill(config: &Config, file: &Inspection, n_row: usize) -> Work {
    llama(config, file, n_row, n_row)
}

/// The Llama over one row, which looks at the keys and values of `n_row` rows, in F16.
pub fn decode_step(config: &Config, file: &Inspection, n_row: usize) -> Work {
    let c = &config.llama;
    let cache = 2 * 2 * n_row * c.n_head_kv * c.head_dim() * c.n_layer;
    llama(config, file, 1, n_row) + Work { bytes: cache as u64, flop: 0 }
}

/// An OpenVLA-OFT's Llama over `n_row` rows, each of which looks at every other; behind the last layer's keys and values
/// it computes the actions' rows alone. With the projector of the arm's state.
pub fn forward(config: &Config, file: &Inspection, n_row: usize, oft: &OftConfig) -> Work {
    let (c, n_slot) = (&config.llama, oft.n_slot());
    let kv = c.n_head_kv * c.head_dim();
    let layer = |n: usize| {
        let (qkv, rest) = ((c.dim + 2 * kv) * c.dim, (c.dim + 3 * c.n_ff) * c.dim);
        2 * (qkv * n_row + rest * n) + attention(c.dim, n, n_row)
    };
    let state = if oft.n_state > 0 { 2 * c.dim * (oft.n_state + c.dim) } else { 0 };
    let flop = (c.n_layer - 1) * layer(n_row) + layer(n_slot) + state;
    let read = |name: &str| ["llama", "state_projector"].contains(&name);
    Work { bytes: weights(file, read), flop: flop as u64 }
}

/// An OpenVLA-OFT's head over the rows of a chunk.
pub fn head(config: &Config, file: &Inspection, oft: &OftConfig) -> Work {
    let dim = config.llama.dim;
    let flop = match oft.head {
        OftHead::L1 => 2 * dim * (dim * oft.n_action + 2 * dim + oft.n_action) * oft.chunk,
        OftHead::Tokens => {
            2 * dim * (config.llama.n_vocab + config.actions.n_bin as usize) * oft.n_slot()
        }
    };
    let read = |name: &str| ["oft_head", "head", "action_head"].contains(&name);
    Work { bytes: weights(file, read), flop: flop as u64 }
}

fn tower(config: &Config, t: &TowerConfig) -> usize {
    let n_row = t.n_prefix + config.n_patch();
    let embedding = 3 * config.patch_size.pow(2) * t.dim * config.n_patch();
    let matrices = (4 * t.dim + 2 * t.n_ff) * t.dim * n_row;
    2 * embedding + t.n_layer * (2 * matrices + attention(t.dim, n_row, n_row))
}

fn llama(config: &Config, file: &Inspection, n_row: usize, n_seen: usize) -> Work {
    let c: &LlamaConfig = &config.llama;
    let kv = c.n_head_kv * c.head_dim();
    let matrices = (2 * c.dim + 2 * kv + 3 * c.n_ff) * c.dim * n_row;
    let head = c.dim * (c.n_vocab + config.actions.n_bin as usize);
    let flop = c.n_layer * (2 * matrices + attention(c.dim, n_row, n_seen)) + 2 * head;
    let read = |name: &str| ["llama", "head", "action_head"].contains(&name);
    Work { bytes: weights(file, read), flop: flop as u64 }
}

/// Scores, and the sums they weigh.
fn attention(dim: usize, n_row: usize, n_seen: usize) -> usize {
    4 * dim * n_row * n_seen
}

fn weights(file: &Inspection, of: impl Fn(&str) -> bool) -> u64 {
    file.tensors.iter().filter(|group| of(&group.component)).map(|group| group.bytes).sum()
}
