//! The vision towers: DINOv2 and SigLIP see the same patches, and their channels are joined.
//!
//! in   `[size, size, 3 · n_tower]`  normalized planes, see [`crate::preprocess`]
//! out  `[Σ dim, n_patch]`           per patch: DINOv2's 1024 channels, then SigLIP's 1152
//!
//! The patches come from the second-to-last block, without the final norm: the converter writes
//! only the blocks that run.
//!
//! ref: timm 0.9.10 `VisionTransformer.get_intermediate_layers(n={len(blocks) - 2})`,
//! `PrismaticVisionBackbone.forward`

use std::sync::Arc;

use openvla_kernels::{Backend, Builder, DType, Graph, State, Tensor, Weight, Weights, shape};

use crate::Result;
use crate::config::{Config, TowerConfig};
use crate::layers::{JointBias, Linear, NormedLinear, ResidualLinear};

/// What a block's rows are multiplied by, on top of 1, and what is then added to them: `[dim]` both.
pub(crate) type Modulation<'g> = Option<[Tensor<'g>; 2]>;

pub(crate) struct Vision {
    towers: Vec<Tower>,
}

impl Vision {
    /// Biases are joined unless somebody observes what matrices are multiplied by.
    pub fn load(
        w: &mut Weights,
        c: &Config,
        backend: &Arc<Backend>,
        is_observed: bool,
    ) -> Result<Self> {
        let towers =
            c.towers.iter().map(|tower| Tower::load(w, c, tower)).collect::<Result<_>>()?;
        let mut vision = Self { towers };
        if !is_observed {
            vision.join_biases(backend)?;
        }
        Ok(vision)
    }

    /// Computes once and for all what is constant behind matrices. Not behind those of full precision, whose point is
    /// to give the reference's numbers.
    fn join_biases(&mut self, backend: &Arc<Backend>) -> Result<()> {
        let blocks = self.towers.iter_mut().flat_map(|tower| &mut tower.blocks);
        let mut layers: Vec<_> = blocks.flat_map(Block::joinable).collect();
        layers.retain_mut(|layer| layer.linear().weight().dtype() != DType::F32);
        if layers.is_empty() {
            return Ok(());
        }
        let sizes: Vec<_> = layers.iter_mut().map(|layer| layer.linear().n_out()).collect();
        let biases = State::zeros(backend, DType::F32, shape(&[sizes.iter().sum()]))?;
        let starts: Vec<usize> = (0..sizes.len()).map(|i| sizes[..i].iter().sum()).collect();
        let mut graph = Graph::build(backend, 8 * layers.len(), |g| {
            for ((layer, start), n) in layers.iter().zip(&starts).zip(&sizes) {
                g.store_in(layer.joint_bias(g), g.state(&biases).slice(0, *start, *n));
            }
        })?;
        graph.compute()?;
        for (layer, start) in layers.iter_mut().zip(starts) {
            layer.linear().join(&biases, start);
        }
        Ok(())
    }

    /// Graph nodes that [`Vision::build`] makes at most.
    pub fn max_nodes(&self) -> usize {
        self.towers.iter().map(Tower::max_nodes).sum()
    }

    /// `film` has FiLM's scale and shift of a tower's block, by their numbers.
    pub fn build<'g>(
        &self,
        g: &'g Builder,
        planes: Tensor<'g>,
        film: &dyn Fn(usize, usize) -> Modulation<'g>,
    ) -> Tensor<'g> {
        let rgb = |i| planes.slice(2, 3 * i, 3); // [size, size, 3]
        let towers = self.towers.iter().enumerate();
        let features = towers.map(|(i, tower)| tower.build(g, rgb(i), &|block| film(i, block)));
        features.reduce(|all, next| all.concat(next, 0)).expect("a model has a tower")
    }
}

pub(crate) struct Tower {
    /// The patch embedding, `[patch, patch, 3, dim]` and `[dim]`: a convolution whose step is its
    /// size, so a product with the patches.
    kernel: Weight,
    bias: Weight,
    position: Weight,
    /// DINOv2's class and register tokens, `[dim, n_prefix]`. They get no position.
    prefix: Option<Weight>,
    blocks: Vec<Block>,
}

impl Tower {
    pub fn load(w: &mut Weights, c: &Config, t: &TowerConfig) -> Result<Self> {
        let (name, dim, side) = (&t.name, t.dim, c.patch_size);
        let prefix = format!("{name}.prefix_embd.weight");
        Ok(Self {
            kernel: w.take_f32(&format!("{name}.patch_embd.weight"), [side, side, 3, dim])?,
            bias: w.take_f32(&format!("{name}.patch_embd.bias"), shape(&[dim]))?,
            position: w
                .take_f32(&format!("{name}.position_embd.weight"), shape(&[dim, c.n_patch()]))?,
            prefix: (t.n_prefix > 0)
                .then(|| w.take_f32(&prefix, shape(&[dim, t.n_prefix])))
                .transpose()?,
            blocks: (0..t.n_layer).map(|i| Block::load(w, t, i)).collect::<Result<_>>()?,
        })
    }

    /// Graph nodes that [`Tower::build`] makes at most.
    pub fn max_nodes(&self) -> usize {
        32 + 48 * self.blocks.len()
    }

    /// `[size, size, 3] → [dim, n_patch]`
    pub fn build<'g>(
        &self,
        g: &'g Builder,
        rgb: Tensor<'g>,
        film: &dyn Fn(usize) -> Modulation<'g>,
    ) -> Tensor<'g> {
        let kernel = g.weight(&self.kernel);
        let [side, _, channels, dim] = kernel.shape();
        let patches = rgb.patches(kernel); // [3 · patch², n_patch]
        let x = kernel.reshape(&[side * side * channels, dim]).mul_mat(patches);
        let n_patch = x.shape()[1];
        let mut x = x.sum_with_bias(g.weight(&self.position), g.weight(&self.bias)); // [dim, n_patch]
        if let Some(prefix) = &self.prefix {
            x = g.weight(prefix).concat(x, 1); // [dim, n_prefix + n_patch]
        }
        let n_prefix = x.shape()[1] - n_patch;
        let blocks = self.blocks.iter().enumerate();
        let x = blocks.fold(x, |x, (i, block)| block.build(g, x, film(i)));
        x.slice(1, n_prefix, n_patch)
    }
}

/// A pre-norm transformer block. DINOv2 scales both of its branches, SigLIP neither.
struct Block {
    qkv: NormedLinear,
    out: ResidualLinear,
    up: NormedLinear,
    down: ResidualLinear,
    n_head: usize,
}

impl Block {
    fn load(w: &mut Weights, t: &TowerConfig, i: usize) -> Result<Self> {
        let (dim, name) = (t.dim, |part: &str| format!("{}.blk.{i}.{part}", t.name));
        let mut normed = |[norm, linear]: [&str; 2], n_out| {
            NormedLinear::load(w, [&name(norm), &name(linear)], [dim, n_out], t.eps)
        };
        let (qkv, up) = (normed(["ln1", "attn_qkv"], 3 * dim)?, normed(["ln2", "ffn_up"], t.n_ff)?);
        // The scales stay apart from the weights before them: with gammas near 1e-5, where DINOv2
        // starts, folding them in would underflow f16.
        let mut residual = |linear: &str, n_in, scale: &str| {
            let linear = Linear::load(w, &name(linear), n_in, dim)?;
            let scale = t.layer_scale.then(|| w.take_f32(&name(scale), shape(&[dim])));
            Ok::<_, crate::Error>(ResidualLinear::new(linear, scale.transpose()?))
        };
        let out = residual("attn_out", dim, "ls1.weight")?;
        Ok(Self {
            qkv,
            out,
            up,
            down: residual("ffn_down", t.n_ff, "ls2.weight")?,
            n_head: t.n_head,
        })
    }

    /// What has a neighbor to be joined with.
    fn joinable(&mut self) -> Vec<&mut dyn JointBias> {
        let mut layers: Vec<&mut dyn JointBias> = vec![&mut self.qkv, &mut self.up];
        for residual in [&mut self.out, &mut self.down] {
            if residual.is_scaled() {
                layers.push(residual);
            }
        }
        layers
    }

    /// `[dim, n] → [dim, n]`
    fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>, film: Modulation<'g>) -> Tensor<'g> {
        let mut x = self.out.build(g, self.attention(g, x), x);
        if let Some([scale, shift]) = film {
            x = x + x * scale + shift;
        }
        let hidden = self.up.build(g, x).gelu_erf(); // [n_ff, n]
        self.down.build(g, hidden, x)
    }

    /// LayerNorm, then every token looks at every other: what is to be multiplied and added. `[dim, n] → [dim, n]`
    fn attention<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        let [dim, n, ..] = x.shape();
        let head_dim = dim / self.n_head;
        let qkv = self.qkv.build(g, x).reshape(&[head_dim, self.n_head, 3, n]);
        let (q, kv) = (qkv.slice(2, 0, 1), qkv.slice(2, 1, 2).as_attention_reads());
        // [head_dim, n_head, 1, n] → [head_dim, n, n_head]
        let [q, k, v] =
            [q, kv.slice(2, 0, 1), kv.slice(2, 1, 1)].map(|part| part.permute([0, 2, 3, 1]));
        let scale = (head_dim as f32).sqrt().recip();
        q.flash_attention(k, v, None, scale).reshape(&[dim, n])
    }
}
