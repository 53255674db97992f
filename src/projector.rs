//! Projector: patch features to Llama embeddings. An MLP with exact GELU between its layers.
//!
//! in   `[2176, n_patch]`  per patch, see [`crate::vision`]
//! out  `[4096, n_patch]`  one soft token per patch
//!
//! ref: `PrismaticProjector.forward`: three layers over two towers, two layers over one.

use openvla_kernels::{Builder, Tensor, Weights};

use crate::Result;
use crate::config::Config;
use crate::layers::Linear;

pub(crate) struct Projector {
    layers: Vec<Linear>,
}

impl Projector {
    pub fn load(w: &mut Weights, c: &Config) -> Result<Self> {
        let layer = |(i, width): (usize, &[usize])| {
            Linear::load(w, &format!("projector.fc{}", i + 1), width[0], width[1])
        };
        Ok(Self { layers: c.projector.windows(2).enumerate().map(layer).collect::<Result<_>>()? })
    }

    /// Graph nodes that [`Projector::build`] makes at most.
    pub fn max_nodes(&self) -> usize {
        8 + 4 * self.layers.len()
    }

    pub fn build<'g>(&self, g: &'g Builder, features: Tensor<'g>) -> Tensor<'g> {
        let outputs = self.layers.iter();
        let step = |x: Option<Tensor<'g>>, layer: &Linear| {
            Some(layer.build(g, x.map_or(features, Tensor::gelu_erf)))
        };
        outputs.fold(None, step).expect("a projector has layers")
    }
}
