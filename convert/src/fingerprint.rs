//! A hash that tells a checkpoint's weights from those of others, independent of their names and folders.
//! It reads one page of each tensor.

use std::collections::BTreeSet;
use std::hash::Hasher;
use std::path::Path;

use anyhow::{Result, ensure};
use openvla::{Config, General};
use openvla_kernels::Gguf;
use twox_hash::XxHash64;

use crate::lora::Adapter;
use crate::mapping::Mapping;
use crate::tensors::Tensors;

/// Numbers of each tensor that are hashed. Training changes nearly all of them.
const SAMPLE: usize = 256;

/// A hash of the tensors that the model reads, and of what an adapter adds.
///
/// # Errors
/// Names a file that cannot be mapped.
pub fn fingerprint(
    mapping: &Mapping,
    tensors: &Tensors,
    adapter: Option<&Adapter>,
) -> Result<String> {
    let names: BTreeSet<_> = mapping.tensors.iter().flat_map(|tensor| &tensor.sources).collect();
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

/// Checks that a file may be replaced though the user did not name it: it does not exist, or was
/// written from the same weights.
///
/// # Errors
/// Asks the user for a name.
pub fn check_replaceable(path: &Path, fingerprint: &Option<String>) -> Result<()> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let existing = Gguf::open(path).ok().and_then(|file| Config::read(&file).ok());
    let same =
        |General { source, .. }| source.fingerprint.is_some() && source.fingerprint == *fingerprint;
    ensure!(
        existing.is_some_and(|config| same(config.general)),
        "{} exists already, and was not written from this checkpoint; name another file with -o, \
         or the same one to replace it",
        path.display()
    );
    Ok(())
}
