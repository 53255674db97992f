//! A PEFT LoRA adapter, as OpenVLA's `finetune.py` leaves it: `W + alpha/r · B·A`, added in f32.
//!
//! With `target_modules="all-linear"` it changes every linear layer, the head, and the towers' patch
//! convolutions; also parts that the model never reads, which are ignored.
//!
//! ref: peft 0.11.1 `LoraLayer.get_delta_weight`, openvla `vla-scripts/finetune.py`

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::names::Shapes;
use crate::source::{dataset_statistics, read_json};
use crate::tensors::{Matrix, Tensors};

/// Adapters wrap the model twice.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// `adapter_config.json`, of which what changes the result.
#[derive(Debug, Deserialize)]
struct PeftConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    bias: Option<String>,
    /// Settings that this version refuses unless they are absent, null, false or empty.
    #[serde(flatten)]
    others: std::collections::BTreeMap<String, Value>,
}

/// Each makes the sum another one.
const REFUSED: [&str; 7] = [
    "use_dora",
    "use_rslora",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
];

/// An adapter folder that was read and checked.
pub struct Adapter {
    tensors: Tensors,
    rank: usize,
    scale: f32,
    /// The text of the `dataset_statistics.json` beside it, which are the fine-tuned model's.
    pub statistics: Option<String>,
}

impl Adapter {
    /// Reads an adapter for a checkpoint whose tensors have these shapes.
    ///
    /// # Errors
    /// Names what is missing or damaged, what is not supported, and what belongs to another model.
    pub fn open(dir: &Path, shapes: &Shapes) -> Result<Self> {
        let path = dir.join("adapter_config.json");
        let config: PeftConfig = read_json(&path)
            .with_context(|| format!("{} is not a folder with a LoRA adapter", dir.display()))?;
        let PeftConfig { r: rank, lora_alpha, .. } = config;
        config.check().with_context(|| path.display().to_string())?;
        let mut tensors = Tensors::default();
        tensors.add(&dir.join("adapter_model.safetensors"))?;
        let statistics = dataset_statistics(dir)?;
        let adapter = Self { tensors, rank, scale: lora_alpha / rank as f32, statistics };
        adapter
            .check(shapes)
            .with_context(|| format!("the adapter in {} cannot be merged", dir.display()))?;
        Ok(adapter)
    }

    /// Every tensor is half of a pair that fits a tensor of the checkpoint, or a copy of one.
    fn check(&self, shapes: &Shapes) -> Result<()> {
        for (name, entry) in self.tensors.entries() {
            if name.contains(".base_layer.") {
                continue; // peft saves the unchanged head too, since it is a target
            }
            let module = name.strip_prefix(PREFIX).unwrap_or(name);
            let half = [A, B].into_iter().find_map(|half| Some((half, module.strip_suffix(half)?)));
            let (half, module) = half.with_context(|| {
                format!("it holds {name}, which is neither lora_A nor lora_B of a layer")
            })?;
            let weight = format!("{module}.weight");
            let wanted = shapes.get(&weight).with_context(|| {
                format!("it changes {weight}, which the checkpoint lacks; is it another model's?")
            })?;
            let other = format!("{PREFIX}{module}{}", if half == A { B } else { A });
            ensure!(self.tensors.entries().contains_key(&other), "it lacks {other}");
            self.tensors.check_type(name)?;
            let (n_out, n_in) = rows_of(wanted);
            let needed = if half == A { (self.rank, n_in) } else { (n_out, self.rank) };
            ensure!(
                wanted.len() > 1 && rows_of(&entry.shape) == needed,
                "{name} has shape {:?}; rank {} over {weight} {wanted:?} needs {needed:?}",
                entry.shape,
                self.rank
            );
        }
        Ok(())
    }

    /// What is to be added to a tensor of the checkpoint, if anything.
    ///
    /// # Errors
    /// Names the file if it cannot be mapped.
    pub fn delta(&self, weight: &str) -> Result<Option<Delta>> {
        let Some(module) = weight.strip_suffix(".weight") else { return Ok(None) };
        let name = |half: &str| format!("{PREFIX}{module}{half}");
        if !self.tensors.entries().contains_key(&name(A)) {
            return Ok(None);
        }
        let half = |half: &str| self.tensors.matrix(&name(half)).map(|matrix| all(&matrix));
        Ok(Some(Delta { a: half(A)?, b: half(B)?, rank: self.rank, scale: self.scale }))
    }
}

impl PeftConfig {
    fn check(&self) -> Result<()> {
        let Self { peft_type, r, lora_alpha, bias, others } = self;
        ensure!(peft_type == "LORA", "peft_type is {peft_type}; LORA is merged");
        let sound = (1..=4096).contains(r) && lora_alpha.is_finite();
        ensure!(sound, "r is {r} and lora_alpha {lora_alpha}");
        let bias = bias.as_deref().unwrap_or("none");
        ensure!(bias == "none", "bias is {bias}; adapters with biases are not merged");
        for key in REFUSED {
            let off = match others.get(key) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::Object(map)) => map.is_empty(),
                Some(Value::Array(list)) => list.is_empty(),
                Some(_) => false,
            };
            ensure!(off, "{key} is set, which this version does not merge; merge it with peft");
        }
        Ok(())
    }
}

/// The first dimension, and all the others as one: a convolution is a matrix too.
fn rows_of(shape: &[usize]) -> (usize, usize) {
    let (first, rest) = shape.split_first().unwrap_or((&1, &[]));
    (*first, rest.iter().product())
}

/// All numbers of a small tensor.
fn all(matrix: &Matrix) -> Vec<f32> {
    let mut numbers = vec![0.0; matrix.row * matrix.n_row];
    matrix.read(0, &mut numbers);
    numbers
}

/// A product of rank r, scaled, of which any part of a row can be had.
pub struct Delta {
    /// `r` rows of `n_in`.
    a: Vec<f32>,
    /// `n_out` rows of `r`.
    b: Vec<f32>,
    rank: usize,
    scale: f32,
}

impl Delta {
    /// Adds the product's numbers from number `start` on, which must lie in one of its rows.
    pub fn add(&self, start: usize, out: &mut [f32]) {
        let n_in = self.a.len() / self.rank;
        let (row, at) = (start / n_in, start % n_in);
        let mut sum = vec![0.0; out.len()];
        for (b, a) in self.b[row * self.rank..][..self.rank].iter().zip(self.a.chunks(n_in)) {
            for (sum, a) in sum.iter_mut().zip(&a[at..][..out.len()]) {
                *sum += b * a;
            }
        }
        for (out, sum) in out.iter_mut().zip(sum) {
            *out += self.scale * sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Delta;

    /// B·A spelled out, and parts of rows as a convolution's rows are.
    #[test]
    fn parts_of_rows_add_up_to_the_product() {
        let (n_in, n_out, rank) = (6, 4, 3);
        let wave = |n: usize, k: f32| (0..n).map(|i| (i as f32 * k).sin()).collect::<Vec<_>>();
        let (a, b) = (wave(rank * n_in, 0.7), wave(n_out * rank, 0.3));
        let delta = Delta { a: a.clone(), b: b.clone(), rank, scale: 0.5 };
        let mut got = vec![1.0; n_in * n_out];
        for (i, part) in got.chunks_mut(2).enumerate() {
            delta.add(2 * i, part);
        }
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / n_in, i % n_in);
            let dot: f32 = (0..rank).map(|r| b[row * rank + r] * a[r * n_in + column]).sum();
            assert!((got - (1.0 + 0.5 * dot)).abs() < 1e-6, "{i}");
        }
    }
}
