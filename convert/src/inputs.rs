//! The files that a model file is made of: what it calls them, their SHA-256, and whether files at hand are the same.
//!
//! What is only looked at is not among them: the base model of an OpenVLA-OFT run that has weights of its own.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Builder};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use openvla::SourceFile;
use openvla_kernels::{Gguf, parallel_for_each};
use serde::Serialize;

use crate::checkpoint::{ADAPTER_FOLDER, CheckpointInfo, StatisticsText};
use crate::files;
use crate::interrupt::{self, Interrupted};
use crate::lora::Adapter;
use crate::recognize::{INDEX, WEIGHTS};
use crate::sha256;
use crate::tensors::Tensors;
use crate::tokenizer;

/// Where the files of a conversion are.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// The checkpoint's folder.
    pub checkpoint: PathBuf,
    /// The folder of the model that an OpenVLA-OFT run's adapter is merged into.
    pub base: Option<PathBuf>,
    /// The folder of a LoRA adapter.
    pub adapter: Option<PathBuf>,
    /// A statistics file.
    pub statistics: Option<PathBuf>,
    /// An importance matrix.
    pub importance: Option<PathBuf>,
}

impl Places {
    /// What a model file calls a file of the conversion. Names do not clash: of the checkpoint's files, only those of a
    /// run's own adapter are in a folder.
    fn name(&self, path: &Path) -> String {
        let is_in = |folder: Option<&PathBuf>| {
            folder.is_some() && path.parent() == folder.map(PathBuf::as_path)
        };
        let folder = if is_in(Some(&self.checkpoint)) {
            None
        } else if is_in(self.base.as_ref()) {
            Some("base")
        } else if is_in(self.adapter.as_ref()) {
            Some("lora")
        } else if self.statistics.as_deref() == Some(path) {
            Some("statistics")
        } else if self.importance.as_deref() == Some(path) {
            Some("imatrix")
        } else {
            Some(ADAPTER_FOLDER)
        };
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        folder.map_or(file.to_string(), |folder| format!("{folder}/{file}"))
    }

    /// Where the file of that name should be.
    fn path(&self, name: &str) -> Result<PathBuf> {
        let (folder, file) = name.split_once('/').unwrap_or(("", name));
        let path = match folder {
            "base" => self.base.as_ref().map(|folder| folder.join(file)),
            "lora" => self.adapter.as_ref().map(|folder| folder.join(file)),
            "statistics" => self.statistics.clone(),
            "imatrix" => self.importance.clone(),
            _ => Some(self.checkpoint.join(name)),
        };
        path.with_context(|| {
            format!("{name} was not in the checkpoint's folder: say with --{folder} where it is, as for the conversion")
        })
    }
}

/// The files of a conversion, by the names that the model file has for them.
#[derive(Debug, Default)]
pub struct Inputs(BTreeMap<String, PathBuf>);

impl Inputs {
    /// Those of a checkpoint that was read.
    ///
    /// # Errors
    /// If a file cannot be looked up.
    pub fn new(
        places: &Places,
        info: &CheckpointInfo,
        tensors: &Tensors,
        adapter: Option<&Adapter>,
        statistics: &StatisticsText,
    ) -> Result<Self> {
        let mut paths = info.settings.to_vec();
        paths.extend(tokenizer::files(info.tokenizer_dir())?);
        let weights = places.base.as_ref().unwrap_or(&places.checkpoint);
        if !tensors.paths().any(|path| path == weights.join(WEIGHTS)) {
            paths.push(weights.join(INDEX));
        }
        paths.extend(tensors.paths().map(Path::to_owned));
        for path in adapter.iter().flat_map(|adapter| adapter.tensors().paths()) {
            paths.extend([path.with_file_name("adapter_config.json"), path.to_owned()]);
        }
        paths.push(statistics.file.clone());
        paths.extend(places.importance.clone());
        Ok(Self(paths.into_iter().map(|path| (places.name(&path), path)).collect()))
    }

    /// Zeros in place of the hashes, for a header of the final length.
    pub fn unhashed(&self) -> Vec<SourceFile> {
        let file = |name: &String| SourceFile { name: name.clone(), sha256: "0".repeat(64) };
        self.0.keys().map(file).collect()
    }

    /// Does `work`, and hashes the files on up to `n_threads` other threads meanwhile. What one has read, the system
    /// often still has for the other.
    ///
    /// # Errors
    /// An error of `work`, or names a file that cannot be read.
    pub fn hash_during(
        &self,
        n_threads: usize,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<SourceFile>> {
        let is_needless = AtomicBool::new(false);
        let check = |_: usize| -> Result<()> {
            interrupt::check()?;
            ensure!(!is_needless.load(Ordering::Relaxed), Interrupted);
            Ok(())
        };
        let hash = || {
            let mut hashed = self.unhashed();
            let items = hashed.iter_mut().zip(self.0.values());
            parallel_for_each(n_threads, items, |(file, path)| {
                file.sha256 = sha256::of_file(path, check)?;
                anyhow::Ok(())
            })?;
            Ok(hashed)
        };
        thread::scope(|scope| {
            let hashing = Builder::new().spawn_scoped(scope, hash);
            let done = work();
            is_needless.store(done.is_err(), Ordering::Relaxed);
            let hashed = match hashing {
                Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
                Err(_) => hash(), // The system starts no more threads.
            };
            done.and(hashed)
        })
    }
}

/// Whether a file is the one that a model file was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Found {
    /// Byte for byte.
    Same,
    /// It is another.
    Differs,
    /// There is none.
    Missing,
}

/// What was found of a file that a model file was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// See [`SourceFile::name`].
    pub name: String,
    /// Whether it is the one.
    pub found: Found,
}

/// Holds files against those that a model file was made of.
///
/// # Errors
/// If the model file does not say which those were, if it is not said where they are, or if one cannot be read.
pub fn check(
    model: &Path,
    places: &Places,
    n_threads: usize,
    progress: &ProgressBar,
) -> Result<Vec<Checked>> {
    let wanted = SourceFile::read_all(&Gguf::open(model)?)?;
    ensure!(
        !wanted.is_empty(),
        "{} does not say which files it was made of: an older openvla-convert wrote it, or it has random weights; \
         convert the checkpoint again",
        model.display()
    );
    let paths: Vec<_> = wanted.iter().map(|file| places.path(&file.name)).collect::<Result<_>>()?;
    let sizes = paths.iter().filter_map(|path| path.metadata().ok()).map(|found| found.len());
    progress.set_length(sizes.sum());
    let read = |n: usize| -> Result<()> {
        progress.inc(n as u64);
        Ok(interrupt::check()?)
    };
    let missing = |file: &SourceFile| Checked { name: file.name.clone(), found: Found::Missing };
    let mut checked: Vec<_> = wanted.iter().map(missing).collect();
    let items = checked.iter_mut().zip(wanted.iter().zip(&paths));
    parallel_for_each(n_threads, items, |(checked, (wanted, path))| {
        if files::exists(path)? {
            let is_same = sha256::of_file(path, read)? == wanted.sha256;
            checked.found = if is_same { Found::Same } else { Found::Differs };
        }
        anyhow::Ok(())
    })?;
    Ok(checked)
}
