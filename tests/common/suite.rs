//! The reference's cases, with the checkpoint that they are of.

#![allow(dead_code)] // each test binary uses its own part

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use openvla_example::{Size, Spec, Variant};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::common::{committed, json, shared, tensors};

/// A folder of cases.
pub struct Suite {
    pub dir: PathBuf,
    pub cases: Vec<Value>,
    pub checkpoint: PathBuf,
    /// Where the checkpoint is, if it was written for this.
    _written: Option<TempDir>,
}

/// What the reference computed of a case.
pub struct Want {
    /// The towers' channels side by side, `[Σ dim, 256]`.
    pub features: Vec<f32>,
    pub soft: Vec<f32>,
    pub first_logits: Vec<f32>,
    /// Logits from the first action id on, step after step.
    pub action_logits: Vec<f32>,
}

impl Suite {
    /// Cases in the repository, of a checkpoint that the example writes.
    pub fn committed(name: &str) -> Self {
        let written = tempfile::tempdir().unwrap();
        let suite = Self::written_to(written.path(), name);
        Self { _written: Some(written), ..suite }
    }

    /// The same, with the checkpoint in a folder that stays.
    pub fn written_to(folder: &Path, name: &str) -> Self {
        let dir = committed().join(name);
        let index = json(&dir.join("cases.json"));
        let spec = &index["example"];
        let number = |key: &str| spec[key].as_u64().unwrap();
        let spec = Spec {
            variant: Variant::from_str(spec["variant"].as_str().unwrap(), false).unwrap(),
            size: Size::from_str(spec["size"].as_str().unwrap(), false).unwrap(),
            seed: number("seed"),
            shards: number("shards") as usize,
        };
        openvla_example::write(folder, &spec).unwrap();
        let ran = index["checkpoint_sha256"].as_object().unwrap();
        let hash = |name: &OsString| sha256(&std::fs::read(folder.join(name)).unwrap());
        let names = folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name());
        let differing: Vec<_> = names
            .filter(|name| ran.get(name.to_str().unwrap()) != Some(&hash(name).into()))
            .collect();
        assert!(
            differing.is_empty() && folder.read_dir().unwrap().count() == ran.len(),
            "{name}: the example now writes another checkpoint than the reference ran on \
             ({differing:?} differ); tests/reference/make makes the goldens again"
        );
        Self { dir, cases: cases(&index), checkpoint: folder.to_owned(), _written: None }
    }

    /// Cases beside the repository.
    pub fn shared(name: &str) -> Self {
        let dir = shared().join(name);
        let index = json(&dir.join("cases.json"));
        let checkpoint = dir.join(index["checkpoint"].as_str().unwrap());
        let preprocessor = dir.join("preprocessor_config.json");
        let written = preprocessor.exists().then(|| with_preprocessor(&checkpoint, &preprocessor));
        let checkpoint = written.as_ref().map_or(checkpoint, |folder| folder.path().to_owned());
        Self { dir, cases: cases(&index), checkpoint, _written: written }
    }

    /// A file that a case names.
    pub fn file(&self, case: &Value, key: &str) -> PathBuf {
        self.dir.join(case[key].as_str().unwrap())
    }

    pub fn want(&self, case: &Value) -> Want {
        let mut all = tensors(&self.file(case, "tensors"));
        // What depends on the picture alone may be in a file of its own.
        if case.get("vision").is_some() {
            all.extend(tensors(&self.file(case, "vision")));
        }
        let towers = ["vit0_patch_features", "vit1_patch_features"];
        let towers: Vec<_> = towers.iter().filter_map(|name| all.get(*name)).collect();
        let patch =
            |i: usize| towers.iter().flat_map(move |t| t.chunks(t.len() / 256).nth(i).unwrap());
        Want {
            features: (0..256).flat_map(patch).copied().collect(),
            soft: all["projector_output"].clone(),
            first_logits: all["logits_first"].clone(),
            action_logits: all["logits_action_range"].clone(),
        }
    }
}

fn cases(index: &Value) -> Vec<Value> {
    index["cases"].as_array().unwrap().clone()
}

/// A checkpoint with another `preprocessor_config.json`.
fn with_preprocessor(checkpoint: &Path, preprocessor: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in checkpoint.read_dir().unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let from =
            if name == preprocessor.file_name().unwrap() { preprocessor } else { &entry.path() };
        std::os::unix::fs::symlink(from, dir.path().join(name)).unwrap();
    }
    dir
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Of numbers as they are in memory on most machines.
pub fn sha256_of(floats: &[f32]) -> String {
    sha256(&floats.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
}
