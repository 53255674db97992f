//! The header of a GGUF file to be written: metadata, tensor entries, padding.

use crate::value::write_string;
use crate::{DType, Shape, Value};

/// Tensor data starts at multiples of this many bytes: ggml's default, and its CPU's need.
pub const ALIGNMENT: usize = 32;

/// ggml keeps names in 64 bytes, the last one zero.
pub const MAX_TENSOR_NAME: usize = 63;

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
pub(crate) const VERSION: u32 = 3;

/// Everything before the data section of a file to be written.
#[derive(Debug, Clone, Default)]
pub struct Header {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, DType, Shape)>,
}

impl Header {
    /// Adds a metadata key.
    ///
    /// # Panics
    /// If it is there already, empty, or the alignment, which is [`ALIGNMENT`] without being said.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        assert!(!["", "general.alignment"].contains(&key), "`{key}` is not a key to set");
        assert!(self.metadata.iter().all(|(other, _)| other != key), "`{key}` is set twice");
        self.metadata.push((key.to_owned(), value.into()));
    }

    /// Adds a tensor. Its data follows those of the tensors before it, each padded with zeros to
    /// [`ALIGNMENT`].
    ///
    /// # Panics
    /// If [`crate::Gguf`] would refuse the name or the shape, or the name is there already.
    pub fn tensor(&mut self, name: &str, dtype: DType, shape: Shape) {
        let named = (1..=MAX_TENSOR_NAME).contains(&name.len()) && !name.contains('\0');
        assert!(named, "`{name}`: names are 1 to {MAX_TENSOR_NAME} bytes");
        assert!(self.tensors.iter().all(|(other, ..)| other != name), "`{name}` is added twice");
        let bytes = bytes_of(dtype, &shape).is_some_and(|bytes| bytes > 0);
        assert!(bytes, "`{name}`: no {dtype} tensor has shape {shape:?}");
        self.tensors.push((name.to_owned(), dtype, shape));
    }

    /// The bytes before the data section, padded.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            write_string(key, &mut out);
            out.extend(value.kind().to_le_bytes());
            value.write(&mut out);
        }
        let mut offset = 0;
        for (name, dtype, shape) in &self.tensors {
            write_string(name, &mut out);
            let n_dim = shape.iter().rposition(|n| *n != 1).map_or(1, |last| last + 1);
            out.extend((n_dim as u32).to_le_bytes());
            shape[..n_dim].iter().for_each(|n| out.extend((*n as u64).to_le_bytes()));
            out.extend(dtype.number().to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += padded(*dtype, shape);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }

    /// Bytes of the data section.
    pub fn data_bytes(&self) -> usize {
        self.tensors.iter().map(|(_, dtype, shape)| padded(*dtype, shape)).sum()
    }
}

/// Bytes from the start of a tensor that was added to the start of the next.
fn padded(dtype: DType, shape: &Shape) -> usize {
    bytes_of(dtype, shape).expect("checked when it was added").next_multiple_of(ALIGNMENT)
}

/// Bytes of a tensor, or `None` if rows are not a whole number of blocks or it is too large.
pub(crate) fn bytes_of(dtype: DType, shape: &Shape) -> Option<usize> {
    let row = dtype.row_bytes(shape[0])?;
    shape[1..].iter().try_fold(row, |bytes, n| bytes.checked_mul(*n))
}
