//! Hugging Face checkpoints of OpenVLA to one self-contained GGUF file.
//!
//! | file | what it does |
//! |---|---|
//! | [`source`], [`tensors`] | the folder: JSON files, shards, tensors, as found |
//! | [`lora`] | an adapter's folder, and what it adds to each tensor |
//! | [`names`] | the table: which tensors become which, and how |
//! | [`describe`] | the metadata: what the runtime's `Config` says about the checkpoint |
//! | [`plan`] | which type each tensor gets |
//! | [`imatrix`] | how much each column of a tensor counts |
//! | [`mod@write`] | read, sort, pad, convert, write |
//! | [`tokenizer`] | tokenizer files to a vocabulary |
//! | [`calibrate`] | a file and robot prompts to such an importance matrix |
//!
//! Data flows from top to bottom; nothing is written before everything was checked.

pub mod calibrate;
pub mod describe;
pub mod imatrix;
pub mod lora;
pub mod names;
pub mod plan;
pub mod source;
pub mod tensors;
pub mod tokenizer;
pub mod write;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use openvla::Config;
use openvla_kernels::Header;

use crate::imatrix::Importance;
use crate::lora::Adapter;
use crate::names::{Layout, Shapes};
use crate::plan::{Encoding, Override, Planned};
use crate::source::Source;
use crate::write::Ingredients;

/// More rows than an instruction and a motion mostly have.
const PROMPT_ROWS: usize = 64;

/// What a file is to be made of, beside a checkpoint, and how.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The type it is named after.
    pub encoding: Encoding,
    /// Other types for some tensors; later ones win.
    pub overrides: Vec<Override>,
    /// Folder of a LoRA adapter to merge first. The statistics beside it are the fine-tuned
    /// model's, and replace the checkpoint's.
    pub adapter: Option<PathBuf>,
    /// An importance matrix in llama.cpp's GGUF format, collected on this model.
    pub importance: Option<PathBuf>,
}

impl From<Encoding> for Options {
    /// That type, and nothing else.
    fn from(encoding: Encoding) -> Self {
        Self { encoding, ..Self::default() }
    }
}

/// A checkpoint that was read and checked, and what its file will hold.
pub struct Conversion {
    source: Source,
    adapter: Option<Adapter>,
    importance: Option<Importance>,
    encoding: Encoding,
    /// Tensors that the model never reads are named in it.
    pub layout: Layout,
    /// The file's metadata.
    pub config: Config,
    /// The file's tensors.
    pub plan: Vec<Planned>,
}

impl Conversion {
    /// Reads a checkpoint folder and plans its file.
    ///
    /// # Errors
    /// Whatever is missing, damaged, or of another model, by name.
    pub fn new(checkpoint: &Path, options: &Options) -> Result<Self> {
        let mut source = Source::open(checkpoint)?;
        let shapes: Shapes = (source.tensors.entries().iter())
            .map(|(name, entry)| (name.clone(), entry.shape.clone()))
            .collect();
        let adapter = options.adapter.as_deref();
        let adapter = adapter.map(|dir| Adapter::open(dir, &shapes)).transpose()?;
        if let Some(statistics) = adapter.as_ref().and_then(|adapter| adapter.statistics.clone()) {
            source.files.statistics = statistics;
        }
        let encoding = options.encoding;
        let cannot = || format!("{} cannot be converted", checkpoint.display());
        describe::check_model(&source.files.config).with_context(cannot)?;
        let layout = names::layout(&source.files.config, &shapes).with_context(cannot)?;
        for name in layout.parts.iter().flat_map(|part| &part.sources) {
            source.tensors.check_type(name)?;
        }
        let config =
            describe::describe(&source.files, &shapes, &layout, encoding).with_context(cannot)?;
        let plan = plan::plan(&layout, encoding, &options.overrides)?;
        let importance = options.importance.as_deref();
        let importance = importance.map(|path| Importance::open(path, &plan)).transpose()?;
        Ok(Self { source, adapter, importance, encoding, layout, config, plan })
    }

    /// A name by ggml's scheme: `OpenVLA-7B-v1.0-Q4_K_M.gguf`.
    pub fn file_name(&self) -> PathBuf {
        let general = &self.config.general;
        let finetune = general.finetune.as_ref().map(|name| format!("-{name}")).unwrap_or_default();
        let (base, size, version) = (&general.basename, &general.size_label, &general.version);
        format!("{base}-{size}{finetune}-{version}-{}.gguf", self.encoding.name).into()
    }

    /// Bytes of all tensors in the file.
    pub fn data_bytes(&self) -> u64 {
        self.plan.iter().map(|planned| planned.bytes() as u64).sum()
    }

    /// What the file holds by component and type, and what a device needs to run it, for people.
    pub fn summary(&self) -> String {
        let llama = &self.config.llama;
        let rows = self.config.n_patch() + PROMPT_ROWS;
        let cache = 2 * 2 * llama.n_head_kv * llama.head_dim() * llama.n_layer * rows;
        let weights = self.data_bytes();
        format!(
            "{}on the device: {weights} bytes of weights, {cache} of keys and values at {rows} rows, \
             and what lies between operations\n",
            plan::summary(&self.plan)
        )
    }

    /// Writes the file.
    ///
    /// # Errors
    /// What cannot be read, converted or written. The file is then as it was before.
    pub fn write(&self, out: &Path, progress: &ProgressBar) -> Result<()> {
        let mut header = Header::default();
        self.config.write(&mut header);
        for planned in &self.plan {
            header.tensor(&planned.part.name, planned.dtype, planned.part.shape);
        }
        let from = Ingredients {
            tensors: &self.source.tensors,
            adapter: self.adapter.as_ref(),
            importance: self.importance.as_ref(),
        };
        write::write(&from, &header, &self.plan, out, progress)
    }
}
