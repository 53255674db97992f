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
//! | `HF_HOME` | where the cache is, and the file with the token |
//! | `HF_TOKEN` | who asks: for private and gated repositories, and higher limits |
//! | `HF_ENDPOINT` | a mirror to ask instead |
//! | `HF_HUB_OFFLINE` | `1`: take what the cache has, without a network |
//! | `HF_HUB_DOWNLOAD_TIMEOUT` | after how many silent seconds a connection is lost |
//!
//! ref: huggingface_hub `_snapshot_download.py`

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use hf_hub::{Cache, Repo, RepoType};

use crate::source::{Files, INDEX, Index, WEIGHTS, refuse_oft};
use crate::{describe, tokenizer};

mod client;

use client::{Hub, Snapshot};

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
    if source.exists() {
        return Ok(source.to_owned());
    }
    let shown = source.display();
    let id = source.to_str().and_then(Id::parse).with_context(|| {
        format!("{shown} is no folder, nor user/repo or user/repo@revision on the Hugging Face Hub")
    })?;
    let home = std::env::var("HF_HOME").is_ok() || std::env::home_dir().is_some();
    ensure!(home, "there is no home directory for the Hub's cache; set HF_HOME to a folder");
    let cache = Cache::from_env();
    let fetched = if is_set("HF_HUB_OFFLINE") {
        cached(&cache, &id, content)
    } else {
        fetch(&cache, &id, content)
    };
    fetched.with_context(|| format!("{shown} is no folder here, and cannot be had from the Hub"))
}

/// Huggingface_hub's idea of true.
fn is_set(variable: &str) -> bool {
    let value = std::env::var(variable).unwrap_or_default().to_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
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
                &["preprocessor_config.json"],
                &["tokenizer.json", "tokenizer.model"],
                &[INDEX, WEIGHTS],
            ],
            Self::Adapter => &[&["adapter_config.json"], &["adapter_model.safetensors"]],
        }
    }

    /// The small files, of which some may be missing.
    fn described_by(self) -> Vec<&'static str> {
        match self {
            Self::Checkpoint => {
                let files =
                    ["config.json", "preprocessor_config.json", "dataset_statistics.json", INDEX];
                [&files[..], &tokenizer::FILES[..]].concat()
            }
            Self::Adapter => vec!["adapter_config.json", "dataset_statistics.json"],
        }
    }

    /// The large files, by what the small ones in `dir` say.
    fn weights(self, dir: &Path) -> Result<Vec<String>> {
        if self == Self::Adapter {
            return Ok(vec!["adapter_model.safetensors".to_owned()]);
        }
        describe::check_model(&Files::open(dir)?.config)?;
        Ok(match Index::read(dir)? {
            Some(index) => index.shards().into_iter().map(str::to_owned).collect(),
            None => vec![WEIGHTS.to_owned()],
        })
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
            "HF_HUB_OFFLINE is set, and {} has nothing of its revision {}",
            cache.path().display(),
            id.revision
        )
    })
}

/// Downloads what the cache lacks.
fn fetch(cache: &Cache, id: &Id, content: Content) -> Result<PathBuf> {
    let hub = Hub::from_env(cache);
    let listing = hub.list(id.repository, id.revision)?;
    let find = |name: &str| listing.siblings.iter().find(|file| file.rfilename == name);
    refuse_oft(&id.repository, listing.siblings.iter().map(|file| &file.rfilename))?;
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
    let weights = content.weights(&snapshot.dir)?;
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
