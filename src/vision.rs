//! The vision towers: DINOv2 and SigLIP see the same patches, and their channels are joined.
//!
//! in   `[size, size, 3 · n_tower]`  normalised planes, see [`crate::preprocess`]
//! out  `[Σ dim, n_patch]`           per patch: DINOv2's 1024 channels, then SigLIP's 1152
//!
//! The patches come from the second-to-last block, without the final norm: the converter writes
//! only the blocks that run.
//!
//! ref: timm 0.9.10 `VisionTransformer.get_intermediate_layers(n={len(blocks) - 2})`,
//! `PrismaticVisionBackbone.forward`

use openvla_kernels::{Builder, Tensor, Weight, Weights, shape};

use crate::Result;
use crate::config::{Config, TowerConfig};
use crate::layers::{LayerNorm, Linear};

/// What a block's rows are multiplied by, on top of 1, and what is then added to them: `[dim]` both.
pub(crate) type Modulation<'g> = Option<[Tensor<'g>; 2]>;

pub(crate) struct Vision {
    towers: Vec<Tower>,
}

impl Vision {
    pub fn load(w: &mut Weights, c: &Config) -> Result<Self> {
        let towers =
            c.towers.iter().map(|tower| Tower::load(w, c, tower)).collect::<Result<_>>()?;
        Ok(Self { towers })
    }

    /// Graph nodes that [`Vision::build`] makes at most.
    pub fn max_nodes(&self) -> usize {
        self.towers.iter().map(Tower::max_nodes).sum()
    }

    pub fn build<'g>(&self, g: &'g Builder, planes: Tensor<'g>) -> Tensor<'g> {
        self.build_modulated(g, planes, &|_, _| None)
    }

    /// The same with FiLM: `film` gives the scale and the shift of a tower's block, by their numbers.
    pub fn build_modulated<'g>(
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
        let x = x + g.weight(&self.bias) + g.weight(&self.position); // [dim, n_patch]
        let (mut x, n_patch) = (x, x.shape()[1]);
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
    ln1: LayerNorm,
    qkv: Linear,
    out: Linear,
    ln2: LayerNorm,
    up: Linear,
    down: Linear,
    scales: Option<[Weight; 2]>,
    n_head: usize,
}

impl Block {
    fn load(w: &mut Weights, t: &TowerConfig, i: usize) -> Result<Self> {
        let (dim, name) = (t.dim, |part: &str| format!("{}.blk.{i}.{part}", t.name));
        let mut scale = |part| w.take_f32(&name(part), shape(&[dim]));
        // The scales stay apart from the weights before them: with gammas near 1e-5, where DINOv2
        // starts, folding them in would underflow f16.
        let scales = match t.layer_scale {
            true => Some([scale("ls1.weight")?, scale("ls2.weight")?]),
            false => None,
        };
        Ok(Self {
            ln1: LayerNorm::load(w, &name("ln1"), dim, t.eps)?,
            qkv: Linear::load(w, &name("attn_qkv"), dim, 3 * dim)?,
            out: Linear::load(w, &name("attn_out"), dim, dim)?,
            ln2: LayerNorm::load(w, &name("ln2"), dim, t.eps)?,
            up: Linear::load(w, &name("ffn_up"), dim, t.n_ff)?,
            down: Linear::load(w, &name("ffn_down"), t.n_ff, dim)?,
            scales,
            n_head: t.n_head,
        })
    }

    /// `[dim, n] → [dim, n]`
    fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>, film: Modulation<'g>) -> Tensor<'g> {
        let scaled = |branch: Tensor<'g>, i: usize| match &self.scales {
            Some(scales) => branch * g.weight(&scales[i]),
            None => branch,
        };
        let mut x = x + scaled(self.attention(g, self.ln1.build(g, x)), 0);
        if let Some([scale, shift]) = film {
            x = x + x * scale + shift;
        }
        let hidden = self.up.build(g, self.ln2.build(g, x)).gelu_erf(); // [n_ff, n]
        x + scaled(self.down.build(g, hidden), 1)
    }

    /// Every token looks at every other. `[dim, n] → [dim, n]`
    fn attention<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        let [dim, n, ..] = x.shape();
        let head_dim = dim / self.n_head;
        let qkv = self.qkv.build(g, x).reshape(&[head_dim, self.n_head, 3, n]);
        // [head_dim, n_head, 1, n] → [head_dim, n, n_head]
        let [q, k, v] = [0, 1, 2].map(|part| qkv.slice(2, part, 1).permute([0, 2, 3, 1]));
        let scale = (head_dim as f32).sqrt().recip();
        let y = q.flash_attention(k, v, None, scale); // [head_dim, n_head, n]
        self.out.build(g, y.reshape(&[dim, n]))
    }
}
