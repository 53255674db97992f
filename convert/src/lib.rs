//! Converts OpenVLA checkpoints in Hugging Face's format to one self-contained GGUF file.
//!
//! | file | what it does |
//! |---|---|
//! | [`interrupt`], [`atomic_file`] | Ctrl-C as an error; output that is written whole or not at all |
//! | [`files`], [`recognize`] | reading files of other programs; what a folder is if not a checkpoint |
//! | [`aliases`], [`tensors`] | safetensors files, and the other names of their tensors |
//! | [`torch`] | tensors in PyTorch's `.pt` files |
//! | [`hf_config`] | `config.json` and `preprocessor_config.json`, and whether the runtime supports them |
//! | [`run_files`], [`oft`] | OpenVLA-OFT runs: their own files, and the settings that no file states |
//! | [`checkpoint`] | the folder: JSON files, shards, statistics |
//! | [`tokenizer`] | tokenizer files to a vocabulary |
//! | [`hub`] | a repository's files, downloaded into the Hub's cache |
//! | [`peft`], [`lora`] | an adapter's settings, and what it adds to each tensor |
//! | [`merged`] | how often an adapter is in a run's weights |
//! | [`mapper`], [`mapping`] | the table: which tensors of the checkpoint become which of the file |
//! | [`plan`] | the type of each tensor |
//! | [`imatrix`] | importance matrices: reading them, collecting them |
//! | [`cards`], [`describe`] | the metadata: the runtime's `Config` of the checkpoint |
//! | [`fingerprint`] | a hash that tells the weights from those of other checkpoints |
//! | [`sha256`], [`inputs`] | the hash of every file that was read |
//! | [`weights`] | reads, reorders, pads and converts each tensor |
//! | [`random`] | random weights in place of a checkpoint's |
//! | [`proof`] | reference cases in f32, and checksums |
//! | [`verify`], [`certificate`] | files that were written, checked; and what another machine is to find |
//! | [`inspect`], [`export`] | described, for llama.cpp |
//!
//! Data flows from top to bottom; everything is checked before anything is written.

pub mod aliases;
pub mod atomic_file;
pub mod cards;
pub mod certificate;
pub mod checkpoint;
pub mod describe;
pub mod export;
pub mod files;
pub mod fingerprint;
pub mod hf_config;
#[cfg_attr(not(feature = "hub"), path = "hub_none.rs")]
pub mod hub;
pub mod imatrix;
pub mod inputs;
pub mod inspect;
pub mod interrupt;
pub mod lora;
pub mod mapper;
pub mod mapping;
pub mod merged;
pub mod oft;
pub mod peft;
pub mod plan;
pub mod proof;
pub mod random;
pub mod recognize;
pub mod run_files;
pub mod sha256;
pub mod tensors;
pub mod tokenizer;
pub mod torch;
pub mod verify;
pub mod weights;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use openvla::{Config, Profile, Proof, SourceFile};
use openvla_kernels::Header;

use crate::atomic_file::AtomicFile;
use crate::checkpoint::{Checkpoint, CheckpointInfo, StatisticsText};
use crate::describe::Pictures;
use crate::imatrix::ImportanceMatrix;
use crate::inputs::{Inputs, Places};
use crate::lora::Adapter;
use crate::mapper::Shapes;
use crate::mapping::Mapping;
use crate::oft::RunOptions;
use crate::plan::{Encoding, Override, PlannedTensor};
use crate::random::{RandomWeights, Spec};
use crate::weights::{CheckpointWeights, TensorSource};

/// Tokens of an instruction and an action, rounded up, for the estimate of the KV cache.
const PROMPT_ROWS: usize = 64;

/// What goes into a file besides the checkpoint, and how it is converted.
#[derive(Debug, Clone)]
pub struct Options {
    /// The type that the file is named after.
    pub encoding: Encoding,
    /// Other types for some tensors; later ones win.
    pub overrides: Vec<Override>,
    /// Folder of a LoRA adapter to merge first.
    pub adapter: Option<PathBuf>,
    /// Folder of the model that an OpenVLA-OFT run was trained from, to merge the run's adapter into; or to check that
    /// it was merged once, if the run has weights.
    pub base: Option<PathBuf>,
    /// What no file of an OpenVLA-OFT run says.
    pub run: RunOptions,
    /// What is done to pictures. Without it: for an OpenVLA-OFT run what its policy does, else nothing.
    pub profile: Option<Profile>,
    /// Whether only the center of pictures is shown. Without it: for an OpenVLA-OFT run, as all of its scripts.
    pub center_crop: Option<bool>,
    /// The statistics file. Without it: the file in the adapter's folder, which belongs to the
    /// fine-tuned model, else the checkpoint's.
    pub statistics: Option<PathBuf>,
    /// An importance matrix in llama.cpp's GGUF format, collected on this model.
    pub importance: Option<PathBuf>,
    /// Whether to store reference cases in the file, computed in f32 from the checkpoint.
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
            base: None,
            run: RunOptions::default(),
            profile: None,
            center_crop: None,
            statistics: None,
            importance: None,
            proof: false,
            n_threads: openvla::cli::Threads::default().count(),
        }
    }
}

impl From<Encoding> for Options {
    /// That type, with all other options at their defaults.
    fn from(encoding: Encoding) -> Self {
        Self { encoding, ..Self::default() }
    }
}

/// A checkpoint that was read and checked, and what its file will hold.
pub struct Conversion {
    weights: Box<dyn TensorSource>,
    inputs: Inputs,
    encoding: Encoding,
    proof: bool,
    n_threads: usize,
    /// Where the statistics come from, to be shown.
    pub statistics: String,
    /// What a user should know about the inputs before relying on the file, one sentence each.
    pub warnings: Vec<String>,
    /// Which tensors of the checkpoint become which of the file, and which are unused.
    pub mapping: Mapping,
    /// The file's metadata.
    pub config: Config,
    /// The file's tensors.
    pub plan: Vec<PlannedTensor>,
}

impl Conversion {
    /// Reads a checkpoint folder and plans its file.
    ///
    /// # Errors
    /// Names what is missing, damaged, or belongs to another model.
    pub fn new(checkpoint: &Path, options: &Options) -> Result<Self> {
        let mut base = options.base.as_deref();
        if let Some(folder) = base
            && checkpoint::has_weights(checkpoint)?
        {
            merged::check(checkpoint, folder)?;
            base = None;
        }
        let Checkpoint { mut info, tensors, mut warnings } = Checkpoint::open(checkpoint, base)?;
        let shapes: Shapes = (tensors.entries().iter())
            .map(|(name, entry)| (name.clone(), entry.shape.clone()))
            .collect();
        let cannot = || format!("{} cannot be converted", checkpoint.display());
        info.config.check().with_context(cannot)?;
        hf_config::check_not_quantized(shapes.keys()).with_context(cannot)?;
        let is_run = info.run.is_some() || options.run.are_given();
        let unmerged = base.map(|_| checkpoint.join(checkpoint::ADAPTER_FOLDER));
        options.adapter.as_deref().map(lora::check_parent).transpose()?;
        let dir = options.adapter.as_deref().or(unmerged.as_deref());
        info.adapter = dir.map(checkpoint::model_name).transpose()?;
        let mut adapter = dir.map(|dir| Adapter::open(dir, &tensors)).transpose()?;
        let of_adapter = adapter.as_mut().and_then(|adapter| adapter.statistics.take());
        warnings.extend(adapter.iter().flat_map(|adapter| adapter.warnings.clone()));
        let statistics = match (&options.statistics, of_adapter) {
            (Some(path), _) => StatisticsText::read(path)?,
            (None, Some(statistics)) => statistics,
            (None, None) => {
                let statistics = StatisticsText::of(&info)?;
                ensure!(
                    !(is_run && statistics.inherited),
                    "{} has no dataset_statistics.json, and the statistics of config.json are the base model's; copy it \
                     from the run's folder, or name it with --statistics",
                    checkpoint.display()
                );
                warnings.extend(match dir {
                    Some(dir) => Some(lora::missing_statistics_warning(dir, &statistics)),
                    None => checkpoint::inherited_statistics_warning(&info, &statistics),
                });
                statistics
            }
        };
        let Options { encoding, n_threads, proof, .. } = *options;
        let mapping = mapping::mapping(&info.config, &shapes, is_run).with_context(cannot)?;
        for name in mapping.tensors.iter().flat_map(|tensor| &tensor.sources) {
            tensors.check_type(name)?;
        }
        let oft = match mapping.run {
            Some(run) => {
                let oft =
                    oft::configure_with(run, &statistics, &options.run).with_context(cannot)?;
                warnings.extend(oft::doubt(&info.name, &oft));
                Some(oft)
            }
            None => None,
        };
        let parsed = statistics.parse_for(oft.as_ref()).with_context(cannot)?;
        let of_policy = Pictures::of_policy(is_run);
        let pictures = Pictures {
            profile: options.profile.unwrap_or(of_policy.profile),
            center_crop: options.center_crop.unwrap_or(of_policy.center_crop),
        };
        let config = describe::describe(&info, parsed, &shapes, &mapping, oft, pictures, encoding);
        let mut config = config.with_context(cannot)?;
        let fingerprint = fingerprint::fingerprint(&mapping, &tensors, adapter.as_ref())?;
        config.general.source.fingerprint = Some(fingerprint);
        let plan = plan::plan(&mapping, encoding, &options.overrides)?;
        let importance = options.importance.as_deref();
        let importance = importance.map(|path| ImportanceMatrix::open(path, &plan)).transpose()?;
        let places = Places {
            checkpoint: checkpoint.to_owned(),
            base: base.map(Path::to_owned),
            adapter: options.adapter.clone(),
            statistics: options.statistics.clone(),
            importance: options.importance.clone(),
        };
        let inputs = Inputs::new(&places, &info, &tensors, adapter.as_ref(), &statistics)?;
        let weights = Box::new(CheckpointWeights { tensors, adapter, importance, n_threads });
        let statistics = statistics.from;
        Ok(Self {
            weights,
            inputs,
            encoding,
            proof,
            n_threads,
            statistics,
            warnings,
            mapping,
            config,
            plan,
        })
    }

    /// Plans the file that a random checkpoint would become, without writing that checkpoint. Its
    /// weights have the distributions of that checkpoint's, with other numbers: see
    /// [`RandomWeights`].
    ///
    /// # Errors
    /// If temporary files of a few megabytes cannot be written, or an OpenVLA-OFT has too many cameras.
    pub fn random(spec: &Spec, encoding: Encoding, n_threads: usize) -> Result<Self> {
        let root = tempfile::tempdir().context("cannot make a folder for temporary files")?;
        let dir = root.path().join(spec.folder());
        std::fs::create_dir(&dir)?;
        random::write_settings(&dir, spec)?;
        let info = CheckpointInfo::open(&dir)?;
        let tensors = spec.tensors();
        let shapes: Shapes = tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        let options = spec.variant.run();
        let mapping = mapping::mapping(&info.config, &shapes, options.is_some())?;
        let statistics = StatisticsText::of(&info)?;
        let run = mapping.run.zip(options);
        let oft = run.map(|(run, options)| oft::configure_with(run, &statistics, &options));
        let oft = oft.transpose()?;
        let parsed = statistics.parse_for(oft.as_ref())?;
        let pictures = Pictures::of_policy(oft.is_some());
        let config = describe::describe(&info, parsed, &shapes, &mapping, oft, pictures, encoding);
        let mut config = config?;
        config.general.source.fingerprint = Some(format!("{:016x}", spec.seed));
        let plan = plan::plan(&mapping, encoding, &[])?;
        let weights = Box::new(RandomWeights::new(tensors, spec.seed, n_threads));
        let (statistics, warnings) = (statistics.from, Vec::new());
        let proof = false;
        Ok(Self {
            weights,
            inputs: Inputs::default(),
            encoding,
            proof,
            n_threads,
            statistics,
            warnings,
            mapping,
            config,
            plan,
        })
    }

    /// A file name by ggml's naming convention: `OpenVLA-7B-v1.0-Q4_K_M.gguf`.
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

    /// A text about the file's contents by component and type, and the memory that a device needs.
    pub fn summary(&self) -> String {
        let llama = &self.config.llama;
        let rows = self.config.n_patch() + PROMPT_ROWS;
        let cache = 2 * 2 * llama.n_head_kv * llama.head_dim() * llama.n_layer * rows;
        let (plan, weights) = (plan::summary(&self.plan), self.data_bytes());
        let cache = match self.config.oft {
            Some(_) => String::new(), // its one pass needs none
            None => format!(", {cache} of KV cache at {rows} tokens,"),
        };
        format!("{plan}on the device: {weights} bytes of weights{cache} and intermediate results\n")
    }

    /// Writes the file, and hashes those that it is made of meanwhile. `progress` counts bytes: first those read for the
    /// reference cases, if there are to be any, then those of the file.
    ///
    /// # Errors
    /// Names what cannot be read, converted or written. An existing file is then left unchanged.
    pub fn write(&self, out: &Path, progress: &ProgressBar) -> Result<()> {
        let mut proof = Proof { cases: Vec::new(), checksums: vec![0; self.plan.len()] };
        let header = self.header(&proof, &self.inputs.unhashed());
        let cases = if self.proof { proof::bytes_written(&self.config) } else { 0 };
        let n_byte = (header.encode().len() + header.data_bytes() + cases) as u64;
        let mut file = AtomicFile::create(out, n_byte)?;
        let hashed = self.inputs.hash_during(self.n_threads, || {
            if self.proof {
                self.compute_cases(&mut proof, progress)?;
            }
            self.write_tensors(&mut proof, &mut file, progress)?;
            progress.set_message("SHA-256 of the checkpoint");
            Ok(())
        })?;
        file.replace_start(&self.header(&proof, &hashed).encode())?;
        file.finish()
    }

    fn compute_cases(&self, proof: &mut Proof, progress: &ProgressBar) -> Result<()> {
        progress.set_length(proof::bytes_read(&self.config, &self.plan));
        progress.set_message("reference cases in f32");
        proof.cases = proof::run_cases(&self.config, self.n_threads, |prefix| {
            let part = weights::in_f32(&*self.weights, &self.plan, prefix)?;
            progress.inc(part.bytes().len() as u64);
            Ok(part)
        })?;
        Ok(())
    }

    /// Writes tensors, and their checksums into `proof`, after room for the header.
    fn write_tensors(
        &self,
        proof: &mut Proof,
        file: &mut AtomicFile<'_>,
        progress: &ProgressBar,
    ) -> Result<()> {
        progress.reset();
        progress.set_length(self.data_bytes());
        progress.set_message("tensors");
        file.append(&self.header(proof, &self.inputs.unhashed()).encode())?;
        proof.checksums.clear();
        weights::for_each_tensor(&*self.weights, &self.plan, |bytes| {
            proof.checksums.push(openvla::checksum(bytes));
            progress.inc(bytes.len() as u64);
            file.append(bytes)
        })
    }

    fn header(&self, proof: &Proof, files: &[SourceFile]) -> Header {
        let mut header = Header::default();
        self.config.write(&mut header);
        SourceFile::write_all(files, &mut header);
        proof.write(&mut header);
        for planned in &self.plan {
            header.tensor(&planned.tensor.name, planned.dtype, planned.tensor.shape);
        }
        header
    }
}
