//! Checkpoints and adapters from the Hugging Face Hub.
//!
//! in   `user/repo` or `user/repo@revision`
//! out  a snapshot's folder in the Hub's cache, with the files that converting reads
//!
//! The cache is the one that Hugging Face's own programs share, so nothing is downloaded twice:
//! contents by their hash in `blobs`, the files of a commit in `snapshots`, the commits of branches
//! in `refs`. Small files come first, and what they say is checked before any weights are fetched.
//!
//! | variable | what it says, as everywhere |
//! |---|---|
//! | `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE` | where the cache is |
//! | `HF_HOME`, `XDG_CACHE_HOME` | the folder above it, with the token's file; the one above that |
//! | `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN` | who asks: for private and gated repositories, and higher limits |
//! | `HF_TOKEN_PATH` | the file with the token |
//! | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | `1`: ask as nobody |
//! | `HF_ENDPOINT` | a mirror to ask instead |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | `1`: take what the cache has, without a network |
//! | `HF_HUB_DOWNLOAD_TIMEOUT` | after how many silent seconds a connection is lost |
//!
//! ref: huggingface_hub `_snapshot_download.py`

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use hf_hub::{Cache, Repo, RepoType};

use crate::source::{Files, INDEX, Index, PREPROCESSOR, PROCESSOR, WEIGHTS};
use crate::{kinds, tokenizer};

mod client;
mod environment;

use client::{Hub, Snapshot};
use environment::Environment;

/// What a repository is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole model.
    Checkpoint,
    /// A LoRA adapter.
    Adapter,
}

/// The folder that `source` names, else the repository, which is fetched into the cache.
///
/// # Errors
/// Says what is neither, what the repository lacks, and why the Hub does not answer.
pub fn locate(source: &Path, content: Content) -> Result<PathBuf> {
    let shown = source.display();
    match source.try_exists() {
        Ok(true) => return Ok(source.to_owned()),
        Ok(false) => {}
        // A file of the user's name says nothing of a repository.
        Err(error) if error.kind() == ErrorKind::NotADirectory => {}
        Err(error) => return Err(error).with_context(|| format!("cannot look at {shown}")),
    }
    ensure!(!source.is_symlink(), "{shown} is a link to a folder that is not there");
    let id = source.to_str().and_then(Id::parse).with_context(|| {
        format!("{shown} is no folder, nor user/repo or user/repo@revision on the Hugging Face Hub")
    })?;
    let environment = Environment::read()?;
    let cache = Cache::new(environment.cache.clone());
    let fetched = if environment.offline {
        cached(&cache, &id, content)
    } else {
        fetch(&cache, environment, &id, content)
    };
    fetched.with_context(|| format!("{shown} is no folder here, and cannot be had from the Hub"))
}

/// A repository, and which of its revisions.
struct Id<'a> {
    repository: &'a str,
    revision: &'a str,
}

impl<'a> Id<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (user, name) = repository.split_once('/')?;
        let plain = |part: &str| {
            let letter = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(letter)
                && !part.contains("..")
        };
        let sound = plain(user)
            && plain(name)
            && !repository.contains("--") // which stands for the slash in the cache
            && revision.split('/').all(plain);
        sound.then_some(Self { repository, revision })
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.repository.to_owned(), RepoType::Model, self.revision.to_owned())
    }
}

impl Content {
    /// Of each of these, one is needed.
    fn needed(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Checkpoint => &[
                &["config.json"],
                &[PREPROCESSOR, PROCESSOR],
                &["tokenizer.json", "tokenizer.model"],
                &[INDEX, WEIGHTS],
            ],
            Self::Adapter => &[&["adapter_config.json"], &[kinds::ADAPTER_WEIGHTS]],
        }
    }

    /// The small files, of which some may be missing.
    fn described_by(self) -> Vec<&'static str> {
        match self {
            Self::Checkpoint => {
                let files =
                    ["config.json", PREPROCESSOR, PROCESSOR, "dataset_statistics.json", INDEX];
                [&files[..], &tokenizer::FILES[..]].concat()
            }
            Self::Adapter => vec!["adapter_config.json", "dataset_statistics.json"],
        }
    }

    /// Refuses a repository of something else, by the names of its files.
    fn check(self, repository: &str, names: &[String]) -> Result<()> {
        match self {
            Self::Checkpoint => {
                kinds::check_checkpoint(repository, names)?;
                kinds::check_weights(repository, names)
            }
            Self::Adapter => kinds::check_adapter(repository, names),
        }
    }

    /// The large files, by what the small ones in `dir` say; one is all if there is a `single` one.
    fn weights(self, dir: &Path, single: bool) -> Result<Vec<String>> {
        if self == Self::Adapter {
            return Ok(vec![kinds::ADAPTER_WEIGHTS.to_owned()]);
        }
        Files::open(dir)?.config.check()?;
        if single {
            return Ok(vec![WEIGHTS.to_owned()]);
        }
        Ok(Index::read(dir)?.shards().into_iter().map(str::to_owned).collect())
    }
}

/// What the cache has of a revision.
fn cached(cache: &Cache, id: &Id, content: Content) -> Result<PathBuf> {
    let repo = cache.repo(id.repo());
    let by_branch =
        repo.get(content.needed()[0][0]).and_then(|file| Some(file.parent()?.to_owned()));
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
fn fetch(cache: &Cache, environment: Environment, id: &Id, content: Content) -> Result<PathBuf> {
    let hub = Hub::new(environment);
    let listing = hub.list(id.repository, id.revision)?;
    let find = |name: &str| listing.siblings.iter().find(|file| file.rfilename == name);
    let names: Vec<_> = listing.siblings.iter().map(|file| file.rfilename.clone()).collect();
    content.check(id.repository, &names)?;
    for names in content.needed() {
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
    for file in content.described_by().into_iter().filter_map(find) {
        snapshot.download(file)?;
    }
    let weights = content.weights(&snapshot.dir, find(WEIGHTS).is_some())?;
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
