//! A Hugging Face checkpoint folder as found on disk, checked once.
//!
//! What transformers 4.40.1 would load is loaded: `model.safetensors`, and without it the shards that
//! the index names. Tensors are found through every shard's own header; the index is only held
//! against them. Data is mapped tensor by tensor, so that memory stays small at any model size.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use openvla::Statistics;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::aliases::canonical;
use crate::files;
use crate::kinds;
use crate::settings::{HfConfig, HfPreprocessor};
use crate::tensors::Tensors;

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
}

/// The JSON of a model's statistics, which scale its motions.
pub struct StatisticsText {
    /// The file, or the part of one, for people.
    pub from: String,
    /// Whether they are those of `config.json`, which a fine-tune has from its base model.
    pub inherited: bool,
    /// Without the numbers that JSON does not have: see [`files::json`].
    json: String,
}

/// A checkpoint folder: what its JSON files say, and where its tensors are.
pub struct Source {
    /// The JSON files.
    pub files: Files,
    /// Every tensor of every shard.
    pub tensors: Tensors,
    /// Weights in the folder that are passed over, in words.
    pub warnings: Vec<String>,
}

impl Files {
    /// Reads a folder's JSON files. Its shards need not be there.
    ///
    /// # Errors
    /// What is missing, damaged, or of an OpenVLA-OFT checkpoint, by name.
    pub fn open(dir: &Path) -> Result<Self> {
        let shown = dir.display().to_string();
        let names = list(dir)?;
        kinds::check_checkpoint(&shown, &names)?;
        let path = dir.join("config.json");
        let settings: Map<String, Value> = files::read_json(&path)?;
        kinds::check_settings(&shown, &settings)?;
        let config: HfConfig = files::read_json(&path)?;
        let preprocessor = read_preprocessor(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            name: name(dir)?,
            origin: origin(dir)?,
            adapter: None,
            config,
            preprocessor,
        })
    }
}

/// Transformers 5 writes one file for the whole processor, and reads the other one first.
#[derive(Deserialize)]
struct Processor {
    image_processor: Option<HfPreprocessor>,
}

fn read_preprocessor(dir: &Path) -> Result<HfPreprocessor> {
    let path = dir.join(PREPROCESSOR);
    if !files::is_there(&path)? {
        let processor: Option<Processor> = files::read_json_if_there(&dir.join(PROCESSOR))?;
        if let Some(found) = processor.and_then(|processor| processor.image_processor) {
            return Ok(found);
        }
    }
    files::read_json(&path)
}

/// The names in a folder, sorted.
///
/// # Errors
/// Says what is there if it is not a folder, or cannot be listed.
pub fn list(dir: &Path) -> Result<Vec<String>> {
    let shown = dir.display();
    if dir.is_file() {
        let gguf = files::read_start(dir)? == *b"GGUF";
        ensure!(!gguf, "{shown} is a GGUF file, {}", kinds::IS_CONVERTED);
        let native = dir.extension().is_some_and(|extension| extension == "pt");
        ensure!(!native, "{shown} is one file: {}", kinds::PRISMATIC);
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
        let files = Files::open(dir)?;
        let (tensors, warnings) = read_weights(dir)?;
        Ok(Self { files, tensors, warnings })
    }
}

/// The tensors that count, and words on files that do not.
fn read_weights(dir: &Path) -> Result<(Tensors, Vec<String>)> {
    let names = list(dir)?;
    kinds::check_weights(&dir.display().to_string(), &names)?;
    let mut tensors = Tensors::default();
    let mut taken = BTreeSet::from([WEIGHTS]);
    let index;
    if files::is_there(&dir.join(WEIGHTS))? {
        tensors.add(&dir.join(WEIGHTS))?;
    } else {
        index = Index::read(dir)?;
        taken = index.shards();
        for shard in &taken {
            tensors.add(&dir.join(shard))?;
        }
        index.check(&tensors)?;
    }
    let counts = |name: &str| taken.contains(name) || (name == INDEX && !taken.contains(WEIGHTS));
    let weights = |name: &str| kinds::is_shard(name) || [WEIGHTS, INDEX].contains(&name);
    let passed_over =
        names.iter().map(String::as_str).filter(|name| weights(name) && !counts(name));
    let passed_over: Vec<_> = passed_over.collect();
    let warning = || {
        let taken: Vec<_> = taken.iter().copied().collect();
        format!(
            "{} holds two sets of weights; {} is taken, as transformers would, and the rest is \
             not: {}. Remove what is older",
            dir.display(),
            taken.join(", "),
            passed_over.join(", ")
        )
    };
    let mut warnings = if passed_over.is_empty() { Vec::new() } else { vec![warning()] };
    if names.iter().any(|name| name == kinds::ADAPTER_WEIGHTS) {
        warnings.push(format!(
            "{} holds a LoRA adapter too, which is taken as merged into the weights already; if it \
             is not, give this folder with --lora as well",
            dir.display()
        ));
    }
    Ok((tensors, warnings))
}

/// What images are resized to and how they are normalized.
pub const PREPROCESSOR: &str = "preprocessor_config.json";
/// Where transformers 5 writes that.
pub const PROCESSOR: &str = "processor_config.json";
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
    /// Reads a folder's index.
    ///
    /// # Errors
    /// Names the file if it is missing or damaged, or asks for files elsewhere.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(INDEX);
        let index: Self = files::read_json(&path)?;
        for shard in index.shards() {
            let plain = Path::new(shard).file_name().is_some_and(|name| name == shard);
            ensure!(plain, "{} names the shard {shard:?}, no plain file name", path.display());
        }
        Ok(index)
    }

    /// The shards' file names.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    /// Holds that its tensors are there.
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
    /// The statistics of a checkpoint. Its `config.json` still carries those of the model that it
    /// was tuned from, so the file beside it wins: the wrong ones move a robot wrongly without a
    /// word.
    ///
    /// # Errors
    /// If there are none, or a file is there and cannot be read.
    pub fn of(checkpoint: &Files) -> Result<Self> {
        let dir = &checkpoint.dir;
        if let Some(statistics) = Self::beside(dir)? {
            return Ok(statistics);
        }
        match &checkpoint.config.norm_stats {
            Some(stats) => Ok(Self {
                from: format!("norm_stats of {}", dir.join("config.json").display()),
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

    /// What lies in a folder, if anything does.
    ///
    /// # Errors
    /// Names the file if it is there and cannot be read.
    pub fn beside(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(STATISTICS);
        if files::is_there(&path)? { Self::read(&path).map(Some) } else { Ok(None) }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// Names the file if it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let json = files::json(path, files::read(path)?)?;
        Ok(Self { from: path.display().to_string(), inherited: false, json })
    }

    /// What they say of each data set.
    ///
    /// # Errors
    /// Names where they are from, and what is wrong.
    pub fn parse(&self) -> Result<Statistics> {
        let parsed = Statistics::parse(self.json.clone()).map_err(of_checkpoint);
        parsed.with_context(|| self.from.clone())
    }
}

/// What to know of statistics that a fine-tuned checkpoint has from its base model, in words.
pub fn inherited(checkpoint: &Files, taken: &StatisticsText) -> Option<String> {
    taken.inherited.then(|| {
        format!(
            "{} has no {STATISTICS}, so the statistics are those of its config.json, which in a \
             fine-tuned model are the base model's and scale its motions wrongly. finetune.py leaves \
             the file in its run folder: copy it here, or name it with --statistics",
            checkpoint.dir.display()
        )
    })
}

/// What the runtime says of a model file, said of a checkpoint: its advice, to write the file again,
/// would lead back here.
pub fn of_checkpoint(error: openvla::Error) -> anyhow::Error {
    match error {
        openvla::Error::Model { why } => anyhow!(why),
        other => other.into(),
    }
}
