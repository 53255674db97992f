//! Runs a plan: fills one tensor of the file after another. Those of a checkpoint are read, their
//! rows sorted and padded, and converted on all cores.

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use openvla_kernels::{ALIGNMENT, DType, Gguf, Header, parallel_for_each};

use crate::imatrix::Importance;
use crate::interrupt;
use crate::lora::{Adapter, Delta};
use crate::names::Part;
use crate::plan::Planned;
use crate::tensors::{Matrix, Tensors};

/// Where a file's tensors come from.
pub trait Origin {
    /// Fills `bytes` with one tensor of the file.
    ///
    /// # Errors
    /// What keeps it from being made, or [`interrupt::Interrupted`].
    fn fill(&self, planned: &Planned, bytes: &mut [u8]) -> Result<()>;
}

/// What a file is made of: a checkpoint's tensors, and what is added to them.
pub struct Ingredients {
    /// The checkpoint.
    pub tensors: Tensors,
    /// A fine-tuned model's difference, if it came apart from its base.
    pub adapter: Option<Adapter>,
    /// How much each column counts when blocks choose their scales.
    pub importance: Option<Importance>,
    /// Threads that convert.
    pub n_threads: usize,
}

/// Makes the plan's tensors one after another, and gives each to `sink`.
///
/// # Errors
/// What the origin or `sink` says.
pub fn tensors(
    from: &dyn Origin,
    plan: &[Planned],
    mut sink: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    for planned in plan {
        let mut bytes = vec![0; planned.bytes()];
        from.fill(planned, &mut bytes)?;
        sink(&bytes)?;
    }
    Ok(())
}

/// The planned tensors whose names start with `prefix` as a file in memory, all in F32.
///
/// # Errors
/// What the origin says.
pub fn in_f32(from: &dyn Origin, plan: &[Planned], prefix: &str) -> Result<Gguf> {
    let named = plan.iter().filter(|planned| planned.part.name.starts_with(prefix));
    let part: Vec<Planned> =
        named.map(|planned| Planned { dtype: DType::F32, ..planned.clone() }).collect();
    let mut header = Header::default();
    for planned in &part {
        header.tensor(&planned.part.name, planned.dtype, planned.part.shape);
    }
    Gguf::in_memory(prefix, &header, |mut data| {
        for planned in &part {
            let (tensor, rest) = data.split_at_mut(planned.bytes());
            from.fill(planned, tensor)?;
            data = &mut rest[planned.bytes().next_multiple_of(ALIGNMENT) - planned.bytes()..];
        }
        Ok(())
    })
}

impl Origin for Ingredients {
    fn fill(&self, planned: &Planned, bytes: &mut [u8]) -> Result<()> {
        let cannot = || format!("cannot convert {}", planned.part.sources.join(" + "));
        let rows = Rows::open(self, &planned.part).with_context(cannot)?;
        let importance = self.importance.as_ref().and_then(|all| all.get(&planned.part.name));
        let per_thread = planned.n_row().div_ceil(self.n_threads);
        let chunks = bytes.chunks_mut(per_thread * planned.row_bytes()).enumerate();
        let encode =
            |(i, out): (usize, &mut [u8])| rows.encode(planned, importance, i * per_thread, out);
        parallel_for_each(self.n_threads, chunks, encode).with_context(cannot)
    }
}

/// The rows of a part in the file's order, whatever they are made of.
struct Rows<'a> {
    part: &'a Part,
    sources: Vec<(Matrix, Option<Delta>)>,
}

/// Rows converted at a time: small enough for the cache, large enough to amortise a call.
const ROWS_AT_A_TIME: usize = 16;

impl<'a> Rows<'a> {
    fn open(from: &Ingredients, part: &'a Part) -> Result<Self> {
        let open = |name: &String| {
            let adapter = from.adapter.as_ref();
            let delta = adapter.map(|adapter| adapter.delta(name)).transpose()?.flatten();
            Ok((from.tensors.matrix(name)?, delta))
        };
        Ok(Self { part, sources: part.sources.iter().map(open).collect::<Result<_>>()? })
    }

    /// Fills `out` with rows from `first` on.
    fn encode(
        &self,
        planned: &Planned,
        importance: Option<&[f32]>,
        first: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let (length, row_bytes) = (self.part.shape[0], planned.row_bytes());
        let mut numbers = vec![0.0; ROWS_AT_A_TIME * length];
        let most = largest(planned.dtype);
        for (i, out) in out.chunks_mut(ROWS_AT_A_TIME * row_bytes).enumerate() {
            interrupt::check()?;
            let n = out.len() / row_bytes;
            let numbers = &mut numbers[..n * length];
            for (j, row) in numbers.chunks_exact_mut(length).enumerate() {
                let origin = self.origin(first + i * ROWS_AT_A_TIME + j);
                self.read(origin, row);
                if let Some(column) = row.iter().position(|x| x.is_nan() || x.abs() > most) {
                    let x = row[column];
                    ensure!(
                        !x.is_finite(),
                        "its number {x} at [{origin}, {column}] is more than {} holds, {most}; \
                         take a wider type for it with --tensor-type, or --bf16",
                        planned.dtype
                    );
                    bail!("it holds {x} at [{origin}, {column}]; the checkpoint is damaged");
                }
            }
            planned.dtype.encode(numbers, length, importance, out);
        }
        Ok(())
    }

    /// Which row of the sources becomes row `i` of the file. llama.cpp turns channels
    /// `(2j, 2j + 1)` of a head together, Hugging Face `(j, j + head_dim/2)`.
    fn origin(&self, i: usize) -> usize {
        let Some(n_head) = self.part.rope_heads else { return self.part.first_row + i };
        let head_dim = self.part.shape[1] / n_head;
        let (head, at) = (i / head_dim, i % head_dim);
        head * head_dim + at / 2 + at % 2 * (head_dim / 2)
    }

    /// Row `i` of the sources, then zeros; beyond them, zeros.
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

/// The largest number that a type surely holds: the scales of blocks are f16 too.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::MAX,
        DType::BF16 => bf16::MAX.to_f32(),
        _ => f16::MAX.to_f32(),
    }
}
