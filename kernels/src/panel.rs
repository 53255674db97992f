//! Quantised matrices in a layout of our own, on CPUs that have AVX-512 VNNI: what `vnni` multiplies by.
//!
//! A panel is 32 rows, filled up with zeros. Along it, block by block, lie the 32 rows' blocks as the
//! file has them, but interleaved in words of four bytes: word 0 of all rows, word 1 of all rows, …; the
//! half that some types have beside their words comes last. So no bit is added or lost.
//!
//! To ggml such a tensor is what the file says, and its bytes mean nothing: [`kind`] tells it from
//! others, [`mul_mat`] multiplies by it in two nodes of our own, and [`misused`] finds any other use.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use llama_cpp_sys_2 as sys;

use crate::buffer::{Buffer, Use};
use crate::custom::{self, share};
use crate::graph::Laid;
use crate::repack::Entry;
use crate::vnni::{Column, DEPTH, Panel, ROWS, Scratch, Sweep, Unpack, sweep};
pub(crate) use crate::vnni::{Rounding, available};
use crate::{Backend, DType, Gguf, Mapped, Shape, Tensor, parallel_for_each, unpack};

/// A type of weights that we have a product for.
pub(crate) struct Kind {
    dtype: DType,
    /// Where a block has two bytes that are no part of a word of four.
    odd: Odd,
    rounding: Rounding,
    unpack: Unpack,
    sweep: Sweep,
}

/// Bytes that one thread packs at a time, about.
const PIECE: usize = 4 << 20;
/// Turns per thread of a product.
const SHARES: usize = 16;
/// Numbers of four bytes in a [`Column`].
const COLUMN_WORDS: usize = size_of::<Column>() / 4;
/// Which of a node's 16 parameters counts the turns that threads take.
const COUNTER: usize = 8;

enum Odd {
    None,
    First,
    Last,
}

use DType::{IQ4_NL, IQ4_XS, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0};
use Rounding::{By32, By256};

const fn new(dtype: DType, odd: Odd, rounding: Rounding, unpack: Unpack, sweep: Sweep) -> Kind {
    Kind { dtype, odd, rounding, unpack, sweep }
}

static KINDS: [Kind; 7] = [
    new(Q4_K, Odd::None, By256, unpack::q4_k, sweep::<32, 0, true, false>),
    new(Q5_K, Odd::None, By256, unpack::q5_k, sweep::<32, 0, true, false>),
    new(Q6_K, Odd::Last, By256, unpack::q6_k, sweep::<16, 5, false, false>),
    new(IQ4_XS, Odd::None, By256, unpack::iq4_xs, sweep::<32, 7, false, false>),
    new(Q8_0, Odd::First, By32, unpack::q8_0, sweep::<32, 7, false, true>),
    new(Q4_0, Odd::First, By32, unpack::q4_0, sweep::<32, 3, false, true>),
    new(IQ4_NL, Odd::First, By32, unpack::iq4_nl, sweep::<32, 7, false, true>),
];

impl Kind {
    /// Bytes of a panel of rows of `k` numbers.
    fn panel_bytes(&self, k: usize) -> usize {
        ROWS * self.dtype.row_bytes(k).expect("rows are whole blocks")
    }

    /// Interleaves up to 32 rows of so many bytes.
    fn pack(&self, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
        let bytes = self.dtype.block_bytes();
        for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
            for (block, to) in row.chunks_exact(bytes).zip(panel.chunks_exact_mut(ROWS * bytes)) {
                let (words, half) = match self.odd {
                    Odd::None => (block, &block[..0]),
                    Odd::First => (&block[2..], &block[..2]),
                    Odd::Last => block.split_at(bytes - 2),
                };
                let (places, halves) = to.split_at_mut(ROWS * words.len());
                for (word, place) in
                    words.as_chunks::<4>().0.iter().zip(places.as_chunks_mut::<{ 4 * ROWS }>().0)
                {
                    place[4 * r..][..4].copy_from_slice(word);
                }
                if !half.is_empty() {
                    halves[2 * r..][..2].copy_from_slice(half);
                }
            }
        }
    }
}

/// The kind that a file's tensor can be, on this machine.
fn kind_of(dtype: DType, dims: &Shape) -> Option<&'static Kind> {
    let matrix = dims[2..] == [1, 1];
    KINDS.iter().find(|kind| matrix && kind.dtype == dtype && available())
}

/// Whether a file's tensor can be kept in panels.
pub(crate) fn suits((info, _): &Entry<'_>) -> bool {
    kind_of(info.dtype, &info.shape).is_some()
}

/// The kind of a tensor in panels. A view of one has none.
pub(crate) fn kind(raw: NonNull<sys::ggml_tensor>) -> Option<&'static Kind> {
    // SAFETY: tensors of graphs and homes are live.
    let extra = unsafe { raw.as_ref() }.extra;
    KINDS.iter().find(|kind| std::ptr::eq(extra.cast(), *kind))
}

/// Whether a node reads the bytes of a tensor in panels, of which it knows nothing.
pub(crate) fn misused(node: NonNull<sys::ggml_tensor>) -> bool {
    // SAFETY: a graph's nodes, their sources and what those view are live.
    let (node, root) = unsafe {
        let root = |source: NonNull<sys::ggml_tensor>| source.as_ref().view_src;
        (node.as_ref(), root)
    };
    let mut sources = node.src.iter().filter_map(|source| NonNull::new(*source));
    node.op != sys::GGML_OP_CUSTOM
        && sources.any(|source| kind(NonNull::new(root(source)).unwrap_or(source)).is_some())
}

/// Packs tensors that suit, and have no data yet, into memory that the buffer lies in, on all of the
/// backend's threads. `None` if there is no room.
pub(crate) fn copy(
    file: &Gguf,
    backend: &Arc<Backend>,
    tensors: &[Entry<'_>],
) -> Option<(Buffer, Mapped)> {
    let jobs = tensors.iter().map(|(info, _)| {
        let kind = kind_of(info.dtype, &info.shape).expect("it suits");
        let panel = kind.panel_bytes(info.shape[0]);
        (kind, info, panel, info.shape[1].div_ceil(ROWS) * panel)
    });
    let jobs: Vec<_> = jobs.collect();
    let total = jobs.iter().map(|(.., bytes)| bytes).sum();
    let memory = Mapped::filled(total, |mut rest| {
        let mut pieces = Vec::new();
        for (kind, info, panel, bytes) in &jobs {
            let (panels, others) = std::mem::take(&mut rest).split_at_mut(*bytes);
            let piece = (PIECE / panel).max(1) * panel;
            let starts = info.range.clone().step_by(piece);
            let of_file = starts.map(|start| start..info.range.end.min(start + piece));
            pieces
                .extend(of_file.zip(panels.chunks_mut(piece)).map(|piece| (*kind, *panel, piece)));
            rest = others;
        }
        let pack = |(kind, panel, (range, to)): (&Kind, usize, (Range<usize>, &mut [u8]))| {
            let rows = file.bytes()[range.clone()].chunks(panel);
            rows.zip(to.chunks_exact_mut(panel))
                .for_each(|(rows, to)| kind.pack(rows, panel / ROWS, to));
            file.forget(range); // there is a copy now
            Ok::<_, std::io::Error>(())
        };
        parallel_for_each(backend.n_threads(), pieces.into_iter(), pack)
    });
    let memory = memory.ok()?;
    let mut at = memory.as_ptr().cast_mut().cast::<c_void>();
    // SAFETY: the caller keeps the memory as long as the buffer, and only products read it.
    let buffer = unsafe {
        let raw = sys::ggml_backend_cpu_buffer_from_ptr(at, total);
        Buffer::new(raw, backend, backend.host(), Use::Weights, total)
    }?;
    for ((kind, .., bytes), (_, raw)) in jobs.iter().zip(tensors) {
        // SAFETY: the tensor has no data yet, and its panels lie in the buffer from here on. ggml's
        // own kernels do not look at `extra` outside of buffers of their own.
        let status = unsafe {
            (*raw.as_ptr()).extra = std::ptr::from_ref(*kind).cast_mut().cast();
            sys::ggml_backend_tensor_alloc(buffer.raw(), raw.as_ptr(), at)
        };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a host buffer takes any tensor");
        at = at.wrapping_byte_add(*bytes);
    }
    Some((buffer, memory))
}

/// `weight [k, m]`, which is in panels of this kind, times `x [k, …]`, which is contiguous f32.
pub(crate) fn mul_mat<'g>(weight: Tensor<'g>, x: Tensor<'g>, kind: &'static Kind) -> Tensor<'g> {
    let [k, rest @ ..] = x.shape();
    let n: usize = rest.iter().product();
    let rounded = x.builder.laid(x, Laid::Rounded(kind.rounding), || {
        let shape = [COLUMN_WORDS, n, k.div_ceil(DEPTH), 1];
        let round = match kind.rounding {
            By256 => round_by_256,
            By32 => round_by_32,
        };
        // SAFETY: `round` is for columns of these sizes, of contiguous f32.
        unsafe { custom::node(DType::I32, shape, &[x], round, std::ptr::null_mut()) }
    });
    let kind = std::ptr::from_ref(kind).cast_mut().cast();
    let shape = [weight.shape()[1], rest[0], rest[1], rest[2]];
    // SAFETY: `multiply` is for such operands, and a kind is static.
    unsafe { custom::node(DType::F32, shape, &[weight, rounded], multiply, kind) }
}

/// [`round`] as K-quants want it.
extern "C" fn round_by_256(to: *mut sys::ggml_tensor, i: c_int, n: c_int, _: *mut c_void) {
    // SAFETY: `mul_mat` made the node.
    unsafe { round(&*to, By256, i, n) }
}

/// [`round`] as types of 32 places want it.
extern "C" fn round_by_32(to: *mut sys::ggml_tensor, i: c_int, n: c_int, _: *mut c_void) {
    // SAFETY: `mul_mat` made the node.
    unsafe { round(&*to, By32, i, n) }
}

/// Rounds `x [k, n]` into columns `[n, slabs]`, of which thread `i` of `n_thread` has its share.
///
/// # Safety
/// `to` is a node of [`mul_mat`] that is being computed, on this machine.
unsafe fn round(to: &sys::ggml_tensor, rounding: Rounding, i: c_int, n_thread: c_int) {
    // SAFETY: the node's only source.
    let x = unsafe { &*to.src[0] };
    let (k, n, n_slab) = (x.ne[0] as usize, to.ne[1] as usize, to.ne[2] as usize);
    // SAFETY: the source is contiguous f32 `[k, n]`.
    let x = unsafe { std::slice::from_raw_parts(x.data.cast::<f32>(), k * n) };
    for at in share(n * n_slab, i, n_thread) {
        let (slab, column) = (at / n, at % n);
        let x = &x[column * k..][slab * DEPTH..k.min((slab + 1) * DEPTH)];
        // SAFETY: the node holds `n · n_slab` columns, of which no other thread has this one. Its
        // bytes are numbers, whatever they are. `custom::node` asserted the instructions.
        unsafe { (*to.data.cast::<Column>().add(at)).round(x, rounding) }
    }
}

/// Computes panels `[32, n]` of a product, of which threads take some at a time by a counter.
extern "C" fn multiply(to: *mut sys::ggml_tensor, _: c_int, n_thread: c_int, kind: *mut c_void) {
    // SAFETY: `mul_mat` made the node: a product of a matrix in panels of this static kind and
    // rounded columns. ggml set what the counter lies in to zero, behind the 24 bytes that it uses.
    // Other threads write the counter, so nothing here refers to the node as a whole.
    let (kind, weight, x, out, next) = unsafe {
        let next = AtomicU32::from_ptr((&raw mut (*to).op_params[COUNTER]).cast());
        let [weight, x] = [(*to).src[0], (*to).src[1]];
        (&*kind.cast::<Kind>(), &*weight, &*x, (*to).data.cast::<f32>(), next)
    };
    let (k, m) = (weight.ne[0] as usize, weight.ne[1] as usize);
    let (n_column, n_slab) = (x.ne[1] as usize, x.ne[2] as usize);
    let panel_bytes = kind.panel_bytes(k);
    let n_panel = m.div_ceil(ROWS);
    // SAFETY: the weights' bytes lie in the buffer that `copy` made, and the columns in their node.
    let (panels, columns) = unsafe {
        (
            std::slice::from_raw_parts(weight.data.cast::<u8>(), n_panel * panel_bytes),
            std::slice::from_raw_parts(x.data.cast::<Column>(), n_slab * n_column),
        )
    };
    // Several at a time, so that each thread reads far in one direction.
    let n_thread = n_thread as usize;
    let many = n_panel.div_ceil(SHARES * n_thread);
    let n_turn = n_panel.div_ceil(many);
    let block = (kind.dtype.block(), ROWS * kind.dtype.block_bytes());
    // SAFETY: `custom::node` asserted the instructions.
    let mut scratch = unsafe { Scratch::new() };
    loop {
        let turn = next.fetch_add(1, Ordering::Relaxed) as usize;
        if turn >= n_turn {
            if turn + 1 == n_turn + n_thread {
                next.store(0, Ordering::Relaxed); // the last to see it: for the next run
            }
            break;
        }
        for i in turn * many..n_panel.min((turn + 1) * many) {
            let packed = &panels[i * panel_bytes..][..panel_bytes];
            let panel = Panel { packed, block, columns, n_column };
            let n_row = ROWS.min(m - i * ROWS);
            // SAFETY: as above. Only this thread writes these rows of the node's `[m, n]`.
            unsafe {
                panel.multiply(kind.unpack, kind.sweep, &mut scratch, |column, sums| {
                    let to = out.add(column * m + i * ROWS);
                    to.copy_from_nonoverlapping(sums.as_ptr(), n_row);
                });
            }
        }
    }
}
