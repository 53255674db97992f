//! Makes the tensors of the file, one after another: reads the checkpoint's, reorders and pads their
//! rows, and converts them on all cores.

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use openvla_kernels::{ALIGNMENT, DType, Gguf, Header, parallel_for_each};

use crate::imatrix::ImportanceMatrix;
use crate::interrupt;
use crate::lora::{self, Adapter, Delta};
use crate::mapper::MappedTensor;
use crate::plan::PlannedTensor;
use crate::tensors::{Matrix, Tensors};

/// A source of the file's tensors.
pub trait TensorSource {
    /// Fills `bytes` with one tensor of the file.
    ///
    /// # Errors
    /// If it cannot be read or converted, or [`interrupt::Interrupted`].
    fn fill(&self, planned: &PlannedTensor, bytes: &mut [u8]) -> Result<()>;
}

/// A checkpoint's weights, with an adapter merged into them and an importance matrix to quantize with.
pub struct CheckpointWeights {
    /// The checkpoint's tensors.
    pub tensors: Tensors,
    /// The adapter to be merged.
    pub adapter: Option<Adapter>,
    /// How much each column counts when block scales are chosen.
    pub importance: Option<ImportanceMatrix>,
    /// Threads that convert.
    pub n_threads: usize,
}

/// Makes the plan's tensors one after another, and passes each to `sink`.
///
/// # Errors
/// An error of the source or of `sink`.
pub fn for_each_tensor(
    source: &dyn TensorSource,
    plan: &[PlannedTensor],
    mut sink: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    for planned in plan {
        let mut bytes = vec![0; planned.bytes()];
        source.fill(planned, &mut bytes)?;
        sink(&bytes)?;
    }
    Ok(())
}

/// The planned tensors whose names start with `prefix`, all in F32, as a file in memory.
///
/// # Errors
/// An error of the source.
pub fn in_f32(source: &dyn TensorSource, plan: &[PlannedTensor], prefix: &str) -> Result<Gguf> {
    let named = plan.iter().filter(|planned| planned.tensor.name.starts_with(prefix));
    let tensors: Vec<PlannedTensor> =
        named.map(|planned| PlannedTensor { dtype: DType::F32, ..planned.clone() }).collect();
    let mut header = Header::default();
    for planned in &tensors {
        header.tensor(&planned.tensor.name, planned.dtype, planned.tensor.shape);
    }
    Gguf::in_memory(prefix, &header, |mut data| {
        for planned in &tensors {
            let (tensor, rest) = data.split_at_mut(planned.bytes());
            source.fill(planned, tensor)?;
            data = &mut rest[planned.bytes().next_multiple_of(ALIGNMENT) - planned.bytes()..];
        }
        Ok(())
    })
}

impl TensorSource for CheckpointWeights {
    fn fill(&self, planned: &PlannedTensor, bytes: &mut [u8]) -> Result<()> {
        let cannot = || format!("cannot convert {}", planned.tensor.sources.join(" + "));
        let rows = SourceRows::open(self, &planned.tensor).with_context(cannot)?;
        let importance = self.importance.as_ref().and_then(|all| all.get(&planned.tensor.name));
        let per_thread = planned.n_row().div_ceil(self.n_threads);
        let chunks = bytes.chunks_mut(per_thread * planned.row_bytes()).enumerate();
        let encode =
            |(i, out): (usize, &mut [u8])| rows.encode(planned, importance, i * per_thread, out);
        parallel_for_each(self.n_threads, chunks, encode).with_context(cannot)
    }
}

/// The rows of one tensor of the file, read from the checkpoint and the adapter.
struct SourceRows<'a> {
    tensor: &'a MappedTensor,
    sources: Vec<(Matrix, Option<Delta>)>,
}

/// Rows converted at a time: small enough for the cache, large enough to amortize a call.
const ROWS_AT_A_TIME: usize = 16;

impl<'a> SourceRows<'a> {
    fn open(from: &CheckpointWeights, tensor: &'a MappedTensor) -> Result<Self> {
        let open = |name: &String| {
            let adapter = from.adapter.as_ref();
            let delta = match adapter.map(|adapter| adapter.delta(name)).transpose()?.flatten() {
                Some(delta) => Some(delta),
                None => lora::own_delta(&from.tensors, name)?,
            };
            Ok((from.tensors.matrix(name)?, delta))
        };
        Ok(Self { tensor, sources: tensor.sources.iter().map(open).collect::<Result<_>>()? })
    }

    /// Fills `out` with the encoded rows from `first` on.
    fn encode(
        &self,
        planned: &PlannedTensor,
        importance: Option<&[f32]>,
        first: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let (length, row_bytes) = (self.tensor.shape[0], planned.row_bytes());
        let mut numbers = vec![0.0; ROWS_AT_A_TIME * length];
        let most = largest(planned.dtype);
        for (i, out) in out.chunks_mut(ROWS_AT_A_TIME * row_bytes).enumerate() {
            interrupt::check()?;
            let n = out.len() / row_bytes;
            let numbers = &mut numbers[..n * length];
            for (j, row) in numbers.chunks_exact_mut(length).enumerate() {
                let source_row = self.source_row(first + i * ROWS_AT_A_TIME + j);
                self.read(source_row, row);
                if let Some(column) = row.iter().position(|x| x.is_nan() || x.abs() > most) {
                    let x = row[column];
                    ensure!(
                        !x.is_finite(),
                        "its number {x} at [{source_row}, {column}] is more than {} holds, {most}; \
                         take a wider type for it with --tensor-type, or --bf16",
                        planned.dtype
                    );
                    bail!("it holds {x} at [{source_row}, {column}]; the checkpoint is damaged");
                }
            }
            planned.dtype.encode(numbers, length, importance, out);
        }
        Ok(())
    }

    /// The row of the sources that becomes row `i` of the file. RoPE rotates pairs of channels of a head:
    /// `(2j, 2j + 1)` in llama.cpp, `(j, j + head_dim/2)` in Hugging Face's code.
    fn source_row(&self, i: usize) -> usize {
        let Some(n_head) = self.tensor.rope_heads else { return self.tensor.first_row + i };
        let head_dim = self.tensor.shape[1] / n_head;
        let (head, at) = (i / head_dim, i % head_dim);
        head * head_dim + at / 2 + at % 2 * (head_dim / 2)
    }

    /// Reads row `i` of the concatenated sources, padded with zeros; a row after the last is all zeros.
    fn read(&self, mut i: usize, out: &mut [f32]) {
        out.fill(0.0);
        for (matrix, delta) in &self.sources {
            if i < matrix.n_row {
                let (start, out) = (i * matrix.row, &mut out[..matrix.row]);
                matrix.read(start, out);
                if let Some(delta) = delta {
                    delta.add(start, out);
                }
                return;
            }
            i -= matrix.n_row;
        }
    }
}

/// The largest number that a type can hold; block scales are f16.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::MAX,
        DType::BF16 => bf16::MAX.to_f32(),
        _ => f16::MAX.to_f32(),
    }
}
