//! What tells a checkpoint's weights from those of others, whatever they are called and wherever
//! they lie, for the price of a page of each tensor.

use std::collections::BTreeSet;
use std::hash::Hasher;
use std::path::Path;

use anyhow::{Result, ensure};
use openvla::{Config, General};
use openvla_kernels::Gguf;
use twox_hash::XxHash64;

use crate::lora::Adapter;
use crate::names::Layout;
use crate::tensors::Tensors;

/// Numbers of each tensor that are looked at. Training changes nearly all of them.
const SAMPLE: usize = 256;

/// A hash of the tensors that the model reads, and of what an adapter adds.
///
/// # Errors
/// Names a file that cannot be mapped.
pub fn fingerprint(
    layout: &Layout,
    tensors: &Tensors,
    adapter: Option<&Adapter>,
) -> Result<String> {
    let names: BTreeSet<_> = layout.parts.iter().flat_map(|part| &part.sources).collect();
    let mut hash = XxHash64::with_seed(0);
    add(&mut hash, tensors, names)?;
    if let Some(adapter) = adapter {
        hash.write(&adapter.scale().to_le_bytes());
        add(&mut hash, adapter.tensors(), adapter.tensors().entries().keys())?;
    }
    Ok(format!("{:016x}", hash.finish()))
}

fn add<'a>(
    hash: &mut XxHash64,
    tensors: &Tensors,
    names: impl IntoIterator<Item = &'a String>,
) -> Result<()> {
    for name in names {
        let matrix = tensors.matrix(name)?;
        let mut sample = vec![0.0; SAMPLE.min(matrix.row * matrix.n_row)];
        matrix.read(0, &mut sample);
        hash.write(name.as_bytes());
        sample.iter().for_each(|number| hash.write(&number.to_le_bytes()));
    }
    Ok(())
}

/// Checks that a file may be replaced without being asked for by name: it is not there, or it was
/// written from the same weights.
///
/// # Errors
/// Asks for another name.
pub fn check_replaceable(path: &Path, fingerprint: &Option<String>) -> Result<()> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let there = Gguf::open(path).ok().and_then(|file| Config::read(&file).ok());
    let same =
        |General { source, .. }| source.fingerprint.is_some() && source.fingerprint == *fingerprint;
    ensure!(
        there.is_some_and(|config| same(config.general)),
        "{} is there already, and was not written from this checkpoint; name another file with -o, \
         or the same one to replace it",
        path.display()
    );
    Ok(())
}
