//! Products of matrices of floats with many columns on AVX-512, in f32 throughout. The matrix is read
//! as it lies in the file, and activations are not rounded to its type.
//!
//! ```text
//! columns, by eights                                            (once for all matrices they go through)
//! for each 32 rows of weights                                   (each thread has its own)
//!     for each slab of 128 of their places: to f32, rows side by side
//!         for each eight columns
//!             sums [32, 8] += Σ place: weights [32, place] · columns [place, 8]
//! ```

use std::arch::x86_64::*;
use std::ffi::{c_int, c_void};

use llama_cpp_sys_2 as sys;

use crate::custom::{node, share};
use crate::graph::Laid;
use crate::lanes::{BY, LANES, Lanes, products};
use crate::{DType, Tensor};

/// Places of a row that lie in the L1 cache together: 16 KB of 32 rows.
const DEPTH: usize = 128;
/// Fewer columns than this are not worth turning a matrix around.
const FEWEST: usize = 2 * BY;

/// Whether `weight · x` is such a product.
pub(crate) fn suits(weight: Tensor<'_>, x: Tensor<'_>) -> bool {
    weight.shape()[2..] == [1, 1]
        && x.shape()[1..].iter().product::<usize>() >= FEWEST
        && matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// [`Tensor::mul_mat`] where [`suits`] says so, on a machine that has AVX-512.
pub(crate) fn mul_mat<'g>(weight: Tensor<'g>, x: Tensor<'g>) -> Tensor<'g> {
    let [k, rest @ ..] = x.shape();
    let n_block = rest.iter().product::<usize>().div_ceil(BY);
    let none = std::ptr::null_mut();
    // SAFETY: `lay` is for a node of this shape, of contiguous f32.
    let make = || unsafe { node(DType::F32, [BY, k, n_block, 1], &[x], lay, none) };
    let columns = x.builder.laid(x, Laid::ByEights, make);
    let shape = [weight.shape()[1], rest[0], rest[1], rest[2]];
    // SAFETY: `multiply` is for such a matrix, and columns that `lay` laid.
    unsafe { node(DType::F32, shape, &[weight, columns], multiply, none) }
}

/// Puts columns `[k, n]` side by side, eight at a time and filled up with zeros: for each slab of places
/// one after the other `[8, depth, n / 8]`, so that memory is read in one direction.
extern "C" fn lay(to: *mut sys::ggml_tensor, i: c_int, n_thread: c_int, _: *mut c_void) {
    // SAFETY: `mul_mat` made the node: both are contiguous f32, and the node is the larger.
    let (x, [k, n_block], to) = unsafe {
        let (to, x) = (&*to, &*(*to).src[0]);
        let n = sys::ggml_nelements(x) as usize;
        let x = std::slice::from_raw_parts(x.data.cast::<f32>(), n);
        (x, [1, 2].map(|i| to.ne[i] as usize), to.data.cast::<[f32; BY]>())
    };
    for block in share(n_block, i, n_thread) {
        let columns = &x[block * BY * k..];
        for place in 0..k {
            let eight = std::array::from_fn(|c| columns.get(c * k + place).copied().unwrap_or(0.0));
            let start = place / DEPTH * DEPTH;
            let depth = DEPTH.min(k - start);
            // SAFETY: the node has `k` places of so many blocks; this block is this thread's.
            unsafe { to.add(start * n_block + block * depth + place - start).write(eight) };
        }
    }
}

/// Computes rows of a product, 32 at a time.
extern "C" fn multiply(to: *mut sys::ggml_tensor, i: c_int, n_thread: c_int, _: *mut c_void) {
    // SAFETY: `mul_mat` made the node: a product of a contiguous matrix and columns by eights.
    let (weight, columns, out, n) = unsafe {
        let (to, weight, x) = (&*to, &*(*to).src[0], &*(*to).src[1]);
        let blocks = std::slice::from_raw_parts(
            x.data.cast::<[f32; BY]>().cast_const(),
            (x.ne[1] * x.ne[2]) as usize,
        );
        let n = (to.ne[1] * to.ne[2] * to.ne[3]) as usize;
        (weight, blocks, to.data.cast::<f32>(), n)
    };
    let [k, m] = [0, 1].map(|i| weight.ne[i] as usize);
    let mut slab = [Lanes::ZERO; DEPTH];
    let mut sums = vec![[Lanes::ZERO; BY]; n.div_ceil(BY)];
    for first in share(m.div_ceil(LANES), i, n_thread).map(|panel| panel * LANES) {
        let n_row = LANES.min(m - first);
        sums.fill([Lanes::ZERO; BY]);
        for start in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - start);
            // SAFETY: `custom::node` asserted the instructions; rows and places are the matrix's.
            unsafe {
                (0..n_row)
                    .for_each(|lane| turn(weight, first + lane, start, &mut slab[..depth], lane));
                let columns = &columns[start * sums.len()..][..depth * sums.len()];
                add(&slab[..depth], columns.chunks_exact(depth), &mut sums);
            }
        }
        for (column, sum) in (0..n).map(|c| (c, &sums[c / BY][c % BY])) {
            // SAFETY: only this thread writes these rows of the node's `[m, n]`.
            unsafe { out.add(column * m + first).copy_from_nonoverlapping(sum.0.as_ptr(), n_row) };
        }
    }
}

/// Puts places of a row from `start` on into a lane of as many vectors.
///
/// # Safety
/// The matrix must be live, contiguous, and have that row and those places.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn turn(of: &sys::ggml_tensor, row: usize, start: usize, to: &mut [Lanes], lane: usize) {
    let row = of.data.cast::<u8>().wrapping_add(row * of.nb[1] + start * of.nb[0]);
    for (i, to) in to.chunks_mut(16).enumerate() {
        let mask = u16::MAX >> (16 - to.len());
        let at = row.wrapping_add(16 * i * of.nb[0]);
        let mut x = [0.0; 16];
        // SAFETY: the caller's promise; what the mask leaves out is not read, and fetching the next slab
        // does nothing where there is no memory.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(DEPTH * of.nb[0]).cast());
            let read = match of.type_ {
                sys::GGML_TYPE_F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())),
                sys::GGML_TYPE_BF16 => {
                    let upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))
                }
                _ => _mm512_maskz_loadu_ps(mask, at.cast()),
            };
            _mm512_storeu_ps(x.as_mut_ptr(), read);
        }
        to.iter_mut().zip(x).for_each(|(to, x)| to.0[lane] = x);
    }
}

/// Adds the products of a slab and every eight columns to their sums.
#[target_feature(enable = "avx512f")]
fn add<'a>(
    slab: &[Lanes],
    columns: impl Iterator<Item = &'a [[f32; BY]]>,
    sums: &mut [[Lanes; BY]],
) {
    for (columns, sums) in columns.zip(sums) {
        for (sum, [a, b]) in sums.iter_mut().zip(products(slab, columns)) {
            let [c, d] = sum.load();
            sum.store([_mm512_add_ps(a, c), _mm512_add_ps(b, d)]);
        }
    }
}
