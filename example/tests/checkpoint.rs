//! The committed files are what the program writes, and the variants are what they say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use openvla_example::{COMMITTED, Size, Spec, Variant, table_image, table_png, write};
use safetensors::SafeTensors;

/// Contents, by name.
type Files = BTreeMap<String, Vec<u8>>;
/// Shape and bytes.
type Tensor = (Vec<usize>, Vec<u8>);

fn files(dir: &Path) -> Result<Files> {
    fs::read_dir(dir)?
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?))
        })
        .collect()
}

/// Shape and bytes of each tensor in a folder's safetensors files.
fn tensors(files: &Files) -> Result<BTreeMap<String, Tensor>> {
    let mut found = BTreeMap::new();
    for (_, bytes) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        for (name, view) in SafeTensors::deserialize(bytes)?.tensors() {
            found.insert(name, (view.shape().to_vec(), view.data().to_vec()));
        }
    }
    Ok(found)
}

fn written(spec: &Spec) -> Result<Files> {
    let dir = tempfile::tempdir()?;
    write(dir.path(), spec)?;
    files(dir.path())
}

#[test]
fn committed_files_are_what_is_written() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (committed, fresh) = (files(&here.join("openvla-example"))?, written(&COMMITTED)?);
    assert_eq!(committed.keys().collect::<Vec<_>>(), fresh.keys().collect::<Vec<_>>());
    for (name, bytes) in &fresh {
        assert!(committed[name] == *bytes, "{name} differs; run `cargo run -p openvla-example`");
    }
    // By pixels: another release of the compressor may pack the same picture into other bytes.
    let picture = image::open(here.join("table.png"))?.into_rgb8();
    assert!(picture == table_image(), "table.png differs; run `cargo run -p openvla-example`");
    Ok(())
}

#[test]
fn committed_files_are_small() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let beside = ["table.png", "expected.json"].map(|name| fs::metadata(here.join(name)));
    let mut total: usize = files(&here.join("openvla-example"))?.values().map(Vec::len).sum();
    for file in beside {
        total += usize::try_from(file?.len())?;
    }
    assert!(total <= 1_000_000, "{total} bytes");
    Ok(())
}

#[test]
fn picture_survives_its_file() -> Result<()> {
    let decoded = image::load_from_memory(&table_png()?)?.into_rgb8();
    assert!(decoded == table_image());
    Ok(())
}

#[test]
fn shards_hold_the_same_tensors_and_split_each_layer() -> Result<()> {
    let sharded = written(&Spec { shards: 3, ..COMMITTED })?;
    assert_eq!(tensors(&sharded)?, tensors(&written(&COMMITTED)?)?);
    let index: serde_json::Value =
        serde_json::from_slice(&sharded["model.safetensors.index.json"])?;
    let weight_map = index["weight_map"].as_object().context("no weight_map")?;
    for layer in ["language_model.model.layers.0.", "language_model.model.layers.1."] {
        let parts = weight_map.iter().filter(|(name, _)| name.starts_with(layer));
        let homes: BTreeSet<_> = parts.filter_map(|(_, file)| file.as_str()).collect();
        assert_eq!(homes.len(), 3, "{layer}* lies in {homes:?}");
    }
    Ok(())
}

#[test]
fn seeds_differ_and_v01_has_one_tower_and_no_fast_tokenizer() -> Result<()> {
    let spec = Spec { variant: Variant::V01, seed: 1, ..COMMITTED };
    let v01 = written(&spec)?;
    assert!(!v01.contains_key("tokenizer.json"));
    let names = tensors(&v01)?;
    assert!(!names.keys().any(|name| name.contains("fused") || name.starts_with("projector.fc3")));
    assert!(names.contains_key("vision_backbone.featurizer.attn_pool.latent"));
    assert!(tensors(&written(&Spec { seed: 2, ..spec })?)? != names);
    Ok(())
}

#[test]
fn wide_differs_in_its_llama_whose_rows_are_of_whole_k_quant_blocks() -> Result<()> {
    let wide = written(&Spec { size: Size::Wide, ..COMMITTED })?;
    let (wide_tensors, tiny) = (tensors(&wide)?, tensors(&written(&COMMITTED)?)?);
    let (llama, others): (Vec<_>, Vec<_>) =
        wide_tensors.iter().partition(|(name, _)| name.starts_with("language_model."));
    for (name, (shape, _)) in llama {
        assert_eq!(shape[shape.len() - 1] % 256, 0, "{name}: {shape:?}");
    }
    for (name, tensor) in others.iter().filter(|(name, _)| !name.starts_with("projector.")) {
        assert!(tiny[*name] == **tensor, "{name} differs");
    }
    Ok(())
}

#[test]
fn slim_is_the_full_size_with_fewer_blocks() {
    let shapes = |size| {
        let tensors = Spec { size, ..COMMITTED }.tensors().into_iter();
        tensors.map(|tensor| (tensor.name, tensor.shape)).collect::<BTreeMap<_, _>>()
    };
    let (slim, full) = (shapes(Size::Slim), shapes(Size::Full));
    assert!(slim.len() < full.len() / 5, "{} of {}", slim.len(), full.len());
    for (name, shape) in slim {
        assert_eq!(full[&name], shape, "{name}");
    }
}

#[test]
fn impossible_shards_are_refused_before_anything_is_written() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for shards in [0, 10_000] {
        let error = write(dir.path(), &Spec { shards, ..COMMITTED }).unwrap_err();
        assert!(error.to_string().contains("shards"), "{error}");
    }
    assert!(files(dir.path())?.is_empty());
    Ok(())
}
