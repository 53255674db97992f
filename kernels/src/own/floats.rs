//! Products of matrices of floats with many columns, in f32 throughout. The matrix is read as the file has it,
//! and activations are not rounded to its type.
//!
//! ```text
//! columns, interleaved by NR                                    (once for all matrices they go through)
//! for each MR rows of weights                                   (each thread has its own)
//!     for each slab of 128 of their numbers: to f32, transposed, so that a row is a lane
//!         for each NR columns
//!             sums [MR, NR] += Σ i: weights [MR, i] · columns [i, NR]
//! ```

use llama_cpp_sys_2 as sys;

use super::activations::PackedActivations;
use super::lanes::products;
use super::simd::{MAX_NR, Op, Simd, elements, elements_mut};
use crate::DType;
use crate::builder::Tensor;
use crate::custom::{self, Job};

/// Numbers of a row that are multiplied together: with `MR` rows, what the L1 cache has room for.
const DEPTH: usize = 128;
/// With fewer columns than this it does not pay to transpose a matrix.
const MIN_COLUMNS: usize = 16;

/// Whether `weight · x` is such a product.
pub(crate) fn suits(weight: Tensor<'_>, x: Tensor<'_>) -> bool {
    weight.shape()[2..] == [1, 1]
        && x.shape()[1..].iter().product::<usize>() >= MIN_COLUMNS
        && matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// `weight [k, m] · x [k, …]` where [`suits`] says so, both contiguous.
pub(crate) fn mul_mat<'g, S: Simd>(s: S, weight: Tensor<'g>, x: Tensor<'g>) -> Tensor<'g> {
    let [k, rest @ ..] = x.shape();
    let n_block = rest.iter().product::<usize>().div_ceil(S::NR);
    let mut activations = x.builder.activations.borrow_mut();
    let columns = activations.packed_once(x, PackedActivations::Interleaved, || {
        // SAFETY: `interleave` is for a node of this shape, of contiguous f32.
        unsafe { custom::node(DType::F32, [S::NR, k, n_block, 1], &[x], interleave::<S>) }
    });
    let shape = [weight.shape()[1], rest[0], rest[1], rest[2]];
    // SAFETY: `multiply` is for such a matrix and interleaved columns.
    unsafe { custom::node(DType::F32, shape, &[weight, columns], move |job| multiply(s, job)) }
}

/// Packs columns `[k, n]` side by side, `NR` at a time and filled up with zeros: for each slab of their numbers one
/// after the other `[NR, depth, n / NR]`, so that memory is read in one direction.
fn interleave<S: Simd>(job: &Job) {
    let (n, [_, k, n_block, _]) = (job.source_shape(0).iter().product(), job.shape());
    // SAFETY: the source is contiguous f32.
    let x: &[f32] = unsafe { job.slice(0, n) };
    for block in job.thread_range(n_block) {
        let columns = &x[block * S::NR * k..];
        for i in 0..k {
            let start = i / DEPTH * DEPTH;
            let depth = DEPTH.min(k - start);
            for c in 0..S::NR {
                let number = columns.get(c * k + i).copied().unwrap_or(0.0);
                // SAFETY: the node is `[NR, k, n_block]`; this block is this thread's.
                unsafe {
                    let at = start * n_block + block * depth + i - start;
                    job.out::<f32>().add(at * S::NR + c).write(number);
                }
            }
        }
    }
}

/// Computes rows of a product, `MR` at a time.
fn multiply<S: Simd>(s: S, job: &Job) {
    let (weight, [k, m, ..]) = (job.source(0).expect("a weight"), job.source_shape(0));
    let ([nr, _, n_block, _], [_, rest @ ..]) = (job.source_shape(1), job.shape());
    let n: usize = rest.iter().product();
    // SAFETY: the weights are contiguous, and the columns are `[NR, k, n_block]`.
    let (weights, columns) =
        unsafe { (job.slice::<u8>(0, m * weight.nb[1]), job.slice::<f32>(1, nr * k * n_block)) };
    let mut slab = [[s.zero(); 2]; DEPTH];
    let mut sums = vec![[[s.zero(); 2]; MAX_NR]; n_block];
    for first in job.thread_range(m.div_ceil(S::MR)).map(|panel| panel * S::MR) {
        let n_row = S::MR.min(m - first);
        sums.fill([[s.zero(); 2]; MAX_NR]);
        for start in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - start);
            let slab = &mut slab[..depth];
            for lane in 0..n_row {
                let row = &weights[(first + lane) * weight.nb[1]..][..weight.nb[1]];
                let row = &row[start * weight.nb[0]..];
                s.vectorize(TransposeRow { row, dtype: weight.type_, slab, lane });
            }
            let columns = &columns[start * n_block * nr..][..depth * n_block * nr];
            s.vectorize(Multiply { slab, columns, sums: &mut sums });
        }
        for c in 0..n {
            let column = elements::<S>(std::slice::from_ref(&sums[c / S::NR][c % S::NR]));
            // SAFETY: only this thread writes these rows of the node's `[m, n]`.
            unsafe {
                let to = job.out::<f32>().add(c * m + first);
                to.copy_from_nonoverlapping(column.as_ptr(), n_row);
            }
        }
    }
}

/// Writes numbers of a row, as the file has them, to a lane of as many vectors.
struct TransposeRow<'a, S: Simd> {
    row: &'a [u8],
    dtype: u32,
    slab: &'a mut [[S::F; 2]],
    lane: usize,
}

impl<S: Simd> Op<S> for TransposeRow<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let bytes = if self.dtype == sys::GGML_TYPE_F32 { 4 } else { 2 };
        let n = self.slab.len();
        let to = &mut elements_mut::<S>(self.slab)[self.lane..];
        for (i, row) in self.row[..n * bytes].chunks(8 * bytes).enumerate() {
            s.prefetch(row.as_ptr().wrapping_add(DEPTH * bytes));
            let mut whole = [0; 32];
            let n = row.len() / bytes;
            whole[..row.len()].copy_from_slice(row);
            for (j, x) in read8(s, &whole, self.dtype)[..n].iter().enumerate() {
                to[(8 * i + j) * S::MR] = *x;
            }
        }
    }
}

/// The first eight numbers, in f32.
#[inline(always)]
fn read8<S: Simd>(s: S, bytes: &[u8; 32], dtype: u32) -> [f32; 8] {
    let mut halves = [0; 8];
    for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *half = u16::from_le_bytes(*bytes);
    }
    match dtype {
        sys::GGML_TYPE_F16 => s.f16_to_f32(&halves),
        sys::GGML_TYPE_BF16 => halves.map(|half| f32::from_bits(u32::from(half) << 16)),
        _ => {
            let mut x = [0.0; 8];
            for (x, bytes) in x.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*bytes);
            }
            x
        }
    }
}

/// Adds the products of a slab and all columns to their sums.
struct Multiply<'a, S: Simd> {
    slab: &'a [[S::F; 2]],
    columns: &'a [f32],
    sums: &'a mut [[[S::F; 2]; MAX_NR]],
}

impl<S: Simd> Op<S> for Multiply<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let blocks = self.columns.chunks_exact(self.slab.len() * S::NR);
        for (columns, sums) in blocks.zip(self.sums) {
            let products = products(s, self.slab, columns);
            for r in 0..S::NR {
                for half in 0..2 {
                    sums[r][half] = s.add(products[r][half], sums[r][half]);
                }
            }
        }
    }
}
