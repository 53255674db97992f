//! At full size, names and shapes are those of the reference's modules, and settings those of the
//! published model.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use super::config::config;
use super::{Size, Spec, Variant};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in it")
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn names_and_shapes_are_the_published_ones() -> Result<()> {
    let modules = json(&repository().join("tests/reference/modules.json"))?;
    for (variant, model) in [(Variant::OpenVla, "openvla"), (Variant::V01, "v01")] {
        let published: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(modules[model].clone())?;
        let spec = Spec { variant, size: Size::Full, ..Spec::EXAMPLE };
        let ours: BTreeMap<_, _> = spec.tensors().into_iter().map(|t| (t.name, t.shape)).collect();
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
    fn the_settings_are_the_published_ones() -> Result<()> {
        let object = |value: Value| -> Result<Map<String, Value>> {
            let mut object = value.as_object().context("no object")?.clone();
            // Made-up statistics, and no code to run.
            object.retain(|key, _| !["auto_map", "norm_stats"].contains(&key.as_str()));
            Ok(object)
        };
        let published = json(&published("config.json"))?;
        let ours = config(Variant::OpenVla, &Size::Full.sizes())?;
        assert_eq!(object(ours)?, object(published)?);
        Ok(())
    }
}
