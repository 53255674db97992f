//! Products of packed weights: two nodes, which quantize the activations and multiply.

use super::activations::{
    ActivationQuant, COLUMN_WORDS, Column, DEPTH, PackedActivations, Quantize,
};
use super::format::Format;
use super::functions::{self, Function};
use super::pack::Packing;
use super::simd::{Simd, elements};
use super::tile::{MAX_COLUMNS, Panel, Scratch};
use super::unpack::{Iq4Nl, Iq4Xs, Q4_0, Q4K, Q5K, Q6K, Q8_0};
use crate::DType;
use crate::builder::Tensor;
use crate::custom::{self, Job};

/// Work items for each thread: more balance better, fewer read farther in one direction.
const ITEMS_PER_THREAD: usize = 16;

/// `weight [k, m]`, which is packed, times `x [k, …]`, which is contiguous f32.
pub(crate) fn mul_mat<'g, S: Simd>(s: S, weight: Tensor<'g>, x: Tensor<'g>) -> Tensor<'g> {
    match weight.dtype() {
        DType::Q4_K => of_format::<S, Q4K>(s, weight, x),
        DType::Q5_K => of_format::<S, Q5K>(s, weight, x),
        DType::Q6_K => of_format::<S, Q6K>(s, weight, x),
        DType::IQ4_XS => of_format::<S, Iq4Xs>(s, weight, x),
        DType::Q8_0 => of_format::<S, Q8_0>(s, weight, x),
        DType::Q4_0 => of_format::<S, Q4_0>(s, weight, x),
        DType::IQ4_NL => of_format::<S, Iq4Nl>(s, weight, x),
        other => unreachable!("{other} is not packed"),
    }
}

fn of_format<'g, S: Simd, F: Format>(s: S, weight: Tensor<'g>, x: Tensor<'g>) -> Tensor<'g> {
    let [k, rest @ ..] = x.shape();
    let n: usize = rest.iter().product();
    let mut activations = x.builder.activations.borrow_mut();
    let (function, sources) = match activations.function_of(x) {
        Some((function, operands)) => (Some(function), operands),
        None => (None, vec![x]),
    };
    let how = PackedActivations::Quantized(F::QUANT, function);
    let quantized = activations.packed_once(x, how, || {
        let shape = [COLUMN_WORDS, n, k.div_ceil(DEPTH), 1];
        let compute = move |job: &Job| quantize(s, job, F::QUANT, function);
        // SAFETY: `quantize` is for columns of these sizes, of f32 whose rows have no gaps.
        unsafe { custom::node(DType::I32, shape, &sources, compute) }
    });
    let shape = [weight.shape()[1], rest[0], rest[1], rest[2]];
    // SAFETY: `multiply` is for such operands.
    unsafe {
        custom::node(DType::F32, shape, &[weight, quantized], move |job| multiply::<S, F>(s, job))
    }
}

/// Quantizes `[k, n]`, a tensor or a function's values, to columns `[n, slabs]`.
fn quantize<S: Simd>(s: S, job: &Job, quant: ActivationQuant, function: Option<Function>) {
    let ([k, ..], [_, n, n_slab, _]) = (job.source_shape(0), job.shape());
    let mut values = [0.0; DEPTH];
    for at in job.thread_range(n * n_slab) {
        let (slab, column) = (at / n, at % n);
        let range = slab * DEPTH..k.min((slab + 1) * DEPTH);
        let x = match function {
            Some(function) => {
                let values = &mut values[..range.len()];
                functions::apply(s, function, job, column, range.start, values);
                values
            }
            // SAFETY: the source is f32 whose rows have no gaps.
            None => unsafe { &job.row::<f32>(0, column)[range] },
        };
        // SAFETY: the node has `n · n_slab` columns, of which no other thread has this one. Its bytes are
        // numbers, whatever they are.
        let to = unsafe { &mut *job.out::<Column>().add(at) };
        s.vectorize(Quantize { x, quant, to });
    }
}

/// Computes panels `[MR, n]` of a product.
fn multiply<S: Simd, F: Format>(s: S, job: &Job) {
    let ([k, m, ..], [_, n_all, n_slab, _]) = (job.source_shape(0), job.source_shape(1));
    let packing = Packing::find(F::DTYPE, &[k, m, 1, 1]).expect("a format");
    let panel_bytes = packing.panel_bytes(S::MR, k);
    let n_panel = m.div_ceil(S::MR);
    // SAFETY: packed weights are so many bytes, and the other source is so many columns.
    let (panels, columns) = unsafe {
        (job.slice::<u8>(0, n_panel * panel_bytes), job.slice::<Column>(1, n_slab * n_all))
    };
    let panels_per_item = n_panel.div_ceil(ITEMS_PER_THREAD * job.n_thread());
    let mut scratch = Scratch::new(s);
    while let Some(item) = job.next(n_panel.div_ceil(panels_per_item)) {
        for i in item * panels_per_item..n_panel.min((item + 1) * panels_per_item) {
            let packed = &panels[i * panel_bytes..][..panel_bytes];
            let n_row = S::MR.min(m - i * S::MR);
            for first in (0..n_all).step_by(MAX_COLUMNS) {
                let n_column = MAX_COLUMNS.min(n_all - first);
                Panel { packed, columns, n_all, first, n_column }.multiply::<S, F>(s, &mut scratch);
                let sums = elements::<S>(&scratch.sums[..n_column]);
                for (column, sums) in sums.chunks_exact(S::MR).enumerate() {
                    // SAFETY: only this thread writes these rows of the node's `[m, n]`.
                    unsafe {
                        let to = job.out::<f32>().add((first + column) * m + i * S::MR);
                        to.copy_from_nonoverlapping(sums.as_ptr(), n_row);
                    }
                }
            }
        }
    }
}
