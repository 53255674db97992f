//! A Hugging Face checkpoint folder as found on disk, checked once.
//!
//! Tensors are found through every shard's own header; the index is only held against them. Data
//! is mapped tensor by tensor, so that memory stays small at any model size.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use openvla::ActionSpace;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::tensors::Tensors;

/// `config.json`, of which what OpenVLA's code reads. Absent fields of the Llama have
/// `LlamaConfig`'s defaults: the published file states four of them.
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
    pub norm_stats: Option<serde_json::Value>,
}

impl HfConfig {
    /// Which ids are actions: the last of the vocabulary before the rows that pad it.
    ///
    /// # Errors
    /// If the config's numbers leave no room for them.
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
    /// 1e-6, not the 1e-5 of Llama-2's own config, which the published model does not carry.
    pub rms_norm_eps: f32,
    pub rope_theta: f32,
    pub rope_scaling: Option<serde_json::Value>,
    pub attention_bias: bool,
    pub tie_word_embeddings: bool,
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
            rope_theta: 10_000.0,
            rope_scaling: None,
            attention_bias: false,
            tie_word_embeddings: false,
        }
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

/// `preprocessor_config.json`. Its `tvf_*` values are the truth: the reference computes them anew
/// from `means` and `stds` and then overwrites them with these.
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

/// A repository of the Hugging Face Hub at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `openvla/openvla-7b`
    pub repository: String,
    /// The commit's hash.
    pub revision: String,
}

/// What a checkpoint folder holds beside its tensors.
pub struct Files {
    /// The folder.
    pub dir: PathBuf,
    /// What the checkpoint is called: as its folder, or as its repository if the folder is a
    /// snapshot in the Hub's cache, which is named after a commit.
    pub name: String,
    /// Where it was downloaded from, if that is known.
    pub origin: Option<Origin>,
    /// What the LoRA adapter is called that is merged into it.
    pub adapter: Option<String>,
    /// `config.json`
    pub config: HfConfig,
    /// `preprocessor_config.json`
    pub preprocessor: HfPreprocessor,
    /// The text of `dataset_statistics.json`, or of the config's `norm_stats` without it.
    pub statistics: String,
}

/// A checkpoint folder: what its JSON files say, and where its tensors are.
pub struct Source {
    /// The JSON files.
    pub files: Files,
    /// Every tensor of every shard.
    pub tensors: Tensors,
}

impl Files {
    /// Reads a folder's JSON files. Its shards need not be there.
    ///
    /// # Errors
    /// What is missing, damaged, or of an OpenVLA-OFT checkpoint, by name.
    pub fn open(dir: &Path) -> Result<Self> {
        ensure!(dir.is_dir(), "{} is not a folder with an OpenVLA checkpoint", dir.display());
        let entries = std::fs::read_dir(dir)?.collect::<std::io::Result<Vec<_>>>()?;
        let names: Vec<_> = entries.iter().map(|entry| entry.file_name()).collect();
        refuse_oft(&dir.display(), names.iter().map(|name| name.to_string_lossy()))?;
        let config: HfConfig = read_json(&dir.join("config.json"))?;
        let preprocessor = read_json(&dir.join("preprocessor_config.json"))?;
        let statistics = read_statistics(dir, &config)?;
        Ok(Self {
            dir: dir.to_owned(),
            name: name(dir)?,
            origin: origin(dir)?,
            adapter: None,
            config,
            preprocessor,
            statistics,
        })
    }
}

/// Where the Hub has what is in a folder: a snapshot in its cache is
/// `models--USER--REPO/snapshots/COMMIT`.
///
/// # Errors
/// If there is no such folder.
pub fn origin(dir: &Path) -> Result<Option<Origin>> {
    let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
    let folders: Vec<_> = dir.iter().rev().take(3).map(|name| name.to_string_lossy()).collect();
    let [revision, snapshots, repository] = folders.as_slice() else { return Ok(None) };
    let repository = repository.strip_prefix("models--").filter(|_| snapshots == "snapshots");
    Ok(repository.map(|repository| Origin {
        repository: repository.replace("--", "/"),
        revision: revision.clone().into_owned(),
    }))
}

/// What a folder is called: as its repository if the Hub has it, whichever way it was named.
///
/// # Errors
/// If there is no such folder.
pub fn name(dir: &Path) -> Result<String> {
    if let Some(Origin { repository, .. }) = origin(dir)? {
        return Ok(repository.rsplit('/').next().unwrap_or_default().to_owned());
    }
    let dir = dir.canonicalize()?;
    Ok(dir.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

impl Source {
    /// Reads a folder's JSON files and its shards' headers.
    ///
    /// # Errors
    /// What is missing or damaged, by name.
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self { files: Files::open(dir)?, tensors: read_shards(dir)? })
    }
}

/// The tensors of all shards, held against the index.
fn read_shards(dir: &Path) -> Result<Tensors> {
    let mut tensors = Tensors::default();
    let Some(index) = Index::read(dir)? else {
        tensors.add(&dir.join(WEIGHTS))?;
        return Ok(tensors);
    };
    for shard in index.shards() {
        tensors.add(&dir.join(shard))?;
    }
    for (name, shard) in &index.weight_map {
        ensure!(
            tensors.entries().contains_key(name),
            "{} says that {shard} holds the tensor {name}, which is in no shard; \
             download that shard again",
            dir.join(INDEX).display()
        );
    }
    Ok(tensors)
}

/// The file that lists the shards of a large checkpoint.
pub const INDEX: &str = "model.safetensors.index.json";
/// The only shard of a small one, which has no index.
pub const WEIGHTS: &str = "model.safetensors";

/// Which shard holds which tensor.
#[derive(Deserialize)]
pub struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads a folder's index, if there is one.
    ///
    /// # Errors
    /// Names the file if it is damaged, or asks for files elsewhere.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(INDEX);
        if !path.exists() {
            return Ok(None);
        }
        let index: Self = read_json(&path)?;
        for shard in index.shards() {
            let plain = Path::new(shard).file_name().is_some_and(|name| name == shard);
            ensure!(plain, "{} names the shard {shard:?}, no plain file name", path.display());
        }
        Ok(Some(index))
    }

    /// The shards' file names.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Reads a JSON file. One that lacks what is needed, or is no JSON, is named.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} cannot be used", path.display()))
}

/// A fine-tuned checkpoint still carries its base model's statistics in `config.json`, so the file
/// beside it wins: the wrong ones move a robot wrongly without a word.
fn read_statistics(dir: &Path, config: &HfConfig) -> Result<String> {
    if let Some(statistics) = dataset_statistics(dir)? {
        return Ok(statistics);
    }
    match &config.norm_stats {
        Some(stats) => Ok(stats.to_string()),
        None => bail!(
            "{} has no dataset_statistics.json, and its config.json no norm_stats; without them \
             tokens cannot become motions. finetune.py leaves the file in its run folder",
            dir.display()
        ),
    }
}

/// The text of a folder's `dataset_statistics.json`, if there is one.
///
/// # Errors
/// Names the file if it cannot be read.
pub fn dataset_statistics(dir: &Path) -> Result<Option<String>> {
    let path = dir.join("dataset_statistics.json");
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path);
    text.map(Some).with_context(|| format!("cannot read {}", path.display()))
}

/// An OpenVLA-OFT checkpoint has OpenVLA's own config and tensors, plus a head of its own, without
/// which its motions are wrong. It is told by the names of its files.
///
/// # Errors
/// Names the checkpoint, and the file that gives it away.
pub fn refuse_oft(
    checkpoint: &dyn Display,
    names: impl IntoIterator<Item = impl AsRef<str>>,
) -> Result<()> {
    for name in names {
        let name = name.as_ref();
        let oft = ["action_head--", "proprio_projector--", "noisy_action_projector--"];
        ensure!(
            !oft.iter().any(|prefix| name.starts_with(prefix)),
            "{checkpoint} holds {name}: it is an OpenVLA-OFT checkpoint, whose parallel decoding \
             and action head this version does not run"
        );
    }
    Ok(())
}
