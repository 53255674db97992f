//! Layouts that a device multiplies faster by than by the file's own: ggml's CPU interleaves the
//! rows of some matrices, so that one instruction works on several of them.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use llama_cpp_sys_2 as sys;

use crate::memory::context;
use crate::{Backend, Gguf, TensorInfo};

/// A tensor of a file, and its header in a context.
pub(crate) type Entry<'a> = (&'a TensorInfo, NonNull<sys::ggml_tensor>);

/// A buffer type of the backend whose tensors can be nothing but the left operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Layout(NonNull<sys::ggml_backend_buffer_type>);

/// No type's blocks, nor any instruction, asks for more.
const ALIGNMENT: usize = 128;

impl Layout {
    /// Those that the backend has, the best first.
    pub fn all(backend: &Backend) -> Vec<Self> {
        type Get =
            unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;
        let Some(found) = backend.function(c"ggml_backend_dev_get_extra_bufts") else {
            return Vec::new();
        };
        // SAFETY: under this name a registry gives a function of exactly this type
        // (`ggml_backend_dev_get_extra_bufts_t` in ggml-backend.h).
        let get = unsafe { std::mem::transmute::<NonNull<c_void>, Get>(found) };
        let mut layouts = Vec::new();
        // SAFETY: the device is that of the registry.
        let mut list = unsafe { get(backend.device()) };
        while !list.is_null() {
            // SAFETY: the list, which is never freed, ends with a null pointer.
            let Some(layout) = NonNull::new(unsafe { *list }) else { break };
            layouts.push(Self(layout));
            list = list.wrapping_add(1);
        }
        layouts
    }

    /// Whether the backend multiplies by this tensor, which has no data yet, in this layout.
    pub fn suits(self, backend: &Backend, (info, raw): &Entry<'_>) -> bool {
        if !info.dtype.is_quantized() || info.shape[2..] != [1, 1] {
            return false;
        }
        let context = context(2);
        // SAFETY: the context is freed below, and so is the empty buffer, to which the tensor then
        // points no more; a product of a matrix and a row of its length is well-formed.
        unsafe {
            let buffer = sys::ggml_backend_buft_alloc_buffer(self.0.as_ptr(), 0);
            (*raw.as_ptr()).buffer = buffer;
            let columns = i64::try_from(info.shape[0]).expect("sizes were checked");
            let row = sys::ggml_new_tensor_1d(context.as_ptr(), sys::GGML_TYPE_F32, columns);
            let product = sys::ggml_mul_mat(context.as_ptr(), raw.as_ptr(), row);
            let suits = sys::ggml_backend_dev_supports_op(backend.device(), product);
            (*raw.as_ptr()).buffer = std::ptr::null_mut();
            sys::ggml_backend_buffer_free(buffer);
            sys::ggml_free(context.as_ptr());
            suits
        }
    }

    /// Copies tensors that it suits, and that have no data yet, into a buffer of this layout, as
    /// many at a time as the backend has threads. `None` if there is no room.
    pub fn copy(
        self,
        file: &Gguf,
        backend: &Backend,
        tensors: &[Entry<'_>],
    ) -> Option<NonNull<sys::ggml_backend_buffer>> {
        let padded = |info: &TensorInfo| info.range.len().next_multiple_of(ALIGNMENT);
        let bytes: usize = tensors.iter().map(|(info, _)| padded(info)).sum();
        // SAFETY: a live buffer type.
        let buffer =
            unsafe { sys::ggml_backend_buft_alloc_buffer(self.0.as_ptr(), bytes + ALIGNMENT) };
        let buffer = NonNull::new(buffer)?;
        // SAFETY: a live buffer of host memory.
        let base = unsafe { sys::ggml_backend_buffer_get_base(buffer.as_ptr()) };
        let mut address = base.wrapping_byte_add(base.align_offset(ALIGNMENT));
        for (info, raw) in tensors {
            // SAFETY: the tensor has no data yet, and its bytes from here on lie inside the buffer,
            // which has room for all of them, padded.
            let status =
                unsafe { sys::ggml_backend_tensor_alloc(buffer.as_ptr(), raw.as_ptr(), address) };
            assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a layout takes what it suits");
            address = address.wrapping_byte_add(padded(info));
        }
        let (next, tensors) = (AtomicUsize::new(0), Unshared(tensors));
        let work = || {
            let Unshared(tensors) = &tensors;
            while let Some((info, raw)) = tensors.get(next.fetch_add(1, Ordering::Relaxed)) {
                let bytes = &file.bytes()[info.range.clone()];
                // SAFETY: the tensor is allocated and `bytes` are all of its.
                unsafe {
                    sys::ggml_backend_tensor_set(
                        raw.as_ptr(),
                        bytes.as_ptr().cast(),
                        0,
                        bytes.len(),
                    );
                }
                file.forget(info.range.clone()); // there is a copy now
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..backend.n_threads() {
                scope.spawn(work);
            }
        });
        Some(buffer)
    }
}

/// Tensors of which each thread takes other ones.
struct Unshared<'a>(&'a [Entry<'a>]);

// SAFETY: threads take different tensors by a counter, and setting one touches no other.
unsafe impl Sync for Unshared<'_> {}
