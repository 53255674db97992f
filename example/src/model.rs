//! The model: sizes, and every tensor of a checkpoint with its name, shape and distribution.
//!
//! Shapes are those of the files, slowest axis first. The parts that inference never reads (each
//! tower's last block and final norm, SigLIP's pooling head) are there, as in the published files.

use std::ops::Range;

use crate::Variant;
use crate::vocabulary::{ACTIONS, SIZE};

/// Rows that the embedding has beyond the vocabulary: `<PAD>` and what rounds it up.
pub const PADDING_ROWS: usize = 64;
/// Width of the language model.
pub const DIM: usize = 64;
/// Width of the language model's MLP.
pub const HIDDEN: usize = 96;
/// Decoder layers.
pub const N_LAYER: usize = 2;
/// Heads of the language model. A tower has 16, which follows from its timm name.
pub const N_HEAD: usize = 2;

/// Patches of an image: 16 × 16 of 14 × 14 pixels.
const N_PATCH: usize = 256;
/// Sides of a patch, after its three channels.
const PATCH: usize = 14;

/// Deviation of what enters a residual stream. As small as in trained models, so that the first
/// norm's epsilon counts: 1e-5 in place of 1e-6 is then seen in the logits.
const QUIET: f32 = 0.03;

/// Sizes of one vision tower. Its blocks number one more than inference runs.
struct Tower {
    prefix: &'static str,
    dim: usize,
    hidden: usize,
    depth: usize,
}

const DINOV2: Tower =
    Tower { prefix: "vision_backbone.featurizer", dim: 32, hidden: 128, depth: 2 };

/// The MLP's width is no multiple of 32, as the real 4304 is none, so `fc2` cannot be quantised.
const SIGLIP: Tower =
    Tower { prefix: "vision_backbone.fused_featurizer", dim: 64, hidden: 80, depth: 2 };

/// One tensor to be written.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub fill: Fill,
}

/// How a tensor's values are drawn.
pub enum Fill {
    /// All alike.
    Normal { mean: f32, std: f32 },
    /// Around zero; the rows `loud` with `gain` times the deviation.
    Rows { std: f32, loud: Range<usize>, gain: f32 },
}

/// All tensors of a checkpoint, in the order of the module tree.
pub fn tensors(variant: Variant) -> Vec<Tensor> {
    let mut list = List(Vec::new());
    let features = match variant {
        Variant::OpenVla => {
            list.dinov2(&DINOV2);
            list.siglip(&SIGLIP);
            DINOV2.dim + SIGLIP.dim
        }
        Variant::V01 => {
            list.siglip(&Tower { prefix: DINOV2.prefix, ..SIGLIP });
            SIGLIP.dim
        }
    };
    list.projector(variant, features);
    list.llama();
    list.0
}

struct List(Vec<Tensor>);

impl List {
    fn push(&mut self, name: &str, shape: &[usize], fill: Fill) {
        self.0.push(Tensor { name: name.into(), shape: shape.into(), fill });
    }

    fn normal(&mut self, name: &str, shape: &[usize], mean: f32, std: f32) {
        self.push(name, shape, Fill::Normal { mean, std });
    }

    /// A matrix that turns inputs of deviation 1 into outputs of deviation `gain`.
    fn matrix(&mut self, name: &str, rows: usize, columns: usize, gain: f32) {
        self.normal(name, &[rows, columns], 0.0, gain / (columns as f32).sqrt());
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize, gain: f32) {
        self.matrix(&format!("{name}.weight"), rows, columns, gain);
        self.normal(&format!("{name}.bias"), &[rows], 0.0, 0.1 * gain);
    }

    fn norm(&mut self, name: &str, dim: usize) {
        self.normal(&format!("{name}.weight"), &[dim], 1.0, 0.1);
        self.normal(&format!("{name}.bias"), &[dim], 0.0, 0.1);
    }

    fn mlp(&mut self, name: &str, dim: usize, hidden: usize) {
        self.linear(&format!("{name}.fc1"), hidden, dim, 1.5);
        self.linear(&format!("{name}.fc2"), dim, hidden, 1.0);
    }

    /// DINOv2 with registers: five tokens without a position before the patches, and LayerScale.
    fn dinov2(&mut self, tower: &Tower) {
        let Tower { prefix, dim, .. } = *tower;
        self.normal(&format!("{prefix}.cls_token"), &[1, 1, dim], 0.0, QUIET);
        self.normal(&format!("{prefix}.reg_token"), &[1, 4, dim], 0.0, QUIET);
        self.trunk(tower);
        for block in 0..tower.depth {
            for scale in ["ls1", "ls2"] {
                let name = format!("{prefix}.blocks.{block}.{scale}.scale_factor");
                self.normal(&name, &[dim], 1.0, 0.2);
            }
        }
    }

    /// SigLIP with its attention pooling.
    fn siglip(&mut self, tower: &Tower) {
        let Tower { prefix, dim, .. } = *tower;
        self.trunk(tower);
        self.normal(&format!("{prefix}.attn_pool.latent"), &[1, 1, dim], 0.0, 1.0);
        self.linear(&format!("{prefix}.attn_pool.q"), dim, dim, 1.0);
        self.linear(&format!("{prefix}.attn_pool.kv"), 2 * dim, dim, 1.0);
        self.linear(&format!("{prefix}.attn_pool.proj"), dim, dim, 1.0);
        self.norm(&format!("{prefix}.attn_pool.norm"), dim);
        self.mlp(&format!("{prefix}.attn_pool.mlp"), dim, tower.hidden);
    }

    /// What both towers have: patches, positions, blocks, final norm.
    fn trunk(&mut self, tower: &Tower) {
        let Tower { prefix, dim, hidden, depth } = *tower;
        let patch = [dim, 3, PATCH, PATCH];
        let std = QUIET / ((3 * PATCH * PATCH) as f32).sqrt();
        self.normal(&format!("{prefix}.patch_embed.proj.weight"), &patch, 0.0, std);
        self.normal(&format!("{prefix}.patch_embed.proj.bias"), &[dim], 0.0, 0.1 * QUIET);
        self.normal(&format!("{prefix}.pos_embed"), &[1, N_PATCH, dim], 0.0, 0.5 * QUIET);
        for block in 0..depth {
            let block = format!("{prefix}.blocks.{block}");
            self.norm(&format!("{block}.norm1"), dim);
            self.linear(&format!("{block}.attn.qkv"), 3 * dim, dim, 1.5);
            self.linear(&format!("{block}.attn.proj"), dim, dim, 1.0);
            self.norm(&format!("{block}.norm2"), dim);
            self.mlp(&format!("{block}.mlp"), dim, hidden);
        }
        self.norm(&format!("{prefix}.norm"), dim);
    }

    /// Features of a patch to one embedding: three layers when fused, else two.
    fn projector(&mut self, variant: Variant, features: usize) {
        match variant {
            Variant::OpenVla => {
                self.linear("projector.fc1", 4 * features, features, 1.0);
                self.linear("projector.fc2", DIM, 4 * features, 1.5);
                self.linear("projector.fc3", DIM, DIM, QUIET);
            }
            Variant::V01 => {
                self.linear("projector.fc1", DIM, features, 1.0);
                self.linear("projector.fc2", DIM, DIM, QUIET);
            }
        }
    }

    /// Llama. The head's action rows are louder, so that the largest logit is nearly always
    /// theirs; `q` and `k` are large, so that attention has something to choose.
    fn llama(&mut self) {
        let rows = SIZE + PADDING_ROWS;
        let model = "language_model.model";
        self.normal(&format!("{model}.embed_tokens.weight"), &[rows, DIM], 0.0, QUIET);
        for layer in 0..N_LAYER {
            let layer = format!("{model}.layers.{layer}");
            for (name, gain) in [("q", 2.0), ("k", 2.0), ("v", 1.5), ("o", 1.5)] {
                self.matrix(&format!("{layer}.self_attn.{name}_proj.weight"), DIM, DIM, gain);
            }
            self.matrix(&format!("{layer}.mlp.gate_proj.weight"), HIDDEN, DIM, 1.0);
            self.matrix(&format!("{layer}.mlp.up_proj.weight"), HIDDEN, DIM, 1.0);
            self.matrix(&format!("{layer}.mlp.down_proj.weight"), DIM, HIDDEN, 1.5);
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                self.normal(&format!("{layer}.{norm}.weight"), &[DIM], 1.0, 0.1);
            }
        }
        self.normal(&format!("{model}.norm.weight"), &[DIM], 1.0, 0.1);
        let fill = Fill::Rows { std: 0.75 / (DIM as f32).sqrt(), loud: ACTIONS, gain: 1.6 };
        self.push("language_model.lm_head.weight", &[rows, DIM], fill);
    }
}
