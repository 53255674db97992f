//! At full size, names, shapes, files and settings are the published models'.
//!
//! Needs `../shared` beside the repository: the files around openvla-7b, and `golden/facts.json`,
//! counted on the reference's modules. Says so and passes where it is not.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::config::config;
use crate::model::{Tensor, tensors};
use crate::weights::{files, index};
use crate::{COMMITTED, Size, Spec, Variant};

fn shared() -> Option<PathBuf> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2)?.join("shared");
    let found = shared.is_dir().then_some(shared);
    if found.is_none() {
        eprintln!("SKIPPED: the published files (../shared) are not here");
    }
    found
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

fn full(variant: Variant) -> (Spec, Vec<Tensor>) {
    let spec = Spec { variant, size: Size::Full, shards: 3, ..COMMITTED };
    (spec, tensors(variant, &spec.size.sizes()))
}

#[test]
fn names_and_shapes_are_the_published_ones() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    let facts = json(&shared.join("golden/facts.json"))?;
    for (variant, model) in [(Variant::OpenVla, "dinosiglip"), (Variant::V01, "v01")] {
        let published: BTreeMap<String, Vec<usize>> =
            serde_json::from_value::<Vec<(String, Vec<usize>)>>(facts[model]["tensors"].clone())?
                .into_iter()
                .collect();
        let (spec, ours) = full(variant);
        assert_eq!(files(&spec, &ours)?.len(), 3);
        assert_eq!(facts[model]["n_tensors"], ours.len());
        assert_eq!(facts[model]["total"], ours.iter().map(Tensor::n).sum::<usize>());
        let ours: BTreeMap<_, _> = ours.into_iter().map(|t| (t.name, t.shape)).collect();
        assert_eq!(ours, published, "{model}");
    }
    Ok(())
}

#[test]
fn every_tensor_is_in_the_published_file() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    let (spec, tensors) = full(Variant::OpenVla);
    let published = shared.join("real_configs/openvla-7b/model.safetensors.index.json");
    assert_eq!(index(&files(&spec, &tensors)?), json(&published)?);
    let other = Spec { shards: 4, ..spec };
    assert!(files(&other, &tensors).unwrap_err().to_string().contains("there are 3"));
    Ok(())
}

#[test]
fn the_settings_are_the_published_ones() -> Result<()> {
    let Some(shared) = shared() else { return Ok(()) };
    let object = |value: Value| -> Result<Map<String, Value>> {
        let mut object = value.as_object().context("no object")?.clone();
        // Statistics of our own, and no code to run.
        object.retain(|key, _| !["auto_map", "norm_stats"].contains(&key.as_str()));
        Ok(object)
    };
    let published = json(&shared.join("real_configs/openvla-7b/config.json"))?;
    let ours = config(Variant::OpenVla, &Size::Full.sizes())?;
    assert_eq!(object(ours)?, object(published)?);
    Ok(())
}
