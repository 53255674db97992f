//! Quantized matrices in panels, which products read in one direction.
//!
//! A panel is `MR` rows, filled up with zeros. Block by block it has the blocks of all its rows as the file has
//! them, but interleaved in words of four bytes: the first word of all rows, then their second, and so on; the
//! f16 that some types have besides their words comes last. So no bit is added or lost.
//!
//! To ggml such a tensor is what the file says, and its bytes mean nothing: [`crate::Weight`] says that it is
//! packed, and a graph with any other node that reads it is refused.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::format::{Format, ScalePosition};
use super::isa::{Isa, Task};
use super::simd::Simd;
use super::unpack::{Iq4Nl, Iq4Xs, Q4_0, Q4K, Q5K, Q6K, Q8_0};
use crate::buffer::Buffer;
use crate::context::Entry;
use crate::usage::Use;
use crate::{Backend, DType, Gguf, Mapped, Shape, parallel_for_each};

/// Bytes that one thread packs at a time, about.
const PIECE_BYTES: usize = 4 << 20;

/// How a type's blocks are packed.
pub(crate) struct Packing {
    pub dtype: DType,
    pub scale: ScalePosition,
}

static PACKINGS: [Packing; 7] = [
    Packing::of::<Q4K>(),
    Packing::of::<Q5K>(),
    Packing::of::<Q6K>(),
    Packing::of::<Iq4Xs>(),
    Packing::of::<Q8_0>(),
    Packing::of::<Q4_0>(),
    Packing::of::<Iq4Nl>(),
];

impl Packing {
    const fn of<F: Format>() -> Self {
        Self { dtype: F::DTYPE, scale: F::SCALE }
    }

    /// Of a tensor of this type and shape, if we have a product for it.
    pub fn find(dtype: DType, shape: &Shape) -> Option<&'static Self> {
        let is_matrix = shape[2..] == [1, 1];
        PACKINGS.iter().find(|packing| is_matrix && packing.dtype == dtype)
    }

    /// Bytes of a panel of `mr` rows of `k` numbers.
    pub fn panel_bytes(&self, mr: usize, k: usize) -> usize {
        mr * self.dtype.row_bytes(k).expect("rows are whole blocks")
    }
}

/// Whether a file's tensor can be packed.
pub(crate) fn can_pack((info, _): &Entry<'_>) -> bool {
    Packing::find(info.dtype, &info.shape).is_some()
}

/// Packs tensors that can be, and have no data yet, into memory that the buffer points to, on all of the
/// backend's threads. `None` if there is no room.
pub(crate) fn pack(
    isa: Isa,
    file: &Gguf,
    backend: &Arc<Backend>,
    tensors: &[Entry<'_>],
) -> Option<(Buffer, Mapped)> {
    let mr = isa.dispatch(PanelRows);
    let jobs = tensors.iter().map(|(info, _)| {
        let packing = Packing::find(info.dtype, &info.shape).expect("it can be packed");
        let panel = packing.panel_bytes(mr, info.shape[0]);
        (packing, info, panel, info.shape[1].div_ceil(mr) * panel)
    });
    let jobs: Vec<_> = jobs.collect();
    let total = jobs.iter().map(|(.., bytes)| bytes).sum();
    let memory = Mapped::filled(total, |mut rest| {
        let mut pieces = Vec::new();
        for (packing, info, panel, bytes) in &jobs {
            let (panels, others) = std::mem::take(&mut rest).split_at_mut(*bytes);
            let piece = (PIECE_BYTES / panel).max(1) * panel;
            let starts = info.range.clone().step_by(piece);
            let of_file = starts.map(|start| start..info.range.end.min(start + piece));
            let of_both = of_file.zip(panels.chunks_mut(piece));
            pieces.extend(of_both.map(|piece| (*packing, *panel, piece)));
            rest = others;
        }
        let pack = |(packing, panel, (range, to)): (&Packing, usize, (Range<usize>, &mut [u8]))| {
            let rows = file.bytes()[range.clone()].chunks(panel);
            rows.zip(to.chunks_exact_mut(panel))
                .for_each(|(rows, to)| pack_panel(packing, mr, rows, to));
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
    for ((.., bytes), (_, raw)) in jobs.iter().zip(tensors) {
        // SAFETY: the tensor has no data yet, and its panels are in the buffer from here on.
        let status = unsafe { sys::ggml_backend_tensor_alloc(buffer.raw(), raw.as_ptr(), at) };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a host buffer takes any tensor");
        at = at.wrapping_byte_add(*bytes);
    }
    Some((buffer, memory))
}

/// Interleaves up to `mr` rows.
fn pack_panel(packing: &Packing, mr: usize, rows: &[u8], panel: &mut [u8]) {
    let bytes = packing.dtype.block_bytes();
    for (r, row) in rows.chunks_exact(panel.len() / mr).enumerate() {
        for (block, to) in row.chunks_exact(bytes).zip(panel.chunks_exact_mut(mr * bytes)) {
            let (words, scale) = match packing.scale {
                ScalePosition::InWords => (block, &block[..0]),
                ScalePosition::First => (&block[2..], &block[..2]),
                ScalePosition::Last => block.split_at(bytes - 2),
            };
            let (all_words, all_scales) = to.split_at_mut(mr * words.len());
            for (word, all) in
                words.as_chunks::<4>().0.iter().zip(all_words.chunks_exact_mut(4 * mr))
            {
                all[4 * r..][..4].copy_from_slice(word);
            }
            if !scale.is_empty() {
                all_scales[2 * r..][..2].copy_from_slice(scale);
            }
        }
    }
}

/// How many rows a panel has.
struct PanelRows;

impl Task for PanelRows {
    type Output = usize;

    fn run<S: Simd>(self, _: S) -> usize {
        S::MR
    }
}
