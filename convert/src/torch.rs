//! PyTorch's files: the tensors of a state dict that `torch.save` wrote.
//!
//! A ZIP archive holds a pickle, which is a program for Python, and the bytes of each storage. Here
//! nothing of that program is run: [`pickle`] knows the few instructions that a state dict is made
//! of and refuses all others by name, [`zip`] finds the bytes, and both check every size against the
//! file before they allocate anything.
//!
//! ref: torch 2.2 `serialization.py` `_save`, `_utils.py` `_rebuild_tensor_v2`

mod bytes;
mod names;
pub mod pickle;
pub mod zip;

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;

use self::pickle::View;
use self::zip::Archive;

/// Where a tensor's numbers are: little-endian, its last dimension contiguous.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// The type of its storage.
    pub dtype: Dtype,
    /// PyTorch's order, slowest first; none for a scalar.
    pub shape: Vec<usize>,
    /// Bytes before it in the file.
    pub offset: u64,
    /// Its bytes, at least one.
    pub length: usize,
}

/// The largest pickle that is read. That of a vision backbone with FiLM has half a megabyte.
const MAX_PICKLE: usize = 1 << 24;

/// What `DistributedDataParallel` puts before each name.
const WRAPPED: &str = "module.";

/// The tensors of a state dict, by name. If all names start with `module.`, that is left out.
///
/// # Errors
/// What is damaged, or is in the file beyond tensors.
pub fn read(file: impl Read + Seek) -> Result<BTreeMap<String, Tensor>> {
    let mut archive = Archive::open(file)?;
    let pickle = "/data.pkl";
    let roots: Vec<_> = archive.names().filter_map(|name| name.strip_suffix(pickle)).collect();
    let [root] = roots[..] else {
        bail!("it has {} entries named data.pkl; a file by torch.save has one", roots.len());
    };
    let root = root.to_owned();
    if let Some(order) = archive.read(&format!("{root}/byteorder"), MAX_PICKLE)? {
        let order = String::from_utf8_lossy(&order);
        ensure!(order == "little", "its byte order is {order:?}; little is read");
    }
    let pickle = archive.read(&format!("{root}{pickle}"), MAX_PICKLE)?.unwrap_or_default();
    let views = pickle::state_dict(&pickle)?;
    let wrapped = views.iter().all(|(name, _)| name.starts_with(WRAPPED));
    let mut tensors = BTreeMap::new();
    for (name, view) in views {
        let tensor = locate(&mut archive, &root, &view);
        let tensor = tensor.with_context(|| format!("the tensor {name:?} cannot be read"))?;
        let plain = if wrapped { &name[WRAPPED.len()..] } else { name };
        let twice = tensors.insert(plain.to_owned(), tensor).is_some();
        ensure!(!twice, "it holds the tensor {name:?} twice");
    }
    Ok(tensors)
}

/// Finds a tensor's bytes in the file.
fn locate<F: Read + Seek>(archive: &mut Archive<F>, root: &str, view: &View) -> Result<Tensor> {
    let storage = view.storage;
    let entry = format!("{root}/data/{}", storage.key);
    let found = archive.locate(&entry)?.with_context(|| format!("there is no entry {entry:?}"))?;
    let width = storage.dtype.bitsize() as u64 / 8;
    let (size, numel) = (found.end - found.start, storage.numel);
    ensure!(
        numel.checked_mul(width) == Some(size),
        "its storage has {numel} numbers of {:?}, but {entry:?} has {size} bytes",
        storage.dtype
    );
    let end = view.start.checked_add(view.numel);
    ensure!(
        end.is_some_and(|end| end <= numel),
        "it has {} numbers from number {} on, its storage {numel} in all",
        view.numel,
        view.start
    );
    // Neither overflows: both are within the entry, whose end was checked.
    let (offset, length) = (found.start + view.start * width, view.numel * width);
    let (dtype, shape) = (storage.dtype, view.shape.clone());
    Ok(Tensor { dtype, shape, offset, length: usize::try_from(length)? })
}
