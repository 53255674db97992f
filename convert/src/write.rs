//! Runs a plan: reads a tensor, sorts and pads its rows, converts them on all cores, writes them.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use indicatif::ProgressBar;
use openvla_kernels::{ALIGNMENT, DType, Header};
use tempfile::NamedTempFile;

use crate::imatrix::Importance;
use crate::lora::{Adapter, Delta};
use crate::names::Part;
use crate::plan::Planned;
use crate::tensors::{Matrix, Tensors};

/// What a file is made of: a checkpoint's tensors, and what is added to them.
pub struct Ingredients<'a> {
    /// The checkpoint.
    pub tensors: &'a Tensors,
    /// A fine-tuned model's difference, if it came apart from its base.
    pub adapter: Option<&'a Adapter>,
    /// How much each column counts when blocks choose their scales.
    pub importance: Option<&'a Importance>,
}

/// Writes the file beside its place and moves it there when it is whole.
pub fn write(
    from: &Ingredients<'_>,
    header: &Header,
    plan: &[Planned],
    out: &Path,
    progress: &ProgressBar,
) -> Result<()> {
    let mut file = Beside::create(out)?;
    file.append(&header.encode())?;
    for planned in plan {
        let bytes = convert(from, planned)
            .with_context(|| format!("cannot convert {}", planned.part.sources.join(" + ")))?;
        file.append(&bytes)?;
        progress.inc(bytes.len() as u64);
    }
    file.finish()
}

/// A file that is written beside its place; dropped, it leaves no trace.
pub(crate) struct Beside<'a> {
    out: &'a Path,
    file: BufWriter<NamedTempFile>,
}

impl<'a> Beside<'a> {
    /// Starts a file that will be at `out`.
    pub fn create(out: &'a Path) -> Result<Self> {
        let folder = match out.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        ensure!(!out.is_dir(), "{} is a folder; name a file with -o", out.display());
        // Such as /dev/null, which would be replaced.
        let replaceable = std::fs::metadata(out).map_or(true, |there| there.is_file());
        ensure!(replaceable, "{} is no regular file; name another with -o", out.display());
        let file = tempfile::Builder::new()
            .prefix(".openvla-")
            .suffix(".gguf.part")
            .permissions(permissions())
            .tempfile_in(folder)
            .with_context(|| format!("cannot write into {}", folder.display()))?;
        Ok(Self { out, file: BufWriter::new(file) })
    }

    /// Adds bytes, and zeros up to [`ALIGNMENT`].
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let padding = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
        for bytes in [bytes, &[0; ALIGNMENT][..padding]] {
            self.file.write_all(bytes).with_context(|| cannot_write(self.out))?;
        }
        Ok(())
    }

    /// Moves the file to its place, whole and on the disk.
    pub fn finish(self) -> Result<()> {
        let failed = || cannot_write(self.out);
        let file = self.file.into_inner().map_err(|e| e.into_error()).with_context(failed)?;
        file.as_file().sync_all().with_context(failed)?;
        file.persist(self.out).map_err(|e| e.error).with_context(failed)?;
        Ok(())
    }
}

fn cannot_write(out: &Path) -> String {
    format!("cannot write {}", out.display())
}

/// A model is no secret: as any new file, not as a temporary one.
fn permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o644)
}

/// The bytes of one tensor of the file.
fn convert(from: &Ingredients<'_>, planned: &Planned) -> Result<Vec<u8>> {
    let rows = Rows::open(from, &planned.part)?;
    let importance = from.importance.and_then(|all| all.get(&planned.part.name));
    let (row_bytes, n_row) = (planned.row_bytes(), planned.n_row());
    let mut bytes = vec![0; row_bytes * n_row];
    let n_thread = std::thread::available_parallelism().map_or(1, usize::from);
    let per_thread = n_row.div_ceil(n_thread);
    let finite = std::thread::scope(|scope| {
        let chunks = bytes.chunks_mut(per_thread * row_bytes).enumerate();
        let work = chunks.map(|(i, out)| {
            let rows = &rows;
            scope.spawn(move || rows.encode(planned, importance, i * per_thread, out))
        });
        let work: Vec<_> = work.collect();
        work.into_iter().all(|work| work.join().expect("converting does not panic"))
    });
    ensure!(
        finite,
        "it holds NaN, infinity or a number that {} cannot hold; the checkpoint is damaged",
        planned.dtype
    );
    Ok(bytes)
}

/// The rows of a part in the file's order, whatever they are made of.
struct Rows<'a> {
    part: &'a Part,
    sources: Vec<(Matrix, Option<Delta>)>,
}

/// Rows converted at a time: small enough for the cache, large enough to amortise a call.
const ROWS_AT_A_TIME: usize = 16;

impl<'a> Rows<'a> {
    fn open(from: &Ingredients<'_>, part: &'a Part) -> Result<Self> {
        let open = |name: &String| {
            let delta = from.adapter.map(|adapter| adapter.delta(name)).transpose()?.flatten();
            Ok((from.tensors.matrix(name)?, delta))
        };
        Ok(Self { part, sources: part.sources.iter().map(open).collect::<Result<_>>()? })
    }

    /// Fills `out` with rows from `first` on. False if a number is not finite, or would not be.
    fn encode(
        &self,
        planned: &Planned,
        importance: Option<&[f32]>,
        first: usize,
        out: &mut [u8],
    ) -> bool {
        let (length, row_bytes) = (self.part.shape[0], planned.row_bytes());
        let mut numbers = vec![0.0; ROWS_AT_A_TIME * length];
        let most = largest(planned.dtype);
        for (i, out) in out.chunks_mut(ROWS_AT_A_TIME * row_bytes).enumerate() {
            let n = out.len() / row_bytes;
            let numbers = &mut numbers[..n * length];
            for (j, row) in numbers.chunks_exact_mut(length).enumerate() {
                self.read(self.origin(first + i * ROWS_AT_A_TIME + j), row);
                if !row.iter().all(|x| x.abs() <= most) {
                    return false;
                }
            }
            planned.dtype.encode(numbers, length, importance, out);
        }
        true
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
