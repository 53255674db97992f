//! `config.json` and `preprocessor_config.json`, and whether the runtime supports what they say.
//!
//! Keys are those of transformers 4.40 to 5. A key that would change the results is either read or
//! refused, unless it has its default value.

use anyhow::{Context, Result, bail, ensure};
use openvla::ActionSpace;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The keys of `config.json` that OpenVLA's code reads. Absent keys of the Llama have `LlamaConfig`'s
/// defaults: the published file states four of them.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are the file's own")]
pub struct HfConfig {
    pub model_type: String,
    pub llm_backbone_id: String,
    pub timm_model_ids: Vec<String>,
    #[serde(default)]
    pub timm_override_act_layers: Vec<Option<String>>,
    pub text_config: HfLlama,
    #[serde(default = "defaults::n_action_bins")]
    pub n_action_bins: u32,
    #[serde(default = "defaults::pad_to_multiple_of")]
    pub pad_to_multiple_of: u32,
    #[serde(default)]
    pub norm_stats: Option<Value>,
    pub use_fused_vision_backbone: Option<bool>,
    pub quantization_config: Option<Map<String, Value>>,
    pub load_in_4bit: Option<bool>,
    pub load_in_8bit: Option<bool>,
}

impl HfConfig {
    /// Checks that this version runs the model as the reference does.
    ///
    /// # Errors
    /// Names the setting that it does not support.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.model_type == "openvla",
            "config.json is of a `{}` model; `openvla` is needed",
            self.model_type
        );
        let configs = [&self.quantization_config, &self.text_config.quantization_config];
        if let Some(config) = configs.into_iter().flatten().find(|map| !map.is_empty()) {
            let by = config.get("quant_method").and_then(Value::as_str);
            refuse_quantized(by.unwrap_or("an unnamed method"), "quantization_config")?;
        }
        if [self.load_in_4bit, self.load_in_8bit].contains(&Some(true)) {
            refuse_quantized("bitsandbytes", "load_in_4bit or load_in_8bit")?;
        }
        self.text_config.check()?;
        let exact = |activation: &&String| activation.as_str() == "gelu";
        if let Some(other) = self.timm_override_act_layers.iter().flatten().find(|a| !exact(a)) {
            bail!("a tower's activation is `{other}`; only exact GELU is run");
        }
        Ok(())
    }

    /// The action tokens: the last of the vocabulary before its padding.
    ///
    /// # Errors
    /// If the vocabulary is too small for them.
    pub fn actions(&self) -> Result<ActionSpace> {
        let (n_vocab, padding, n_bin) =
            (self.text_config.vocab_size, self.pad_to_multiple_of, self.n_action_bins);
        let end = n_vocab.checked_sub(padding).filter(|end| *end > n_bin).with_context(|| {
            format!(
                "config.json: vocab_size is {n_vocab}, of which pad_to_multiple_of is {padding}; \
                 that leaves no room for {n_bin} actions"
            )
        })?;
        Ok(ActionSpace { end, n_bin })
    }
}

/// `config.json`'s `text_config`. ref: transformers 4.40.1 `LlamaConfig.__init__`
#[derive(Debug, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the fields are the file's own")]
pub struct HfLlama {
    pub model_type: String,
    pub vocab_size: u32,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub hidden_act: String,
    pub max_position_embeddings: usize,
    /// 1e-6, not the 1e-5 of Llama-2's own config: the published model does not state it.
    pub rms_norm_eps: f32,
    pub rope_theta: Option<f32>,
    pub rope_scaling: Option<Map<String, Value>>,
    /// All settings of rotary positions in transformers 5.
    pub rope_parameters: Option<Map<String, Value>>,
    pub partial_rotary_factor: Option<f64>,
    pub head_dim: Option<usize>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub tie_word_embeddings: Option<bool>,
    pub sliding_window: Option<Value>,
    pub layer_types: Option<Vec<String>>,
    pub quantization_config: Option<Map<String, Value>>,
}

impl Default for HfLlama {
    fn default() -> Self {
        Self {
            model_type: "llama".into(),
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
            partial_rotary_factor: None,
            head_dim: None,
            attention_bias: None,
            mlp_bias: None,
            tie_word_embeddings: None,
            sliding_window: None,
            layer_types: None,
            quantization_config: None,
        }
    }
}

impl HfLlama {
    /// `pretraining_tp` is not checked: it only changes how sums are split.
    fn check(&self) -> Result<()> {
        let Self { model_type, hidden_act, hidden_size, num_attention_heads, .. } = self;
        ensure!(model_type == "llama", "its language model is `{model_type}`; `llama` is needed");
        let silu = ["silu", "swish"].contains(&hidden_act.as_str());
        ensure!(silu, "its activation is `{hidden_act}`; `silu` is needed");
        self.rope_base()?;
        for (key, found) in [
            ("attention_bias: its attention has biases", self.attention_bias),
            ("mlp_bias: its MLP has biases", self.mlp_bias),
            ("tie_word_embeddings: its head is its embedding", self.tie_word_embeddings),
        ] {
            ensure!(found != Some(true), "text_config.{key}, which this version does not run");
        }
        let factor = self.partial_rotary_factor.unwrap_or(1.0);
        ensure!(factor == 1.0, "text_config.partial_rotary_factor is {factor}; 1 is needed");
        if let Some(head_dim) = self.head_dim {
            ensure!(
                head_dim.checked_mul(*num_attention_heads) == Some(*hidden_size),
                "text_config.head_dim is {head_dim}; {hidden_size} channels of \
                 {num_attention_heads} heads are run"
            );
        }
        if let Some(window) = &self.sliding_window {
            bail!("text_config.sliding_window is {window}; only full attention is run");
        }
        let full = |attention: &&String| attention.as_str() == "full_attention";
        if let Some(other) = self.layer_types.iter().flatten().find(|layer| !full(layer)) {
            bail!("text_config.layer_types has `{other}`; only full attention is run");
        }
        Ok(())
    }

    /// The base of the rotary positions, from whichever key states it.
    ///
    /// # Errors
    /// Names a setting that scales the positions, or bases that contradict each other.
    ///
    /// ref: transformers 5 `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`
    pub fn rope_base(&self) -> Result<f32> {
        let mut base = self.rope_theta;
        let sources =
            [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)];
        for (source, settings) in sources {
            for (key, value) in settings.iter().flatten() {
                match (key.as_str(), value) {
                    (_, Value::Null) => {}
                    ("rope_type" | "type", Value::String(kind)) if kind == "default" => {}
                    ("partial_rotary_factor" | "factor", Value::Number(one))
                        if one.as_f64() == Some(1.0) => {}
                    ("rope_theta", Value::Number(theta)) => {
                        let theta = theta.as_f64().map(|theta| theta as f32);
                        ensure!(
                            base.is_none() || base == theta,
                            "text_config has two bases of rotary positions: {base:?} and, in \
                             {source}, {theta:?}; remove one of them"
                        );
                        base = theta;
                    }
                    _ => bail!(
                        "text_config.{source}.{key} is {value}: it scales rotary positions, which \
                         this version does not"
                    ),
                }
            }
        }
        Ok(base.unwrap_or(10_000.0))
    }
}

mod defaults {
    pub fn n_action_bins() -> u32 {
        256
    }
    pub fn pad_to_multiple_of() -> u32 {
        64
    }
}

/// `preprocessor_config.json`. Its `tvf_*` values are authoritative: the reference computes its own from
/// `means` and `stds`, and then replaces them by these.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are the file's own")]
pub struct HfPreprocessor {
    pub tvf_resize_params: Vec<ResizeParams>,
    pub tvf_crop_params: Vec<CropParams>,
    pub tvf_normalize_params: Vec<NormalizeParams>,
    #[serde(default)]
    pub tvf_do_letterbox: bool,
    #[serde(default)]
    pub tvf_letterbox_fill: Option<[u8; 3]>,
}

/// One tower's `torchvision.transforms.Resize`.
#[derive(Debug, Deserialize, PartialEq)]
#[expect(missing_docs, reason = "the fields are the file's own")]
pub struct ResizeParams {
    pub size: ResizeSize,
    pub interpolation: u32,
    #[serde(default)]
    pub max_size: Option<u32>,
}

/// One number is the short side; two are height and width.
#[derive(Debug, Deserialize, PartialEq, Clone, Copy)]
#[serde(untagged)]
#[expect(missing_docs, reason = "the fields are the file's own")]
pub enum ResizeSize {
    Short(u32),
    Exact([u32; 2]),
}

/// One tower's `torchvision.transforms.CenterCrop`.
#[derive(Debug, Deserialize, PartialEq)]
#[expect(missing_docs, reason = "the fields are the file's own")]
pub struct CropParams {
    pub output_size: [u32; 2],
}

/// One tower's `torchvision.transforms.Normalize`.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are the file's own")]
pub struct NormalizeParams {
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

/// Suffixes of tensors that only quantized checkpoints have, and what wrote them.
const QUANTIZED_SUFFIXES: [(&str, &str); 10] = [
    (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_format", "bitsandbytes"),
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "FP8 or compressed-tensors"),
    (".weight_scale_inv", "FP8"),
    ("._data", "quanto"),
];

/// Checks that no tensor is one that only quantized checkpoints have, whatever their config says.
///
/// # Errors
/// Names what quantized the checkpoint.
pub fn check_not_quantized<'a>(tensors: impl IntoIterator<Item = &'a String>) -> Result<()> {
    for name in tensors {
        if let Some((_, by)) = QUANTIZED_SUFFIXES.iter().find(|(end, _)| name.ends_with(end)) {
            refuse_quantized(by, &format!("the tensor {name}"))?;
        }
    }
    Ok(())
}

fn refuse_quantized(by: &str, sign: &str) -> Result<()> {
    bail!(
        "the checkpoint is quantized already, by {by} ({sign}), and only weights of 16 or 32 bits \
         are converted; take the checkpoint that it was made from, or load it and save it in \
         bfloat16. The type of the file, such as --q4, is chosen here"
    )
}
