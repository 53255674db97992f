//! A Hugging Face checkpoint folder on disk: its JSON files, shards and statistics.
//!
//! Loads what transformers 4.40.1 would load: `model.safetensors`, or else the shards that the index
//! names. Tensors are found through the shards' own headers; the index is only checked against them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use openvla::{Bounds, OftConfig, Statistics};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::aliases::canonical;
use crate::files::{self, checkpoint_error};
use crate::hf_config::{HfConfig, HfPreprocessor};
use crate::recognize::{self, INDEX, WEIGHTS};
use crate::run_files::RunFiles;
use crate::tensors::Tensors;
use crate::tokenizer;

/// A repository of the Hugging Face Hub at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRevision {
    /// `openvla/openvla-7b`
    pub repository: String,
    /// The commit's hash.
    pub revision: String,
}

/// What the JSON files of a checkpoint folder say.
pub struct CheckpointInfo {
    /// The folder.
    pub dir: PathBuf,
    /// The checkpoint's name: that of its folder, or of its repository if the folder is a snapshot in
    /// the Hub's cache, which is named after a commit.
    pub name: String,
    /// The revision it was downloaded from, if known.
    pub hub_revision: Option<HubRevision>,
    /// The name of the LoRA adapter to be merged into it.
    pub adapter: Option<String>,
    /// `config.json`
    pub config: HfConfig,
    /// `preprocessor_config.json`
    pub preprocessor: HfPreprocessor,
    /// The files of an OpenVLA-OFT run, if it is one.
    pub run: Option<RunFiles>,
    /// The files with `config` and `preprocessor`.
    pub settings: [PathBuf; 2],
    /// The folder of the model that an OpenVLA-OFT run is to be merged into.
    base: Option<PathBuf>,
}

/// The JSON text of a model's statistics, which scale its actions.
pub struct StatisticsText {
    /// The file, or the key in a file, to be shown.
    pub from: String,
    /// The file.
    pub file: PathBuf,
    /// Whether they come from `config.json`, where a fine-tuned model still has its base model's.
    pub inherited: bool,
    /// See [`files::json_text`] about numbers that JSON lacks.
    json: String,
}

/// A checkpoint folder that was read and checked.
pub struct Checkpoint {
    /// What the JSON files say.
    pub info: CheckpointInfo,
    /// Every tensor of every shard.
    pub tensors: Tensors,
    /// Messages about weights in the folder that are ignored.
    pub warnings: Vec<String>,
}

impl CheckpointInfo {
    /// Reads a folder's JSON files. The shards may be missing.
    ///
    /// # Errors
    /// Names what is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_over(dir, None)
    }

    /// The same of an OpenVLA-OFT run that was not merged into its `base`: what the run's folder lacks is read from
    /// the base model's.
    ///
    /// # Errors
    /// As [`CheckpointInfo::open`], or if there is nothing to merge.
    pub fn open_over(dir: &Path, base: Option<&Path>) -> Result<Self> {
        let shown = dir.display().to_string();
        let names = list_folder(dir)?;
        let run = RunFiles::find(&shown, &names)?;
        let config_dir = base.unwrap_or(dir);
        if let Some(base) = base {
            check_unmerged(dir, base)?;
        }
        recognize::check_checkpoint(&config_dir.display().to_string(), &list_folder(config_dir)?)?;
        let path = config_dir.join("config.json");
        let keys: Map<String, Value> = files::read_json(&path)?;
        recognize::check_config(&shown, &keys)?;
        let config: HfConfig = files::read_json(&path)?;
        let folder = |files: &[&str]| match base {
            Some(base) if !files.iter().any(|name| dir.join(name).exists()) => base,
            _ => dir,
        };
        let (processor, preprocessor) = read_preprocessor(folder(&[PREPROCESSOR, PROCESSOR]))?;
        Ok(Self {
            dir: dir.to_owned(),
            name: model_name(dir)?,
            hub_revision: hub_revision(dir)?,
            adapter: None,
            config,
            preprocessor,
            run,
            settings: [path, processor],
            base: base.map(Path::to_owned),
        })
    }

    /// The folder with the tokenizer's files.
    pub fn tokenizer_dir(&self) -> &Path {
        match &self.base {
            Some(base) if !tokenizer::FILES.iter().any(|name| self.dir.join(name).exists()) => base,
            _ => &self.dir,
        }
    }
}

/// Whether a folder has weights; an OpenVLA-OFT run that was not merged has none.
///
/// # Errors
/// As [`list_folder`].
pub fn has_weights(dir: &Path) -> Result<bool> {
    Ok(list_folder(dir)?.iter().any(|name| [WEIGHTS, INDEX].contains(&name.as_str())))
}

/// Checks that `dir` is a run with an adapter, and that `base` is not a run itself.
fn check_unmerged(dir: &Path, base: &Path) -> Result<()> {
    ensure!(
        dir.join(ADAPTER_FOLDER).is_dir(),
        "{} holds neither weights nor {ADAPTER_FOLDER}/; is the run complete?",
        dir.display()
    );
    let shown = base.display().to_string();
    let is_run = RunFiles::find(&shown, &list_folder(base)?)?.is_some();
    ensure!(
        !is_run,
        "{shown} is an OpenVLA-OFT run itself, not the model that one was trained from; an adapter must not be merged \
         into weights that contain one"
    );
    Ok(())
}

/// Transformers 5 writes one file for the whole processor, and reads the other one first.
#[derive(Deserialize)]
struct Processor {
    image_processor: Option<HfPreprocessor>,
}

fn read_preprocessor(dir: &Path) -> Result<(PathBuf, HfPreprocessor)> {
    let [path, other] = [PREPROCESSOR, PROCESSOR].map(|name| dir.join(name));
    if !files::exists(&path)? {
        let processor: Option<Processor> = files::read_json_optional(&other)?;
        if let Some(found) = processor.and_then(|processor| processor.image_processor) {
            return Ok((other, found));
        }
    }
    let found = files::read_json(&path)?;
    Ok((path, found))
}

/// The file names in a folder, sorted.
///
/// # Errors
/// If it cannot be listed or is not a folder; says what it is instead.
pub fn list_folder(dir: &Path) -> Result<Vec<String>> {
    let shown = dir.display();
    if dir.is_file() {
        let gguf = files::read_start(dir)? == *b"GGUF";
        ensure!(!gguf, "{shown} is a GGUF file, {}", recognize::IS_CONVERTED);
        let native = dir.extension().is_some_and(|extension| extension == "pt");
        ensure!(!native, "{shown} is one file: {}", recognize::PRISMATIC);
        bail!(
            "{shown} is not a folder with an OpenVLA checkpoint, but a file; give the folder with \
             config.json and {WEIGHTS} or its shards"
        );
    }
    ensure!(dir.is_dir(), "{shown} is not a folder with an OpenVLA checkpoint");
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.with_context(|| format!("cannot list {shown}"))?;
    let mut names: Vec<_> =
        entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    Ok(names)
}

/// The revision that a folder is a snapshot of: in the Hub's cache those are
/// `models--USER--REPO/snapshots/COMMIT`.
///
/// # Errors
/// If there is no such folder.
pub fn hub_revision(dir: &Path) -> Result<Option<HubRevision>> {
    let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
    let folders: Vec<_> = dir.iter().rev().take(3).map(|name| name.to_string_lossy()).collect();
    let [revision, snapshots, repository] = folders.as_slice() else { return Ok(None) };
    let repository = repository.strip_prefix("models--").filter(|_| snapshots == "snapshots");
    Ok(repository.map(|repository| HubRevision {
        repository: repository.replace("--", "/"),
        revision: revision.clone().into_owned(),
    }))
}

/// A folder's name, or its repository's if it is a snapshot in the Hub's cache.
///
/// # Errors
/// If there is no such folder.
pub fn model_name(dir: &Path) -> Result<String> {
    if let Some(HubRevision { repository, .. }) = hub_revision(dir)? {
        return Ok(repository.rsplit('/').next().unwrap_or_default().to_owned());
    }
    let dir = dir.canonicalize()?;
    Ok(dir.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

impl Checkpoint {
    /// Reads a folder's JSON files and its shards' headers, the latter from `base` if it is an OpenVLA-OFT run that was
    /// not merged.
    ///
    /// # Errors
    /// Names what is missing or damaged.
    pub fn open(dir: &Path, base: Option<&Path>) -> Result<Self> {
        let info = CheckpointInfo::open_over(dir, base)?;
        let (mut tensors, warnings) = read_weights(base.unwrap_or(dir))?;
        if let Some(run) = &info.run {
            run.add_to(&mut tensors, dir)?;
        }
        Ok(Self { info, tensors, warnings })
    }
}

/// The tensors of a folder that are used, and warnings about files that are not.
///
/// # Errors
/// Names what is missing or damaged.
pub fn read_weights(dir: &Path) -> Result<(Tensors, Vec<String>)> {
    let names = list_folder(dir)?;
    recognize::check_weights(&dir.display().to_string(), &names)?;
    let mut tensors = Tensors::default();
    let mut taken = BTreeSet::from([WEIGHTS]);
    let index;
    if files::exists(&dir.join(WEIGHTS))? {
        tensors.add(&dir.join(WEIGHTS))?;
    } else {
        index = Index::read(dir)?;
        taken = index.shards();
        for shard in &taken {
            tensors.add(&dir.join(shard))?;
        }
        index.check(&tensors)?;
    }
    let is_used = |name: &str| taken.contains(name) || (name == INDEX && !taken.contains(WEIGHTS));
    let is_weights = |name: &str| recognize::is_shard(name) || [WEIGHTS, INDEX].contains(&name);
    let ignored =
        names.iter().map(String::as_str).filter(|name| is_weights(name) && !is_used(name));
    let ignored: Vec<_> = ignored.collect();
    let warning = || {
        let taken: Vec<_> = taken.iter().copied().collect();
        format!(
            "{} holds two sets of weights; {} is taken, as transformers would, and the rest is \
             not: {}. Remove what is older",
            dir.display(),
            taken.join(", "),
            ignored.join(", ")
        )
    };
    let mut warnings = if ignored.is_empty() { Vec::new() } else { vec![warning()] };
    if names.iter().any(|name| name == recognize::ADAPTER_WEIGHTS) {
        warnings.push(format!(
            "{} holds a LoRA adapter too, which is taken as merged into the weights already; if it \
             is not, give this folder with --lora as well",
            dir.display()
        ));
    }
    Ok((tensors, warnings))
}

/// Where OpenVLA-OFT's trainer puts the adapter of a run.
pub const ADAPTER_FOLDER: &str = "lora_adapter";
/// How images are resized and normalized.
pub const PREPROCESSOR: &str = "preprocessor_config.json";
/// Where transformers 5 writes the same.
pub const PROCESSOR: &str = "processor_config.json";

/// The index of a large checkpoint: which shard holds which tensor.
#[derive(Deserialize)]
pub struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads a folder's index.
    ///
    /// # Errors
    /// Names the file if it is missing or damaged, or names shards outside the folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(INDEX);
        let index: Self = files::read_json(&path)?;
        for shard in index.shards() {
            let plain = Path::new(shard).file_name().is_some_and(|name| name == shard);
            ensure!(
                plain,
                "{} names the shard {shard:?}, which is not a plain file name",
                path.display()
            );
        }
        Ok(index)
    }

    /// The shards' file names.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    /// Checks that all of its tensors exist.
    fn check(&self, tensors: &Tensors) -> Result<()> {
        for (name, shard) in &self.weight_map {
            ensure!(
                tensors.entries().contains_key(&canonical(name)),
                "{INDEX} says that {shard} holds the tensor {name}, which is in no shard; \
                 download both again"
            );
        }
        Ok(())
    }
}

const STATISTICS: &str = "dataset_statistics.json";

impl StatisticsText {
    /// The statistics of a checkpoint. A fine-tuned model's `config.json` still has those of its base
    /// model, so the file in the folder takes precedence: wrong statistics move a robot wrongly without
    /// any error.
    ///
    /// # Errors
    /// If there are none, or the file exists and cannot be read.
    pub fn of(checkpoint: &CheckpointInfo) -> Result<Self> {
        let dir = &checkpoint.dir;
        if let Some(statistics) = Self::in_folder(dir)? {
            return Ok(statistics);
        }
        let [config, _] = &checkpoint.settings;
        match &checkpoint.config.norm_stats {
            Some(stats) => Ok(Self {
                from: format!("norm_stats of {}", config.display()),
                file: config.clone(),
                inherited: true,
                json: stats.to_string(),
            }),
            None => bail!(
                "{} has no {STATISTICS}, and its config.json no norm_stats; without them tokens \
                 cannot become motions. finetune.py leaves the file in its run folder: copy it \
                 here, or name it with --statistics",
                dir.display()
            ),
        }
    }

    /// The statistics file of a folder, if there is one.
    ///
    /// # Errors
    /// Names the file if it exists and cannot be read.
    pub fn in_folder(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(STATISTICS);
        if files::exists(&path)? { Self::read(&path).map(Some) } else { Ok(None) }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// Names the file if it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let json = files::json_text(path, files::read(path)?)?;
        let (from, file) = (path.display().to_string(), path.to_owned());
        Ok(Self { from, file, inherited: false, json })
    }

    /// Parses and checks the statistics.
    ///
    /// # Errors
    /// Names where they come from, and what is wrong.
    pub fn parse(&self) -> Result<Statistics> {
        self.parse_with(Bounds::Quantiles, false)
    }

    /// The same with the bounds and the scale of the arm's state that an OpenVLA-OFT run needs.
    ///
    /// # Errors
    /// As [`StatisticsText::parse`].
    pub fn parse_for(&self, oft: Option<&OftConfig>) -> Result<Statistics> {
        let needs = oft.map(|oft| (oft.bounds, oft.n_state > 0));
        let (bounds, with_state) = needs.unwrap_or_default();
        self.parse_with(bounds, with_state)
    }

    /// The same with other bounds, and with the scale of the arm's state.
    ///
    /// # Errors
    /// As [`StatisticsText::parse`].
    pub fn parse_with(&self, bounds: Bounds, with_state: bool) -> Result<Statistics> {
        let parsed =
            Statistics::parse_with(self.json.clone(), bounds, with_state).map_err(checkpoint_error);
        parsed.with_context(|| self.from.clone())
    }
}

/// The warning about statistics that a fine-tuned checkpoint inherited from its base model.
pub fn inherited_statistics_warning(
    checkpoint: &CheckpointInfo,
    taken: &StatisticsText,
) -> Option<String> {
    taken.inherited.then(|| {
        format!(
            "{} has no {STATISTICS}, so the statistics are those of its config.json, which in a \
             fine-tuned model are the base model's and scale its motions wrongly. finetune.py leaves \
             the file in its run folder: copy it here, or name it with --statistics",
            checkpoint.dir.display()
        )
    })
}
