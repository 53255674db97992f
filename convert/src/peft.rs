//! `adapter_config.json`: what an adapter's numbers mean.
//!
//! Every setting that changes the sum is computed as peft does, or refused by its name; so is a
//! setting that this version has never heard of, unless it is off. Fields are those of peft 0.11.1
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
    target_modules: Option<Names>,
    #[serde(default)]
    exclude_modules: Option<Names>,
    #[serde(default)]
    layers_to_transform: Option<Layers>,
    /// All others.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// Names of modules, or ends of such names; or a regular expression, as Python has them.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Names {
    Ends(Vec<String>),
    Pattern(String),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Layers {
    One(usize),
    Several(Vec<usize>),
}

/// Settings that say nothing of the sum: about training, about where things came from, or about
/// what another setting, which is refused, would do.
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
    /// Holds that the adapter is a product that is added to the base model's weights.
    ///
    /// # Errors
    /// Names the setting that makes it something else.
    pub fn check(&self) -> Result<()> {
        let Self { peft_type, r, lora_alpha, bias, .. } = self;
        ensure!(peft_type == "LORA", "peft_type is {peft_type}; LORA is merged. Otherwise {MERGE}");
        ensure!((1..=4096).contains(r), "r is {r}; 1 to 4096 is needed");
        ensure!(self.scale().is_finite(), "lora_alpha is {lora_alpha}; a finite number is needed");
        let bias = bias.as_deref().unwrap_or("none");
        ensure!(bias == "none", "bias is {bias}, and biases are not merged; {MERGE}");
        self.check_start()?;
        if let Some(Names::Pattern(pattern)) = &self.exclude_modules {
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

    /// Some ways to start training change the base model's weights too, and peft does so again
    /// whenever it loads the adapter.
    fn check_start(&self) -> Result<()> {
        let start = &self.init_lora_weights;
        let plain = match start {
            Value::Null | Value::Bool(_) => true,
            Value::String(name) => name.eq_ignore_ascii_case("gaussian"),
            _ => false,
        };
        ensure!(
            plain,
            "init_lora_weights is {start}: such a start may change the base model's weights too, \
             and the adapter is not the whole difference; {MERGE}"
        );
        Ok(())
    }

    /// What the product is multiplied by.
    pub fn scale(&self) -> f32 {
        let rank = self.r as f64;
        let divisor = if self.use_rslora == Some(true) { rank.sqrt() } else { rank };
        (self.lora_alpha / divisor) as f32
    }

    /// Whether the targets are names, so that [`PeftConfig::targets`] tells all modules that peft changes.
    pub fn names_targets(&self) -> bool {
        matches!(self.target_modules, Some(Names::Ends(_)))
    }

    /// Whether peft would make a module one of those that it changes.
    pub fn targets(&self, module: &str) -> bool {
        let named = |names: &Option<Names>, otherwise| match names {
            Some(Names::Ends(ends)) => ends.iter().any(|end| {
                module
                    .strip_suffix(end.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }),
            // "all-linear", or a pattern by which peft chose the modules that it then saved.
            Some(Names::Pattern(_)) | None => otherwise,
        };
        let layers = match &self.layers_to_transform {
            Some(Layers::One(layer)) => std::slice::from_ref(layer),
            Some(Layers::Several(layers)) => layers,
            None => &[],
        };
        let layer = || module.split('.').find_map(|part| part.parse().ok());
        named(&self.target_modules, true)
            && !named(&self.exclude_modules, false)
            && (layers.is_empty() || layer().is_some_and(|layer| layers.contains(&layer)))
    }
}
