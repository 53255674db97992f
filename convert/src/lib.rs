//! Hugging Face checkpoints of OpenVLA to one self-contained GGUF file.
//!
//! | file | what it does |
//! |---|---|
//! | [`source`], [`tensors`] | the folder: JSON files, shards, tensors, as found |
//! | [`lora`] | an adapter's folder, and what it adds to each tensor |
//! | [`names`] | the table: which tensors become which, and how |
//! | [`describe`] | the metadata: what the runtime's `Config` says about the checkpoint |
//! | [`cards`] | what each number of a motion is, as far as that is known |
//! | [`plan`] | which type each tensor gets |
//! | [`mod@write`] | read, sort, pad, convert, write |
//! | [`tokenizer`] | tokenizer files to a vocabulary |
//! | [`inspect`] | the way back: what a file says and holds |
//!
//! Data flows from top to bottom; nothing is written before everything was checked.

pub mod cards;
pub mod describe;
pub mod inspect;
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

use crate::lora::Adapter;
use crate::names::{Layout, Shapes};
use crate::plan::{Encoding, Planned};
use crate::source::Source;
use crate::write::Ingredients;

/// A checkpoint that was read and checked, and what its file will hold.
pub struct Conversion {
    source: Source,
    adapter: Option<Adapter>,
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
    pub fn new(checkpoint: &Path, encoding: Encoding) -> Result<Self> {
        Self::with_adapter(checkpoint, None, encoding)
    }

    /// The same, with a LoRA adapter's folder merged into it. The statistics beside the adapter are
    /// the fine-tuned model's, and replace the checkpoint's.
    ///
    /// # Errors
    /// As [`Conversion::new`].
    pub fn with_adapter(
        checkpoint: &Path,
        adapter: Option<&Path>,
        encoding: Encoding,
    ) -> Result<Self> {
        let mut source = Source::open(checkpoint)?;
        let shapes: Shapes = (source.tensors.entries().iter())
            .map(|(name, entry)| (name.clone(), entry.shape.clone()))
            .collect();
        source.files.adapter = adapter.map(source::folder_name);
        let adapter = adapter.map(|dir| Adapter::open(dir, &shapes)).transpose()?;
        if let Some(statistics) = adapter.as_ref().and_then(|adapter| adapter.statistics.clone()) {
            source.files.statistics = statistics;
        }
        let cannot = || format!("{} cannot be converted", checkpoint.display());
        describe::check_model(&source.files.config).with_context(cannot)?;
        let layout = names::layout(&source.files.config, &shapes).with_context(cannot)?;
        for name in layout.parts.iter().flat_map(|part| &part.sources) {
            source.tensors.check_type(name)?;
        }
        let config =
            describe::describe(&source.files, &shapes, &layout, encoding).with_context(cannot)?;
        let plan = plan::plan(&layout, encoding);
        Ok(Self { source, adapter, layout, config, plan })
    }

    /// A name by ggml's scheme: `OpenVLA-7B-v1.0-IQ4_NL.gguf`.
    pub fn file_name(&self, encoding: Encoding) -> PathBuf {
        let general = &self.config.general;
        let finetune = general.finetune.as_ref().map(|name| format!("-{name}")).unwrap_or_default();
        let (base, size, version) = (&general.basename, &general.size_label, &general.version);
        format!("{base}-{size}{finetune}-{version}-{}.gguf", encoding.name).into()
    }

    /// Bytes of all tensors in the file.
    pub fn data_bytes(&self) -> u64 {
        self.plan.iter().map(|planned| (planned.row_bytes() * planned.n_row()) as u64).sum()
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
        let from = Ingredients { tensors: &self.source.tensors, adapter: self.adapter.as_ref() };
        write::write(&from, &header, &self.plan, out, progress)
    }
}
