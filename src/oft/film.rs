//! FiLM: the instruction scales and shifts what the towers' blocks hand on.
//!
//! in   `[dim, n]`             embeddings of the prompt and of the stop token
//! out  `[tower's dim, n_layer]`  for each tower: a scale and a shift for each block
//!
//! They depend on the instruction alone, so they are computed once for it.
//!
//! ref: openvla-oft `FiLMedPrismaticVisionBackbone`, `FiLMedVisionTransformerBlock`

use std::sync::Arc;

use openvla_kernels::{Backend, Builder, DType, Graph, State, Tensor, Weight, Weights, shape};

use crate::Result;
use crate::config::{Config, TowerConfig};
use crate::layers::Linear;

pub(super) struct Film {
    towers: Vec<TowerFilm>,
    backend: Arc<Backend>,
}

/// FiLM of one tower.
pub(super) struct TowerFilm {
    /// Of each block: from the language's mean to its scale, and to its shift.
    blocks: Vec<[Linear; 2]>,
    /// `[dim, n_layer]`, both.
    vectors: [State; 2],
}

impl Film {
    pub fn load(w: &mut Weights, c: &Config, backend: &Arc<Backend>) -> Result<Self> {
        let towers = c.towers.iter().map(|tower| TowerFilm::load(w, c, tower, backend));
        Ok(Self { towers: towers.collect::<Result<_>>()?, backend: backend.clone() })
    }

    /// Computes the vectors for a prompt: `ids`, which are rows of `embedding`, and the stop token.
    pub fn compute(&self, embedding: &Weight, n_vocab: usize, ids: &[i32]) -> Result<()> {
        let input = State::ids(&self.backend, DType::I32, ids.len(), n_vocab)?;
        input.write(ids);
        let share = State::zeros(&self.backend, DType::F32, shape(&[ids.len()]))?;
        share.write(&vec![(ids.len() as f32).recip(); ids.len()]);
        let n_node = 64 + self.towers.iter().map(TowerFilm::max_nodes).sum::<usize>();
        let mut graph = Graph::build(&self.backend, n_node, |g| {
            let rows = g.weight(embedding).get_rows(g.state(&input)); // [dim, n]
            let channels = rows.permute([1, 0, 2, 3]).contiguous(); // [n, dim]
            let mean = g.state(&share).mul_mat(channels); // [1, dim]
            let mean = mean.reshape(&[rows.shape()[0], 1]);
            for tower in &self.towers {
                tower.build(g, mean);
            }
        })?;
        Ok(graph.compute()?)
    }

    /// Scale and shift of a block, `[dim]` both.
    pub fn vectors<'g>(&self, g: &'g Builder, tower: usize, block: usize) -> [Tensor<'g>; 2] {
        self.towers[tower].vectors(g, block)
    }
}

impl TowerFilm {
    pub fn load(
        w: &mut Weights,
        c: &Config,
        tower: &TowerConfig,
        backend: &Arc<Backend>,
    ) -> Result<Self> {
        let mut linear = |i: usize, part: &str| {
            let name = format!("{}.blk.{i}.film_{part}", tower.name);
            Linear::load(w, &name, c.llama.dim, tower.dim)
        };
        let blocks = (0..tower.n_layer).map(|i| Ok([linear(i, "scale")?, linear(i, "shift")?]));
        let blocks = blocks.collect::<Result<_>>()?;
        let state = || State::zeros(backend, DType::F32, shape(&[tower.dim, tower.n_layer]));
        Ok(Self { blocks, vectors: [state()?, state()?] })
    }

    /// More than the graph nodes that [`TowerFilm::build`] makes.
    pub fn max_nodes(&self) -> usize {
        16 * self.blocks.len()
    }

    /// Scale and shift of a block, `[dim]` both.
    pub fn vectors<'g>(&self, g: &'g Builder, block: usize) -> [Tensor<'g>; 2] {
        self.vectors.each_ref().map(|state| g.state(state).slice(1, block, 1))
    }

    /// Stores the vectors of every block; `mean` is the language's, `[dim, 1]`.
    pub fn build<'g>(&self, g: &'g Builder, mean: Tensor<'g>) {
        for (i, block) in self.blocks.iter().enumerate() {
            for (linear, vectors) in block.iter().zip(&self.vectors) {
                g.store_in(linear.build(g, mean), g.state(vectors).slice(1, i, 1));
            }
        }
    }
}
