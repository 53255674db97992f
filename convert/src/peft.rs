//! `adapter_config.json`: the settings of a LoRA adapter.
//!
//! A setting that changes the merged weights is either applied as peft does or refused by name; an
//! unknown setting is refused unless it is off. Fields are those of peft 0.11.1
//! to 0.21.
//!
//! ref: peft 0.11.1 `LoraConfig`, `LoraLayer.update_layer`, `check_target_module_exists`

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// The settings of a LoRA adapter.
#[derive(Debug, Deserialize)]
pub struct PeftConfig {
    peft_type: String,
    /// The rank.
    pub r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: Option<bool>,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    init_lora_weights: Value,
    #[serde(default)]
    target_modules: Option<ModuleSet>,
    #[serde(default)]
    exclude_modules: Option<ModuleSet>,
    #[serde(default)]
    layers_to_transform: Option<LayerSet>,
    /// All others.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// A set of modules: by names or suffixes of names, or by a regular expression in Python's syntax.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ModuleSet {
    Suffixes(Vec<String>),
    Pattern(String),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum LayerSet {
    One(usize),
    Several(Vec<usize>),
}

/// Settings that do not change the merged weights: those about training or about where the adapter came
/// from, and details of another setting that is refused.
const IRRELEVANT: [&str; 10] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

const MERGE: &str = "merge it with peft (merge_and_unload), save the whole model with \
     save_pretrained, and convert that";

impl PeftConfig {
    /// Checks that merging the adapter means adding `scale · B·A` and nothing else.
    ///
    /// # Errors
    /// Names the setting that means something else.
    pub fn check(&self) -> Result<()> {
        let Self { peft_type, r, lora_alpha, bias, .. } = self;
        ensure!(peft_type == "LORA", "peft_type is {peft_type}; LORA is merged. Otherwise {MERGE}");
        ensure!((1..=4096).contains(r), "r is {r}; 1 to 4096 is needed");
        ensure!(self.scale().is_finite(), "lora_alpha is {lora_alpha}; a finite number is needed");
        let bias = bias.as_deref().unwrap_or("none");
        ensure!(bias == "none", "bias is {bias}, and biases are not merged; {MERGE}");
        self.check_initialization()?;
        if let Some(ModuleSet::Pattern(pattern)) = &self.exclude_modules {
            bail!("exclude_modules is the pattern {pattern:?}; {MERGE}");
        }
        for (key, value) in &self.others {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Object(map) => map.is_empty(),
                Value::Array(list) => list.is_empty(),
                _ => false,
            };
            ensure!(
                off || IRRELEVANT.contains(&key.as_str()),
                "{key} is {value}, which this version does not merge; {MERGE}"
            );
        }
        Ok(())
    }

    /// Some initializations change the base model's weights too, and peft repeats that whenever it loads
    /// the adapter.
    fn check_initialization(&self) -> Result<()> {
        let init = &self.init_lora_weights;
        let plain = match init {
            Value::Null | Value::Bool(_) => true,
            Value::String(name) => name.eq_ignore_ascii_case("gaussian"),
            _ => false,
        };
        ensure!(
            plain,
            "init_lora_weights is {init}: that may change the base model's weights too, and the \
             adapter is then not the whole difference; {MERGE}"
        );
        Ok(())
    }

    /// The factor of `B·A`.
    pub fn scale(&self) -> f32 {
        let rank = self.r as f64;
        let divisor = if self.use_rslora == Some(true) { rank.sqrt() } else { rank };
        (self.lora_alpha / divisor) as f32
    }

    /// Whether the targets are given by name, so that [`PeftConfig::targets`] is exact.
    pub fn names_targets(&self) -> bool {
        matches!(self.target_modules, Some(ModuleSet::Suffixes(_)))
    }

    /// Whether peft would change a module.
    pub fn targets(&self, module: &str) -> bool {
        let named = |names: &Option<ModuleSet>, otherwise| match names {
            Some(ModuleSet::Suffixes(suffixes)) => suffixes.iter().any(|suffix| {
                module
                    .strip_suffix(suffix.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }),
            // "all-linear", or a pattern by which peft chose the modules that it then saved.
            Some(ModuleSet::Pattern(_)) | None => otherwise,
        };
        let layers = match &self.layers_to_transform {
            Some(LayerSet::One(layer)) => std::slice::from_ref(layer),
            Some(LayerSet::Several(layers)) => layers,
            None => &[],
        };
        let layer = || module.split('.').find_map(|part| part.parse().ok());
        named(&self.target_modules, true)
            && !named(&self.exclude_modules, false)
            && (layers.is_empty() || layer().is_some_and(|layer| layers.contains(&layer)))
    }
}
