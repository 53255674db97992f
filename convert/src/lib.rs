//! Hugging Face checkpoints of OpenVLA to one self-contained GGUF file.
//!
//! | file | what it does |
//! |---|---|
//! | [`hub`] | a repository's files, downloaded into the Hub's cache |
//! | [`files`], [`kinds`] | what can be read, and what a folder is if not a checkpoint |
//! | [`source`], [`tensors`] | the folder: JSON files, shards, tensors, as found |
//! | [`settings`] | `config.json` and `preprocessor_config.json`, and whether that is run |
//! | [`lora`], [`peft`] | an adapter's folder and settings, and what it adds to each tensor |
//! | [`aliases`], [`names`] | the table: which tensors become which, and how; what else those are called |
//! | [`describe`] | the metadata: what the runtime's `Config` says about the checkpoint |
//! | [`cards`] | what each number of a motion is, as far as that is known |
//! | [`plan`] | which type each tensor gets |
//! | [`imatrix`] | how much each column of a tensor counts |
//! | [`mod@write`] | read, sort, pad, convert |
//! | [`random`] | or no checkpoint at all: random weights |
//! | [`fingerprint`] | what tells its weights from those of other checkpoints |
//! | [`prove`] | reference cases in f32, and checksums |
//! | [`verify`] | a file held against what it says of itself |
//! | [`beside`], [`interrupt`] | a file that is there whole or not at all |
//! | [`tokenizer`] | tokenizer files to a vocabulary |
//! | [`export`] | a file's Llama to a file for llama.cpp |
//! | [`calibrate`] | a file and robot prompts to an importance matrix |
//! | [`inspect`] | the way back: what a file says and holds |
//!
//! Data flows from top to bottom; nothing is written before everything was checked.

pub mod aliases;
pub mod beside;
pub mod calibrate;
pub mod cards;
pub mod describe;
pub mod export;
pub mod files;
pub mod fingerprint;
#[cfg_attr(not(feature = "hub"), path = "hub_none.rs")]
pub mod hub;
pub mod imatrix;
pub mod inspect;
pub mod interrupt;
pub mod kinds;
pub mod lora;
pub mod names;
pub mod peft;
pub mod plan;
pub mod prove;
pub mod random;
pub mod settings;
pub mod source;
pub mod tensors;
pub mod tokenizer;
pub mod verify;
pub mod write;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use openvla::{Config, Proof};
use openvla_example::Spec;
use openvla_kernels::Header;

use crate::beside::Beside;
use crate::imatrix::Importance;
use crate::lora::Adapter;
use crate::names::{Layout, Shapes};
use crate::plan::{Encoding, Override, Planned};
use crate::random::Random;
use crate::source::{Files, Source, StatisticsText};
use crate::write::{Ingredients, Origin};

/// More than reference cases take.
const PROOF_BYTES: usize = 1 << 20;
/// More rows than an instruction and a motion mostly have.
const PROMPT_ROWS: usize = 64;

/// What a file is to be made of, beside a checkpoint, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The type it is named after.
    pub encoding: Encoding,
    /// Other types for some tensors; later ones win.
    pub overrides: Vec<Override>,
    /// Folder of a LoRA adapter to merge first.
    pub adapter: Option<PathBuf>,
    /// The statistics. Without: those beside the adapter, which are the fine-tuned model's, else the
    /// checkpoint's.
    pub statistics: Option<PathBuf>,
    /// An importance matrix in llama.cpp's GGUF format, collected on this model.
    pub importance: Option<PathBuf>,
    /// Whether the file is to hold reference cases, computed in f32 from the checkpoint.
    pub proof: bool,
    /// Threads that convert and compute.
    pub n_threads: usize,
}

impl Default for Options {
    /// `--q4`, without reference cases, on all cores.
    fn default() -> Self {
        Self {
            encoding: Encoding::default(),
            overrides: Vec::new(),
            adapter: None,
            statistics: None,
            importance: None,
            proof: false,
            n_threads: openvla::cli::Threads::default().count(),
        }
    }
}

impl From<Encoding> for Options {
    /// That type, and nothing else.
    fn from(encoding: Encoding) -> Self {
        Self { encoding, ..Self::default() }
    }
}

/// A checkpoint that was read and checked, and what its file will hold.
pub struct Conversion {
    origin: Box<dyn Origin>,
    encoding: Encoding,
    proof: bool,
    n_threads: usize,
    /// Where the statistics are from, for people.
    pub statistics: String,
    /// What a user should know of the inputs before relying on the file, a sentence each.
    pub warnings: Vec<String>,
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
        let Source { mut files, tensors, mut warnings } = Source::open(checkpoint)?;
        let shapes: Shapes = (tensors.entries().iter())
            .map(|(name, entry)| (name.clone(), entry.shape.clone()))
            .collect();
        let cannot = || format!("{} cannot be converted", checkpoint.display());
        files.config.check().with_context(cannot)?;
        settings::check_not_quantized(shapes.keys()).with_context(cannot)?;
        let dir = options.adapter.as_deref();
        files.adapter = dir.map(source::name).transpose()?;
        let mut adapter = dir.map(|dir| Adapter::open(dir, &tensors)).transpose()?;
        let beside = adapter.as_mut().and_then(|adapter| adapter.statistics.take());
        warnings.extend(adapter.iter().flat_map(|adapter| adapter.warnings.clone()));
        let statistics = match (&options.statistics, beside) {
            (Some(path), _) => StatisticsText::read(path)?,
            (None, Some(statistics)) => statistics,
            (None, None) => {
                let statistics = StatisticsText::of(&files)?;
                warnings.extend(match dir {
                    Some(dir) => Some(lora::no_statistics(dir, &statistics)),
                    None => source::inherited(&files, &statistics),
                });
                statistics
            }
        };
        let Options { encoding, proof, n_threads, .. } = *options;
        let layout = names::layout(&files.config, &shapes).with_context(cannot)?;
        for name in layout.parts.iter().flat_map(|part| &part.sources) {
            tensors.check_type(name)?;
        }
        let parsed = statistics.parse().with_context(cannot)?;
        let config = describe::describe(&files, parsed, &shapes, &layout, encoding);
        let mut config = config.with_context(cannot)?;
        let fingerprint = fingerprint::fingerprint(&layout, &tensors, adapter.as_ref())?;
        config.general.source.fingerprint = Some(fingerprint);
        let plan = plan::plan(&layout, encoding, &options.overrides)?;
        let importance = options.importance.as_deref();
        let importance = importance.map(|path| Importance::open(path, &plan)).transpose()?;
        let origin = Box::new(Ingredients { tensors, adapter, importance, n_threads });
        let statistics = statistics.from;
        Ok(Self { origin, encoding, proof, n_threads, statistics, warnings, layout, config, plan })
    }

    /// Plans the file that a random checkpoint would become, without that checkpoint. Its weights
    /// are as large as those of [`openvla_example::write`], but others: see [`random`].
    ///
    /// # Errors
    /// If the system has no room for the settings, a few megabytes.
    pub fn random(spec: &Spec, encoding: Encoding, n_threads: usize) -> Result<Self> {
        let root = tempfile::tempdir().context("cannot make a folder for temporary files")?;
        let dir = root.path().join(spec.folder());
        std::fs::create_dir(&dir)?;
        openvla_example::write_settings(&dir, spec)?;
        let files = Files::open(&dir)?;
        let tensors = spec.tensors();
        let shapes: Shapes = tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        let layout = names::layout(&files.config, &shapes)?;
        let statistics = StatisticsText::of(&files)?;
        let parsed = statistics.parse()?;
        let mut config = describe::describe(&files, parsed, &shapes, &layout, encoding)?;
        config.general.source.fingerprint = Some(format!("{:016x}", spec.seed));
        let plan = plan::plan(&layout, encoding, &[])?;
        let origin = Box::new(Random::new(tensors, spec.seed, n_threads));
        let (statistics, warnings) = (statistics.from, Vec::new());
        let proof = false;
        Ok(Self { origin, encoding, proof, n_threads, statistics, warnings, layout, config, plan })
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

    /// Writes the file. `progress` counts bytes: first, if cases are to be proven, those that go
    /// into computing them, then the file's.
    ///
    /// # Errors
    /// What cannot be read, converted or written. The file is then as it was before.
    pub fn write(&self, out: &Path, progress: &ProgressBar) -> Result<()> {
        let mut proof = Proof { cases: Vec::new(), checksums: vec![0; self.plan.len()] };
        let header = self.header(&proof);
        let cases = if self.proof { PROOF_BYTES } else { 0 };
        let room = (header.encode().len() + header.data_bytes() + cases) as u64;
        let mut file = Beside::create(out, room)?;
        if self.proof {
            progress.set_length(prove::bytes(&self.config, &self.plan));
            progress.set_message("reference cases in f32");
            proof.cases = prove::cases(&self.config, self.n_threads, |prefix| {
                let part = write::in_f32(&*self.origin, &self.plan, prefix)?;
                progress.inc(part.bytes().len() as u64);
                Ok(part)
            })?;
        }
        progress.reset();
        progress.set_length(self.data_bytes());
        progress.set_message("tensors");
        file.append(&self.header(&proof).encode())?;
        proof.checksums.clear();
        write::tensors(&*self.origin, &self.plan, |bytes| {
            proof.checksums.push(prove::checksum(bytes));
            progress.inc(bytes.len() as u64);
            file.append(bytes)
        })?;
        file.replace_start(&self.header(&proof).encode())?;
        file.finish()
    }

    fn header(&self, proof: &Proof) -> Header {
        let mut header = Header::default();
        self.config.write(&mut header);
        proof.write(&mut header);
        for planned in &self.plan {
            header.tensor(&planned.part.name, planned.dtype, planned.part.shape);
        }
        header
    }
}
