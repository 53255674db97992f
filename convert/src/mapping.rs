//! Maps the tensors of a checkpoint to those of the file.
//!
//! Sizes that `config.json` does not state come from the checkpoint's shapes, and all shapes are
//! checked against each other.

mod oft;

use anyhow::{Context, Result, bail, ensure};
use openvla::{LlamaConfig, OftHead, TowerConfig};

use crate::hf_config::HfConfig;
use crate::mapper::{MappedTensor, Mapper, Role, Shapes, TOWERS};

pub use oft::RunTensors;

/// All tensors of a checkpoint, mapped to those of the file, and the sizes found on the way.
pub struct Mapping {
    /// The file's tensors, in its order.
    pub tensors: Vec<MappedTensor>,
    /// Tensors that the model never reads.
    pub unused: Vec<String>,
    /// The towers, in the order of their channels.
    pub towers: Vec<TowerConfig>,
    /// Pixels along a patch's side.
    pub patch_size: usize,
    /// Patches of an image: rows of the position table.
    pub n_patch: usize,
    /// Widths from the joined towers to the Llama.
    pub projector: Vec<usize>,
    /// The language model.
    pub llama: LlamaConfig,
    /// What the tensors of an OpenVLA-OFT run tell.
    pub run: Option<RunTensors>,
}

/// What timm knows by a model's name and the tensors do not say.
struct Timm {
    id: &'static str,
    name: &'static str,
    n_head: usize,
}

const TIMM: [Timm; 2] = [
    Timm { id: "vit_large_patch14_reg4_dinov2.lvd142m", name: "dinov2", n_head: 16 },
    Timm { id: "vit_so400m_patch14_siglip_224", name: "siglip", n_head: 16 },
];

/// The matrix that computes logits.
const LM_HEAD: &str = "language_model.lm_head.weight";

/// ref: timm 0.9.10 `VisionTransformer`: `norm_layer = partial(nn.LayerNorm, eps=1e-6)`
const LAYER_NORM_EPS: f32 = 1e-6;

/// Quantized rows are whole blocks of 32; SigLIP's MLP of 4304 is padded with 16 columns of zeros.
/// That is exact: GELU(0) = 0, and the weights it is multiplied by are 0 too.
const BLOCK: usize = 32;

/// The component of the model that a tensor of the file belongs to, to be shown.
pub fn component(name: &str) -> &str {
    match name.split('.').next().unwrap_or(name) {
        "blk" | "output_norm" => "llama",
        "token_embd" => "token_embedding",
        "output" => "head",
        "oft" if name.starts_with("oft.state") => "state_projector",
        "oft" => "oft_head",
        itself => itself,
    }
}

/// Maps a checkpoint's tensors, those of an OpenVLA-OFT run if it `is_run`.
///
/// # Errors
/// Names a tensor that is missing, of another shape, or of no known use.
pub fn mapping(config: &HfConfig, shapes: &Shapes, is_run: bool) -> Result<Mapping> {
    let mut mapper = Mapper { remaining: shapes.clone(), tensors: Vec::new(), unused: Vec::new() };
    let n_tower = config.timm_model_ids.len();
    ensure!((1..=2).contains(&n_tower), "timm_model_ids names {n_tower} towers; 1 or 2 can be");
    let fused = config.use_fused_vision_backbone.unwrap_or(n_tower == 2);
    ensure!(
        fused == (n_tower == 2),
        "use_fused_vision_backbone is {fused}, but timm_model_ids names {n_tower} towers"
    );
    let mut towers = Vec::new();
    let mut grids = Vec::new();
    for (id, prefix) in config.timm_model_ids.iter().zip(TOWERS) {
        let (tower, grid) = mapper.tower(id, prefix)?;
        towers.push(tower);
        grids.push(grid);
    }
    ensure!(grids.iter().all(|g| *g == grids[0]), "the towers cut images differently: {grids:?}");
    let (patch_size, n_patch) = grids[0];
    let n_in = towers.iter().map(|tower| tower.dim).sum();
    let projector = mapper.projector(n_in, n_tower + 1)?;
    let llama = mapper.llama(config)?;
    let run = is_run.then(|| mapper.run(&towers, llama.dim)).transpose()?;
    if run.is_none_or(|run| run.head == OftHead::Tokens) {
        mapper.token_head(config, &llama)?;
    } else {
        mapper.drop_matching(|name| name == LM_HEAD);
    }
    mapper.drop_matching(|name| name.ends_with(".rotary_emb.inv_freq"));
    if let Some(name) = mapper.remaining.keys().next() {
        bail!("the tensor {name} belongs to no part of OpenVLA; is this another model?");
    }
    let Mapper { tensors, unused, .. } = mapper;
    Ok(Mapping { tensors, unused, towers, patch_size, n_patch, projector, llama, run })
}

impl Mapper {
    /// Maps one tower. Returns its patch size and number of patches too.
    fn tower(&mut self, id: &str, from: &str) -> Result<(TowerConfig, (usize, usize))> {
        let timm = TIMM.iter().find(|timm| timm.id == id).with_context(|| {
            let known = TIMM.map(|timm| timm.id).join(", ");
            format!("the vision tower {id:?} is unknown; this version runs {known}")
        })?;
        let kernel = format!("{from}.patch_embed.proj.weight");
        let &[dim, 3, patch, _] = self.shape(&kernel)? else {
            bail!("{kernel} has shape {:?}; [dim, 3, patch, patch] is needed", self.shape(&kernel)?)
        };
        self.take(&kernel, &[dim, 3, patch, patch])?;
        let to = timm.name;
        let embed = format!("{to}.patch_embd");
        self.add(format!("{embed}.weight"), &[patch, patch, 3, dim], Role::Plain, &[kernel]);
        self.vector(&format!("{embed}.bias"), &format!("{from}.patch_embed.proj.bias"), dim, dim)?;
        let position = format!("{from}.pos_embed");
        let n_patch = self.shape(&position)?.get(1).copied().unwrap_or(0);
        self.take(&position, &[1, n_patch, dim])?;
        let name = format!("{to}.position_embd.weight");
        self.add(name, &[dim, n_patch], Role::Plain, &[position]);
        let n_prefix = self.prefix_tokens(to, from, dim)?;
        let n_layer = self.run_depth(from)?;
        let fc1 = format!("{from}.blocks.0.mlp.fc1.weight");
        let n_ff = self.shape(&fc1)?.first().copied().unwrap_or(0);
        let layer_scale = self.remaining.contains_key(&format!("{from}.blocks.0.ls1.scale_factor"));
        let tower = TowerConfig {
            name: to.to_owned(),
            dim,
            n_layer,
            n_head: timm.n_head,
            n_ff: n_ff.next_multiple_of(BLOCK),
            eps: LAYER_NORM_EPS,
            n_prefix,
            layer_scale,
        };
        for i in 0..n_layer {
            self.block(&tower, from, i, n_ff)?;
        }
        // The features are those of the second-to-last block, without the final norm and pooling.
        let last = format!("{from}.blocks.{n_layer}.");
        let (norm, pool) = (format!("{from}.norm."), format!("{from}.attn_pool."));
        self.drop_matching(|name| [&last, &norm, &pool].iter().any(|p| name.starts_with(*p)));
        Ok((tower, (patch, n_patch)))
    }

    /// Joins class and register tokens in one table, in the order they precede the patches.
    fn prefix_tokens(&mut self, to: &str, from: &str, dim: usize) -> Result<usize> {
        let (class, register) = (format!("{from}.cls_token"), format!("{from}.reg_token"));
        if !self.remaining.contains_key(&class) {
            return Ok(0);
        }
        self.take(&class, &[1, 1, dim])?;
        let n = self.shape(&register)?.get(1).copied().unwrap_or(0);
        self.take(&register, &[1, n, dim])?;
        let name = format!("{to}.prefix_embd.weight");
        self.add(name, &[dim, 1 + n], Role::Plain, &[class, register]);
        Ok(1 + n)
    }

    /// The number of blocks that run: all but the last.
    fn run_depth(&self, from: &str) -> Result<usize> {
        let blocks = format!("{from}.blocks.");
        let numbers = self.remaining.keys().filter_map(|name| name.strip_prefix(&blocks));
        let last = numbers.filter_map(|rest| rest.split('.').next()?.parse::<usize>().ok()).max();
        match last {
            Some(last @ 1..) => Ok(last),
            _ => bail!("{from} has {} blocks; two are the least", last.map_or(0, |n| n + 1)),
        }
    }

    fn block(&mut self, t: &TowerConfig, from: &str, i: usize, n_ff: usize) -> Result<()> {
        let dim = t.dim;
        let to = |part: &str| format!("{}.blk.{i}.{part}", t.name);
        let from = |part: &str| format!("{from}.blocks.{i}.{part}");
        let linear = |mapper: &mut Self, name: &str, source: &str, size, padded| {
            mapper.linear(&to(name), &from(source), Role::Vision, size, padded)
        };
        self.norm(&to("ln1"), &from("norm1"), dim)?;
        linear(self, "attn_qkv", "attn.qkv", [dim, 3 * dim], [dim, 3 * dim])?;
        linear(self, "attn_out", "attn.proj", [dim, dim], [dim, dim])?;
        self.norm(&to("ln2"), &from("norm2"), dim)?;
        linear(self, "ffn_up", "mlp.fc1", [dim, n_ff], [dim, t.n_ff])?;
        linear(self, "ffn_down", "mlp.fc2", [n_ff, dim], [t.n_ff, dim])?;
        if t.layer_scale {
            self.vector(&to("ls1.weight"), &from("ls1.scale_factor"), dim, dim)?;
            self.vector(&to("ls2.weight"), &from("ls2.scale_factor"), dim, dim)?;
        }
        Ok(())
    }

    /// Maps the projector: two layers for one tower, three for two. Returns the widths.
    fn projector(&mut self, n_in: usize, n_layer: usize) -> Result<Vec<usize>> {
        let mut widths = vec![n_in];
        for i in 1..=n_layer {
            let name = format!("projector.fc{i}");
            let n_in = widths[i - 1];
            let n_out = self.shape(&format!("{name}.weight"))?.first().copied().unwrap_or(0);
            self.linear(&name, &name, Role::Projector, [n_in, n_out], [n_in, n_out])?;
            widths.push(n_out);
        }
        Ok(widths)
    }

    fn llama(&mut self, config: &HfConfig) -> Result<LlamaConfig> {
        let hf = &config.text_config;
        let n_head_kv = hf.num_key_value_heads.unwrap_or(hf.num_attention_heads);
        let (n_head, dim) = (hf.num_attention_heads, hf.hidden_size);
        let fit = n_head > 0
            && n_head_kv > 0
            && n_head.is_multiple_of(n_head_kv)
            && dim.is_multiple_of(n_head)
            && (dim / n_head).is_multiple_of(2);
        ensure!(fit, "text_config: {n_head} and {n_head_kv} heads do not fit {dim} channels");
        let c = LlamaConfig {
            dim,
            n_layer: hf.num_hidden_layers,
            n_head,
            n_head_kv,
            n_ff: hf.intermediate_size,
            n_vocab: hf.vocab_size as usize,
            n_ctx: hf.max_position_embeddings,
            eps: hf.rms_norm_eps,
            rope_base: hf.rope_base()?,
        };
        let model = |part: &str| format!("language_model.model.{part}.weight");
        self.matrix("token_embd", &model("embed_tokens"), Role::Embedding, [dim, c.n_vocab])?;
        for i in 0..c.n_layer {
            self.layer(&c, i)?;
        }
        self.vector("output_norm.weight", &model("norm"), dim, dim)?;
        Ok(c)
    }

    /// The matrix that computes logits. Its rows for action tokens are stored a second time: they may get a better type.
    fn token_head(&mut self, config: &HfConfig, c: &LlamaConfig) -> Result<()> {
        self.matrix("output", LM_HEAD, Role::Head, [c.dim, c.n_vocab])?;
        let actions = config.actions()?;
        let n_row = actions.n_bin as usize;
        let name = "action_head.weight".to_owned();
        self.add(name, &[c.dim, n_row], Role::ActionHead, &[LM_HEAD.into()]);
        self.tensors.last_mut().expect("one was added").first_row = actions.rows().start;
        Ok(())
    }

    /// q, k, v and gate, up are adjacent in the file, so that a reader may join them.
    fn layer(&mut self, c: &LlamaConfig, i: usize) -> Result<()> {
        let (dim, kv) = (c.dim, c.n_head_kv * c.head_dim());
        let to = |part: &str| format!("blk.{i}.{part}");
        let from = |part: &str| format!("language_model.model.layers.{i}.{part}.weight");
        let matrix = |mapper: &mut Self, name: &str, source: &str, size| {
            mapper.matrix(&to(name), &from(source), Role::Llama, size)
        };
        matrix(self, "attn_q", "self_attn.q_proj", [dim, dim])?;
        self.set_rope_heads(c.n_head);
        matrix(self, "attn_k", "self_attn.k_proj", [dim, kv])?;
        self.set_rope_heads(c.n_head_kv);
        matrix(self, "attn_v", "self_attn.v_proj", [dim, kv])?;
        matrix(self, "attn_output", "self_attn.o_proj", [dim, dim])?;
        matrix(self, "ffn_gate", "mlp.gate_proj", [dim, c.n_ff])?;
        matrix(self, "ffn_up", "mlp.up_proj", [dim, c.n_ff])?;
        matrix(self, "ffn_down", "mlp.down_proj", [c.n_ff, dim])?;
        self.vector(&to("attn_norm.weight"), &from("input_layernorm"), dim, dim)?;
        self.vector(&to("ffn_norm.weight"), &from("post_attention_layernorm"), dim, dim)
    }
}
