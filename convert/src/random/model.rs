//! The model: every tensor of a checkpoint with its name, shape and distribution.
//!
//! Shapes are those of the files, slowest axis first. Tensors that inference never reads (each
//! tower's last block and final norm, SigLIP's pooling head) are included, as in the published files.

use super::size::{Llama, Sizes, Tower};
use super::spec::{Spec, Variant};
use crate::run_files;

/// The prefixes of the first tower's tensors, and the second's.
const TOWERS: [&str; 2] = ["vision_backbone.featurizer", "vision_backbone.fused_featurizer"];

/// Patches of an image: 16 × 16 of 14 × 14 pixels.
const N_PATCH: usize = 256;
/// Sides of a patch, after its three channels.
const PATCH: usize = 14;

/// One tensor of the checkpoint.
#[derive(Debug)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// PyTorch's order, slowest first.
    pub shape: Vec<usize>,
    /// The distributions of its values, in their order.
    pub segments: Vec<Segment>,
    /// The number of values in all tensors before it.
    pub start: usize,
}

/// Consecutive values with the same distribution.
#[derive(Debug, PartialEq)]
pub struct Segment {
    /// Their number.
    pub n: usize,
    /// Their mean.
    pub mean: f32,
    /// Their standard deviation.
    pub std: f32,
}

impl Tensor {
    /// Number of values.
    pub fn n(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Spec {
    /// Every tensor of the checkpoint, in the order of the module tree.
    pub fn tensors(&self) -> Vec<Tensor> {
        tensors(self.variant, &self.size.sizes())
    }
}

fn tensors(variant: Variant, sizes: &Sizes) -> Vec<Tensor> {
    let Sizes { dinov2, siglip, llama, entry, .. } = sizes;
    let mut list = List { tensors: Vec::new(), entry: *entry };
    match variant {
        Variant::OpenVla | Variant::Oft { .. } => {
            list.dinov2(TOWERS[0], dinov2);
            list.siglip(TOWERS[1], siglip);
            let features = dinov2.dim + siglip.dim;
            list.linear("projector.fc1", 4 * features, features, 1.0);
            list.linear("projector.fc2", llama.dim, 4 * features, 1.5);
            list.linear("projector.fc3", llama.dim, llama.dim, *entry);
        }
        Variant::V01 => {
            list.siglip(TOWERS[0], siglip);
            list.linear("projector.fc1", llama.dim, siglip.dim, 1.0);
            list.linear("projector.fc2", llama.dim, llama.dim, *entry);
        }
    }
    list.llama(sizes);
    if let Variant::Oft { .. } = variant {
        list.run(llama.dim, *entry);
    }
    list.tensors
}

/// The factor of a residual branch's gain that keeps the deviation of the residual stream the same
/// after many layers as after two.
fn damping(n_layer: usize) -> f32 {
    (2.0 / n_layer as f32).sqrt()
}

struct List {
    tensors: Vec<Tensor>,
    /// [`Sizes::entry`].
    entry: f32,
}

impl List {
    fn push(&mut self, name: &str, shape: &[usize], segments: Vec<Segment>) {
        let start = self.tensors.last().map_or(0, |last| last.start + last.n());
        self.tensors.push(Tensor { name: name.into(), shape: shape.into(), segments, start });
    }

    fn normal(&mut self, name: &str, shape: &[usize], mean: f32, std: f32) {
        self.push(name, shape, vec![Segment { n: shape.iter().product(), mean, std }]);
    }

    /// A matrix that maps inputs of deviation 1 to outputs of deviation `gain`.
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

    fn mlp(&mut self, name: &str, dim: usize, hidden: usize, gain: f32) {
        self.linear(&format!("{name}.fc1"), hidden, dim, 1.5);
        self.linear(&format!("{name}.fc2"), dim, hidden, gain);
    }

    /// DINOv2 with registers: five tokens without a position before the patches, and LayerScale.
    fn dinov2(&mut self, prefix: &str, tower: &Tower) {
        let (dim, entry) = (tower.dim, self.entry);
        self.normal(&format!("{prefix}.cls_token"), &[1, 1, dim], 0.0, entry);
        self.normal(&format!("{prefix}.reg_token"), &[1, 4, dim], 0.0, entry);
        self.trunk(prefix, tower);
        for block in 0..tower.depth {
            for scale in ["ls1", "ls2"] {
                let name = format!("{prefix}.blocks.{block}.{scale}.scale_factor");
                self.normal(&name, &[dim], 1.0, 0.2);
            }
        }
    }

    /// SigLIP with its attention pooling.
    fn siglip(&mut self, prefix: &str, tower: &Tower) {
        let dim = tower.dim;
        self.trunk(prefix, tower);
        self.normal(&format!("{prefix}.attn_pool.latent"), &[1, 1, dim], 0.0, 1.0);
        self.linear(&format!("{prefix}.attn_pool.q"), dim, dim, 1.0);
        self.linear(&format!("{prefix}.attn_pool.kv"), 2 * dim, dim, 1.0);
        self.linear(&format!("{prefix}.attn_pool.proj"), dim, dim, 1.0);
        self.norm(&format!("{prefix}.attn_pool.norm"), dim);
        self.mlp(&format!("{prefix}.attn_pool.mlp"), dim, tower.hidden, 1.0);
    }

    /// The parts of both towers: patches, positions, blocks, final norm.
    fn trunk(&mut self, prefix: &str, tower: &Tower) {
        let Tower { dim, hidden, depth } = *tower;
        let (patch, entry) = ([dim, 3, PATCH, PATCH], self.entry);
        let std = entry / ((3 * PATCH * PATCH) as f32).sqrt();
        self.normal(&format!("{prefix}.patch_embed.proj.weight"), &patch, 0.0, std);
        self.normal(&format!("{prefix}.patch_embed.proj.bias"), &[dim], 0.0, 0.1 * entry);
        self.normal(&format!("{prefix}.pos_embed"), &[1, N_PATCH, dim], 0.0, 0.5 * entry);
        for block in 0..depth {
            let block = format!("{prefix}.blocks.{block}");
            self.norm(&format!("{block}.norm1"), dim);
            self.linear(&format!("{block}.attn.qkv"), 3 * dim, dim, 1.5);
            self.linear(&format!("{block}.attn.proj"), dim, dim, damping(depth));
            self.norm(&format!("{block}.norm2"), dim);
            self.mlp(&format!("{block}.mlp"), dim, hidden, damping(depth));
        }
        self.norm(&format!("{prefix}.norm"), dim);
    }

    /// Llama. `q` and `k` are large, so that attention is not uniform.
    fn llama(&mut self, sizes: &Sizes) {
        let (n_row, actions) = (sizes.n_row(), sizes.actions());
        let Llama { dim, hidden, n_layer, .. } = sizes.llama;
        let branch = 1.5 * damping(n_layer);
        let model = "language_model.model";
        self.normal(&format!("{model}.embed_tokens.weight"), &[n_row, dim], 0.0, self.entry);
        for layer in 0..n_layer {
            let layer = format!("{model}.layers.{layer}");
            for (name, gain) in [("q", 2.0), ("k", 2.0), ("v", 1.5), ("o", branch)] {
                self.matrix(&format!("{layer}.self_attn.{name}_proj.weight"), dim, dim, gain);
            }
            self.matrix(&format!("{layer}.mlp.gate_proj.weight"), hidden, dim, 1.0);
            self.matrix(&format!("{layer}.mlp.up_proj.weight"), hidden, dim, 1.0);
            self.matrix(&format!("{layer}.mlp.down_proj.weight"), dim, hidden, branch);
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                self.normal(&format!("{layer}.{norm}.weight"), &[dim], 1.0, 0.1);
            }
        }
        self.normal(&format!("{model}.norm.weight"), &[dim], 1.0, 0.1);
        let std = 0.75 / (dim as f32).sqrt();
        let rows = |n, std| Segment { n: n * dim, mean: 0.0, std };
        let head = vec![
            rows(actions.start, std),
            rows(actions.len(), std * sizes.action_gain),
            rows(Sizes::PADDING_ROWS, std),
        ];
        self.push("language_model.lm_head.weight", &[n_row, dim], head);
    }

    /// The PyTorch files of an OpenVLA-OFT run: an L1 head, whose actions are about -1..1, and the state's projector.
    fn run(&mut self, dim: usize, entry: f32) {
        let [n_action, n_state] = Variant::PLATFORM.lengths();
        let head = |part: &str| format!("{}model.{part}", run_files::HEAD);
        self.norm(&head("layer_norm1"), n_action * dim);
        self.linear(&head("fc1"), dim, n_action * dim, 1.5);
        for block in 0..2 {
            self.norm(&head(&format!("mlp_resnet_blocks.{block}.ffn.0")), dim);
            self.linear(&head(&format!("mlp_resnet_blocks.{block}.ffn.1")), dim, dim, 1.0);
        }
        self.norm(&head("layer_norm2"), dim);
        self.linear(&head("fc2"), n_action, dim, 0.5);
        self.linear(&format!("{}fc1", run_files::STATE), dim, n_state, 1.0);
        self.linear(&format!("{}fc2", run_files::STATE), dim, dim, entry);
    }
}
