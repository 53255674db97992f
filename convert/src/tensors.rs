//! Reads safetensors and PyTorch files: which tensors they hold, and the rows of those as f32.
//!
//! Headers are read and checked at once; data is read tensor by tensor and freed after use, so
//! that memory stays small at any model size.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use openvla_kernels::Mapped;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::aliases::canonical;
use crate::files;
use crate::torch;

/// One tensor of a header: its type, its shape, and where its bytes are.
#[derive(Debug, Clone)]
pub struct TensorEntry {
    /// Index into [`Tensors::files`].
    file: usize,
    dtype: Dtype,
    /// PyTorch's order, slowest first.
    pub shape: Vec<usize>,
    offset: u64,
    length: usize,
    /// Whether its numbers are rounded to bf16, which the model computes with whatever the file holds.
    as_bf16: bool,
}

/// The tensors of one file or several.
#[derive(Default)]
pub struct Tensors {
    entries: BTreeMap<String, TensorEntry>,
    files: Vec<(PathBuf, File)>,
}

/// The largest accepted header: the limit of the format's own library.
const MAX_HEADER: u64 = 100_000_000;

/// The probable cause of empty or missing tensors, and what to do.
pub const ZERO_3: &str = "a save under DeepSpeed ZeRO-3 leaves tensors empty: set \
     stage3_gather_16bit_weights_on_model_save, or use its zero_to_fp32.py";

impl Tensors {
    /// Adds a file's tensors, under the names that transformers 4 has for them.
    ///
    /// # Errors
    /// Names the file, and what is missing or damaged.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        let file = files::open(path).with_context(|| {
            format!("cannot open {}; is the checkpoint complete?", path.display())
        })?;
        let at = |what: &str| format!("{} {what}", path.display());
        let cut_off =
            || at("is cut off or not a safetensors file; delete it and download it again");
        let cannot = || format!("cannot read {}", path.display());
        let found = file.metadata().with_context(cannot)?;
        ensure!(found.len() >= 8, cut_off());
        let read = |from, n| Mapped::read(&file, from, n).with_context(cannot);
        let header = u64::from_le_bytes(*read(0, 8)?.first_chunk().expect("8"));
        ensure!(header <= MAX_HEADER.min(found.len() - 8), cut_off());
        // Not `SafeTensors::read_metadata`, whose sums of untrusted sizes may overflow.
        let metadata: Metadata =
            serde_json::from_slice(&read(8, usize::try_from(header)?)?).with_context(cut_off)?;
        ensure!(metadata.data_len() as u64 == found.len() - 8 - header, cut_off());
        for (tensor, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            ensure!(
                end > start,
                at(&format!("holds {tensor} of shape {:?}: nothing; {ZERO_3}", info.shape))
            );
            let entry = TensorEntry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: 8 + header + start as u64,
                length: end - start,
                as_bf16: false,
            };
            let twice = self.entries.insert(canonical(&tensor), entry).is_some();
            ensure!(!twice, at(&format!("holds {tensor}, which another shard holds too")));
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }

    /// Adds the tensors of a state dict that `torch.save` wrote, with `prefix` before each name. Their numbers are
    /// rounded to bf16: openvla-oft saves some of its modules in f32, and loads all into bf16.
    ///
    /// # Errors
    /// Names the file, and what is damaged or refused: see [`torch::read`].
    pub fn add_torch(&mut self, path: &Path, prefix: &str) -> Result<()> {
        let file = files::open(path)?;
        let tensors = torch::read(&file)
            .with_context(|| format!("cannot read the PyTorch file {}", path.display()))?;
        for (name, torch::Tensor { dtype, shape, offset, length }) in tensors {
            let name = format!("{prefix}{name}");
            let entry =
                TensorEntry { file: self.files.len(), dtype, shape, offset, length, as_bf16: true };
            let twice = self.entries.insert(name.clone(), entry).is_some();
            ensure!(!twice, "{} holds {name}, which another file holds too", path.display());
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }

    /// The files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// Takes out the tensors that `matches`.
    pub fn remove(&mut self, matches: impl Fn(&str) -> bool) {
        self.entries.retain(|name, _| !matches(name));
    }

    /// Renames every tensor by `to`.
    pub fn rename(&mut self, to: impl Fn(&str) -> String) {
        let entries = std::mem::take(&mut self.entries).into_iter();
        self.entries = entries.map(|(name, entry)| (to(&name), entry)).collect();
    }

    /// All tensors, by name.
    pub fn entries(&self) -> &BTreeMap<String, TensorEntry> {
        &self.entries
    }

    /// Checks that a tensor has a supported float type.
    ///
    /// # Errors
    /// Names the tensor, its file and its type.
    pub fn check_type(&self, name: &str) -> Result<()> {
        let TensorEntry { dtype, file, .. } = &self.entries[name];
        ensure!(
            matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32),
            "{}: the tensor {name} is {dtype:?}; BF16, F16 and F32 are read",
            self.files[*file].0.display()
        );
        Ok(())
    }

    /// Reads a tensor whose type was checked with [`Tensors::check_type`].
    ///
    /// # Errors
    /// Names the file if it cannot be read.
    pub fn matrix(&self, name: &str) -> Result<Matrix> {
        let entry = &self.entries[name];
        let row = *entry.shape.last().with_context(|| format!("{name} has no dimensions"))?;
        let n_row = entry.shape.iter().product::<usize>() / row.max(1);
        let (path, file) = &self.files[entry.file];
        let bytes = Mapped::read(file, entry.offset, entry.length)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Matrix { bytes, dtype: entry.dtype, as_bf16: entry.as_bf16, row, n_row })
    }
}

/// A tensor, as a matrix whose rows are its last dimension.
pub struct Matrix {
    bytes: Mapped,
    dtype: Dtype,
    as_bf16: bool,
    /// Numbers in a row.
    pub row: usize,
    /// Rows.
    pub n_row: usize,
}

impl Matrix {
    /// Whether both hold the same numbers, whatever their types.
    pub fn equals(&self, other: &Self) -> bool {
        let numbers = |matrix: &Self, row: usize| {
            let mut numbers = vec![0.0; matrix.row];
            matrix.read(row * matrix.row, &mut numbers);
            numbers
        };
        (self.row, self.n_row) == (other.row, other.n_row)
            && (0..self.n_row).all(|row| numbers(self, row) == numbers(other, row))
    }

    /// Fills `out` with consecutive numbers from index `start` on, across rows.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.bytes[start * size..][..out.len() * size];
        match self.dtype {
            Dtype::BF16 => decode(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => decode(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            _ if self.as_bf16 => {
                decode(bytes, out, |b| bf16::from_f32(f32::from_le_bytes(b)).to_f32());
            }
            _ => decode(bytes, out, f32::from_le_bytes),
        }
    }
}

fn decode<const N: usize>(bytes: &[u8], out: &mut [f32], number: fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = number(*bytes);
    }
}
