//! At full size, names and shapes are those of the reference's modules; files and settings are the
//! published model's, where those are beside the repository.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::config::config;
use crate::model::{Tensor, tensors};
use crate::weights::{files, index};
use crate::{COMMITTED, Size, Spec, Variant};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in it")
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
    let modules = json(&repository().join("tests/reference/modules.json"))?;
    for (variant, model) in [(Variant::OpenVla, "openvla"), (Variant::V01, "v01")] {
        let published: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(modules[model].clone())?;
        let (spec, ours) = full(variant);
        assert_eq!(files(&spec, &ours)?.len(), 3);
        let ours: BTreeMap<_, _> = ours.into_iter().map(|t| (t.name, t.shape)).collect();
        assert_eq!(ours, published, "{model}");
    }
    Ok(())
}

mod shared {
    use super::*;

    fn published(file: &str) -> PathBuf {
        repository().join("../shared/real_configs/openvla-7b").join(file)
    }

    #[test]
    #[ignore = "needs ../shared"]
    fn every_tensor_is_in_the_published_file() -> Result<()> {
        let (spec, tensors) = full(Variant::OpenVla);
        let published = published("model.safetensors.index.json");
        assert_eq!(index(&files(&spec, &tensors)?), json(&published)?);
        let other = Spec { shards: 4, ..spec };
        assert!(files(&other, &tensors).unwrap_err().to_string().contains("there are 3"));
        Ok(())
    }

    #[test]
    #[ignore = "needs ../shared"]
    fn the_settings_are_the_published_ones() -> Result<()> {
        let object = |value: Value| -> Result<Map<String, Value>> {
            let mut object = value.as_object().context("no object")?.clone();
            // Statistics of our own, and no code to run.
            object.retain(|key, _| !["auto_map", "norm_stats"].contains(&key.as_str()));
            Ok(object)
        };
        let published = json(&published("config.json"))?;
        let ours = config(Variant::OpenVla, &Size::Full.sizes())?;
        assert_eq!(object(ours)?, object(published)?);
        Ok(())
    }
}
