//! Where a device keeps weights: in its own memory, or on the CPU in layouts that it multiplies
//! faster by than by the file's own. ggml's CPU interleaves the rows of some matrices, so that one
//! instruction works on several of them.

use std::convert::Infallible;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::buffer::Buffer;
use crate::context::{Context, Entry};
use crate::exceptions::openvla_tensor_set;
use crate::usage::Use;
use crate::{Backend, Gguf, parallel_for_each};

/// A kind of memory for weights, on one of a backend's devices.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    raw: NonNull<sys::ggml_backend_buffer_type>,
    pub device: usize,
    /// Whether its tensors can only be quantized left operands of products, on the CPU.
    is_packed: bool,
}

impl Layout {
    /// Those that the backend has, the best first: each GPU's memory, then the CPU's packed layouts.
    pub fn all(backend: &Backend) -> Vec<Self> {
        let gpus = (0..backend.host()).map(|device| Self::default_of(backend, device));
        gpus.chain(Self::packed(backend)).collect()
    }

    /// The CPU's memory as it is.
    pub fn plain(backend: &Backend) -> Self {
        Self::default_of(backend, backend.host())
    }

    fn default_of(backend: &Backend, device: usize) -> Self {
        // SAFETY: a live device; it has a buffer type, which is never freed.
        let raw = unsafe { sys::ggml_backend_dev_buffer_type(backend.device(device)) };
        let raw = NonNull::new(raw).expect("every device has memory");
        Self { raw, device, is_packed: false }
    }

    /// The CPU's packed layouts.
    pub fn packed(backend: &Backend) -> Vec<Self> {
        type Get =
            unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;
        let Some(found) = backend.host_function(c"ggml_backend_dev_get_extra_bufts") else {
            return Vec::new();
        };
        // SAFETY: under this name a registry gives a function of exactly this type
        // (`ggml_backend_dev_get_extra_bufts_t` in ggml-backend.h).
        let get = unsafe { std::mem::transmute::<NonNull<c_void>, Get>(found) };
        let device = backend.host();
        let mut layouts = Vec::new();
        // SAFETY: the device is that of the registry.
        let mut list = unsafe { get(backend.device(device)) };
        while !list.is_null() {
            // SAFETY: the list, which is never freed, ends with a null pointer.
            let Some(raw) = NonNull::new(unsafe { *list }) else { break };
            layouts.push(Self { raw, device, is_packed: true });
            list = list.wrapping_add(1);
        }
        layouts
    }

    /// Whether a node reads a tensor of one of these [`Layout::packed`] other than as the left operand of
    /// a product of two matrices. ggml does not always say so: of views, it learns the layout too late, and
    /// products of stacks of matrices end in an abort or read past the tensor.
    pub fn misused(packed: &[Self], node: NonNull<sys::ggml_tensor>) -> bool {
        // SAFETY: a graph's nodes, their sources and what those view are live.
        let node = unsafe { node.as_ref() };
        let sources = node.src.iter().enumerate();
        sources.filter_map(|(i, source)| Some((i, NonNull::new(*source)?))).any(|(i, source)| {
            // SAFETY: as above.
            let (source, viewed) = unsafe { (source.as_ref(), source.as_ref().view_src.as_ref()) };
            let is_factor = i == 0 && node.op == sys::GGML_OP_MUL_MAT && viewed.is_none();
            let is_matrix = node.ne[2..] == [1, 1];
            Self::is_one_of(packed, viewed.unwrap_or(source)) && !(is_factor && is_matrix)
        })
    }

    /// Whether a tensor is in one of these layouts.
    pub fn is_one_of(layouts: &[Self], tensor: &sys::ggml_tensor) -> bool {
        // SAFETY: a tensor's buffer, if it has one yet, is live.
        let kind = NonNull::new(tensor.buffer)
            .map(|buffer| unsafe { sys::ggml_backend_buffer_get_type(buffer.as_ptr()) });
        layouts.iter().any(|layout| Some(layout.raw.as_ptr()) == kind)
    }

    /// Whether its device computes with this tensor, which has no data yet, in this layout: looks
    /// rows up in a table, multiplies by a matrix. Vectors suit everything but packed layouts.
    pub fn suits(self, backend: &Backend, (info, raw): &Entry<'_>, is_table: bool) -> bool {
        let is_matrix = info.shape[1] > 1 && info.shape[2..] == [1, 1];
        if self.is_packed && (is_table || !is_matrix || !info.dtype.is_quantized()) {
            return false;
        }
        if !is_matrix {
            return true;
        }
        let context = Context::new(2, 0);
        let columns = i64::try_from(info.shape[0]).expect("sizes were checked");
        // SAFETY: the empty buffer, to which the tensor then points no more, is freed here; looking
        // one row up, and a product of a matrix and a row of its length, are well-formed.
        unsafe {
            let buffer = sys::ggml_backend_buft_alloc_buffer(self.raw.as_ptr(), 0);
            (*raw.as_ptr()).buffer = buffer;
            let of = |kind, n| sys::ggml_new_tensor_1d(context.raw(), kind, n);
            let node = if is_table {
                sys::ggml_get_rows(context.raw(), raw.as_ptr(), of(sys::GGML_TYPE_I32, 1))
            } else {
                sys::ggml_mul_mat(context.raw(), raw.as_ptr(), of(sys::GGML_TYPE_F32, columns))
            };
            let suits = sys::ggml_backend_dev_supports_op(backend.device(self.device), node);
            (*raw.as_ptr()).buffer = std::ptr::null_mut();
            sys::ggml_backend_buffer_free(buffer);
            suits
        }
    }

    /// Copies tensors that it suits, and that have no data yet, into buffers of this layout, as
    /// many at a time as the CPU has threads. `None` if there is no room.
    ///
    /// Several buffers where one would be larger than the device's largest: Vulkan's is a gigabyte or two.
    pub fn copy(
        self,
        file: &Gguf,
        backend: &Arc<Backend>,
        tensors: &[Entry<'_>],
    ) -> Option<Vec<Buffer>> {
        // SAFETY: a live buffer type.
        let alignment = unsafe { sys::ggml_backend_buft_get_alignment(self.raw.as_ptr()) };
        let padded = |raw: &NonNull<sys::ggml_tensor>| {
            // SAFETY: a live buffer type and a live tensor.
            let size =
                unsafe { sys::ggml_backend_buft_get_alloc_size(self.raw.as_ptr(), raw.as_ptr()) };
            size.next_multiple_of(alignment)
        };
        let sizes: Vec<usize> = tensors.iter().map(|(_, raw)| padded(raw)).collect();
        // SAFETY: a live buffer type.
        let largest = unsafe { sys::ggml_backend_buft_get_max_size(self.raw.as_ptr()) };
        let mut buffers = Vec::new();
        for part in parts(&sizes, largest.saturating_sub(alignment)) {
            let bytes = sizes[part.clone()].iter().sum();
            // SAFETY: a live buffer type; the buffer is nobody else's.
            let buffer = unsafe {
                let raw = sys::ggml_backend_buft_alloc_buffer(self.raw.as_ptr(), bytes + alignment);
                Buffer::new(raw, backend, self.device, Use::Weights, bytes)
            }?;
            // SAFETY: a live buffer; its base is an address on its device, not to be read here.
            let base = unsafe { sys::ggml_backend_buffer_get_base(buffer.raw()) };
            let mut address =
                base.wrapping_byte_add(base.addr().next_multiple_of(alignment) - base.addr());
            for ((_, raw), size) in tensors[part.clone()].iter().zip(&sizes[part]) {
                // SAFETY: the tensor has no data yet, and its bytes from here on lie inside the buffer,
                // which has room for all of the part's, padded.
                let status =
                    unsafe { sys::ggml_backend_tensor_alloc(buffer.raw(), raw.as_ptr(), address) };
                assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a layout takes what it suits");
                address = address.wrapping_byte_add(*size);
            }
            buffers.push(buffer);
        }
        let tensors: Vec<_> = tensors.iter().map(|entry| Exclusive(*entry)).collect();
        let fill = |Exclusive((info, raw)): Exclusive<'_>| {
            let bytes = &file.bytes()[info.range.clone()];
            // SAFETY: the tensor is allocated and `bytes` are all of its.
            unsafe { openvla_tensor_set(raw.as_ptr(), bytes.as_ptr().cast(), bytes.len()) };
            file.forget(info.range.clone()); // there is a copy now
            Ok(())
        };
        let Ok::<_, Infallible>(()) =
            parallel_for_each(backend.n_threads(), tensors.into_iter(), fill);
        Some(buffers)
    }
}

/// Tensors of these sizes in their order, as few parts as can be of at most `largest` bytes each. One that is
/// larger by itself is a part of its own, for the device to refuse.
fn parts(sizes: &[usize], largest: usize) -> Vec<Range<usize>> {
    let (mut parts, mut start, mut bytes) = (Vec::new(), 0, 0_usize);
    for (i, size) in sizes.iter().enumerate() {
        if i > start && bytes + size > largest {
            parts.push(start..i);
            (start, bytes) = (i, 0);
        }
        bytes += size;
    }
    parts.push(start..sizes.len());
    parts
}

/// A tensor that one thread at a time has.
struct Exclusive<'a>(Entry<'a>);

// SAFETY: no other thread has the tensor, and setting one touches no other.
unsafe impl Send for Exclusive<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_tensors_in_order_and_no_larger_than_may_be() {
        assert_eq!(parts(&[3, 3, 3, 3], 6), [0..2, 2..4]);
        assert_eq!(parts(&[3, 3, 3, 3], 5), [0..1, 1..2, 2..3, 3..4]);
        assert_eq!(parts(&[1, 9, 1, 1], 4), [0..1, 1..2, 2..4], "one is too large by itself");
        assert_eq!(parts(&[7, 7], usize::MAX).len(), 1);
    }
}
