//! The weights: drawn from a seeded generator, rounded to bf16, written as safetensors.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Result, ensure};
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::json;

use crate::model::{self, Fill, Tensor};
use crate::{Spec, write_file, write_json};

/// Writes `model.safetensors`, or the numbered files and `model.safetensors.index.json`.
///
/// Tensors are dealt out like cards, so that a decoder layer is spread over several files; the
/// published checkpoint has such layers where one file ends and the next begins.
pub fn write(dir: &Path, spec: &Spec) -> Result<()> {
    let mut random = Random::new(spec.seed);
    let tensors: Vec<(Tensor, Vec<u8>)> = model::tensors(spec.variant)
        .into_iter()
        .map(|tensor| {
            let bytes = random.bytes(&tensor);
            (tensor, bytes)
        })
        .collect();
    let (n, most) = (spec.shards, tensors.len());
    ensure!((1..=most).contains(&n), "{n} shards asked for; 1 to {most} can be filled");
    if n == 1 {
        return write_file(dir, "model.safetensors", &safetensors(tensors.iter())?);
    }
    let mut weight_map = BTreeMap::new();
    for shard in 0..n {
        let file = format!("model-{:05}-of-{n:05}.safetensors", shard + 1);
        let part = tensors.iter().skip(shard).step_by(n);
        weight_map.extend(part.clone().map(|(tensor, _)| (&tensor.name, file.clone())));
        write_file(dir, &file, &safetensors(part)?)?;
    }
    let total: usize = tensors.iter().map(|(_, bytes)| bytes.len()).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    write_json(dir, "model.safetensors.index.json", &index)
}

/// One file: tensors sorted by name, with the metadata that transformers insists on.
fn safetensors<'a>(tensors: impl Iterator<Item = &'a (Tensor, Vec<u8>)>) -> Result<Vec<u8>> {
    let views = tensors
        .map(|(t, bytes)| Ok((&t.name, TensorView::new(Dtype::BF16, t.shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(serialize(views, Some(metadata))?)
}

/// ChaCha8, whose output its crate promises to keep on every machine and in later versions.
struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// A tensor's values, little-endian bf16.
    fn bytes(&mut self, tensor: &Tensor) -> Vec<u8> {
        let n: usize = tensor.shape.iter().product();
        let row = n / tensor.shape[0];
        (0..n)
            .flat_map(|at| {
                let (mean, std) = match &tensor.fill {
                    Fill::Normal { mean, std } => (*mean, *std),
                    Fill::Rows { std, loud, gain } if loud.contains(&(at / row)) => {
                        (0.0, std * gain)
                    }
                    Fill::Rows { std, .. } => (0.0, *std),
                };
                bf16::from_f32(mean + std * self.normal()).to_le_bytes()
            })
            .collect()
    }

    /// A normal deviate, near enough: the sum of twelve uniform ones, less its mean. The textbook
    /// ways need `ln` or `cos`, whose last bit differs between platforms.
    fn normal(&mut self) -> f32 {
        let sum: u64 = (0..3)
            .map(|_| {
                let bits = self.0.next_u64();
                (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum::<u64>()
            })
            .sum();
        sum as f32 / 65536.0 - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn deviates_are_normal() {
        let mut random = Random::new(7);
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|_| f64::from(random.normal())).collect();
        let mean = draws.iter().sum::<f64>() / f64::from(n);
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.03, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.03, "variance {variance}");
    }
}
