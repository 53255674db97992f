//! Checkpoints and adapters from the Hugging Face Hub.
//!
//! in   `user/repo` or `user/repo@revision`
//! out  a snapshot's folder in the Hub's cache, with the files that the conversion reads
//!
//! The cache is the one that Hugging Face's own programs share, so nothing is downloaded twice:
//! contents by their hash in `blobs`, the files of a commit in `snapshots`, the commits of branches
//! in `refs`. Small files come first, and what they say is checked before any weights are fetched.
//!
//! | variable | meaning, as in Hugging Face's own programs |
//! |---|---|
//! | `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE` | where the cache is |
//! | `HF_HOME`, `XDG_CACHE_HOME` | the folder with the cache and the token's file; the folder above that |
//! | `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN` | access token: for private and gated repositories, and higher limits |
//! | `HF_TOKEN_PATH` | the file with the token |
//! | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | `1`: send no token |
//! | `HF_ENDPOINT` | the URL of a mirror |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | `1`: use the cache alone, without a network |
//! | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds of silence after which a connection is given up |
//!
//! ref: huggingface_hub `_snapshot_download.py`

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use hf_hub::{Cache, Repo, RepoType};

use crate::checkpoint::{CheckpointInfo, Index, PREPROCESSOR, PROCESSOR};
use crate::recognize::{self, INDEX, WEIGHTS};
use crate::run_files::RunFiles;
use crate::tokenizer;

mod client;
mod environment;

use client::{Hub, Snapshot};
use environment::Environment;

/// What a repository should hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole model.
    Checkpoint,
    /// An OpenVLA-OFT run with its adapter, and with or without weights into which that was merged.
    Run,
    /// A LoRA adapter.
    Adapter,
}

/// The settings and the weights of an OpenVLA-OFT run's adapter: see [`crate::checkpoint::ADAPTER_FOLDER`].
const RUN_ADAPTER: [&str; 2] =
    ["lora_adapter/adapter_config.json", "lora_adapter/adapter_model.safetensors"];

/// The folder that `source` names, or else the cache's folder of the repository of that name, after
/// downloading what it lacks.
///
/// # Errors
/// If `source` is neither, if the repository lacks a file, or if the Hub does not answer.
pub fn locate(source: &Path, content: Content) -> Result<PathBuf> {
    let shown = source.display();
    match source.try_exists() {
        Ok(true) => return Ok(source.to_owned()),
        Ok(false) => {}
        // A file named like the user of a repository does not rule that out.
        Err(error) if error.kind() == ErrorKind::NotADirectory => {}
        Err(error) => return Err(error).with_context(|| format!("cannot look at {shown}")),
    }
    ensure!(!source.is_symlink(), "{shown} is a link to a folder that is not there");
    let id = source.to_str().and_then(RepoId::parse).with_context(|| {
        format!("{shown} is neither a folder nor user/repo or user/repo@revision on the Hugging Face Hub")
    })?;
    let environment = Environment::read()?;
    let cache = Cache::new(environment.cache.clone());
    let fetched = if environment.offline {
        cached(&cache, &id, content)
    } else {
        fetch(&cache, environment, &id, content)
    };
    fetched.with_context(|| format!("{shown} is not a folder here, and cannot be had from the Hub"))
}

/// A repository, and which of its revisions.
struct RepoId<'a> {
    repository: &'a str,
    revision: &'a str,
}

impl<'a> RepoId<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (user, name) = repository.split_once('/')?;
        let plain = |part: &str| {
            let letter = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(letter)
                && !part.contains("..")
        };
        let valid = plain(user)
            && plain(name)
            && !repository.contains("--") // which replaces the slash in the cache
            && revision.split('/').all(plain);
        valid.then_some(Self { repository, revision })
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.repository.to_owned(), RepoType::Model, self.revision.to_owned())
    }
}

impl Content {
    /// The required files: one of each group.
    fn required(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Checkpoint => &[
                &["config.json"],
                &[PREPROCESSOR, PROCESSOR],
                &["tokenizer.json", "tokenizer.model"],
                &[INDEX, WEIGHTS],
            ],
            Self::Run => &[&[RUN_ADAPTER[0]], &[RUN_ADAPTER[1]]],
            Self::Adapter => &[&["adapter_config.json"], &[recognize::ADAPTER_WEIGHTS]],
        }
    }

    /// The small files, required and optional.
    fn small_files(self) -> Vec<&'static str> {
        match self {
            Self::Checkpoint => {
                let files =
                    ["config.json", PREPROCESSOR, PROCESSOR, "dataset_statistics.json", INDEX];
                [&files[..], &tokenizer::FILES[..]].concat()
            }
            Self::Run => [&Self::Checkpoint.small_files()[..], &RUN_ADAPTER[..1]].concat(),
            Self::Adapter => vec!["adapter_config.json", "dataset_statistics.json"],
        }
    }

    /// Refuses a repository of something else, by its file names.
    fn check(self, repository: &str, names: &[String]) -> Result<()> {
        match self {
            Self::Checkpoint => {
                recognize::check_checkpoint(repository, names)?;
                recognize::check_weights(repository, names)
            }
            Self::Run => recognize::check_run(repository, names),
            Self::Adapter => recognize::check_adapter(repository, names),
        }
    }

    /// The files with weights, by what the small files in `dir` say, of a repository with these files.
    fn weights(self, dir: &Path, repository: &str, names: &[String]) -> Result<Vec<String>> {
        let has = |file: &str| names.iter().any(|name| name == file);
        if self == Self::Adapter {
            return Ok(vec![recognize::ADAPTER_WEIGHTS.to_owned()]);
        }
        let run = RunFiles::find(repository, names)?;
        let mut weights: Vec<String> =
            run.iter().flat_map(RunFiles::names).map(str::to_owned).collect();
        if self == Self::Run {
            weights.push(RUN_ADAPTER[1].to_owned());
            if !has(WEIGHTS) && !has(INDEX) {
                return Ok(weights);
            }
        }
        CheckpointInfo::open(dir)?.config.check()?;
        if has(WEIGHTS) {
            weights.push(WEIGHTS.to_owned());
        } else {
            weights.extend(Index::read(dir)?.shards().into_iter().map(str::to_owned));
        }
        Ok(weights)
    }
}

/// A revision's folder in the cache.
fn cached(cache: &Cache, id: &RepoId, content: Content) -> Result<PathBuf> {
    let repo = cache.repo(id.repo());
    let known = content.required()[0][0];
    let above = known.split('/').count();
    let by_branch = repo.get(known).and_then(|file| Some(file.ancestors().nth(above)?.to_owned()));
    let by_commit = Some(repo.pointer_path(id.revision)).filter(|dir| dir.is_dir());
    by_branch.or(by_commit).with_context(|| {
        format!(
            "the Hub is not asked (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set), and {} has \
             nothing of its revision {}",
            cache.path().display(),
            id.revision
        )
    })
}

/// Downloads what the cache lacks.
fn fetch(
    cache: &Cache,
    environment: Environment,
    id: &RepoId,
    content: Content,
) -> Result<PathBuf> {
    let hub = Hub::new(environment);
    let listing = hub.list(id.repository, id.revision)?;
    let find = |name: &str| listing.siblings.iter().find(|file| file.rfilename == name);
    let names: Vec<_> = listing.siblings.iter().map(|file| file.rfilename.clone()).collect();
    content.check(id.repository, &names)?;
    for names in content.required() {
        let found = names.iter().any(|name| find(name).is_some());
        ensure!(found, "the repository holds no {}", names.join(" or "));
    }
    let repo = cache.repo(id.repo());
    let snapshot = Snapshot {
        dir: repo.pointer_path(&listing.sha),
        blobs: cache.path().join(id.repo().folder_name()).join("blobs"),
        url: format!("{}/{}/resolve/{}", hub.endpoint, id.repository, listing.sha),
        hub,
    };
    for file in content.small_files().into_iter().filter_map(find) {
        snapshot.download(file)?;
    }
    let weights = content.weights(&snapshot.dir, id.repository, &names)?;
    let find = |name: &String| {
        find(name).with_context(|| format!("the repository holds no {name}, but its index does"))
    };
    for file in weights.iter().map(find).collect::<Result<Vec<_>>>()? {
        snapshot.download(file)?;
    }
    if id.revision != listing.sha {
        repo.create_ref(&listing.sha)?;
    }
    Ok(snapshot.dir)
}
