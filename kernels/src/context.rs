//! Room for tensors' headers.

use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use crate::{DType, Shape, TensorInfo};

/// A tensor of a file, and its header in a context.
pub(crate) type Entry<'a> = (&'a TensorInfo, NonNull<sys::ggml_tensor>);

/// A ggml context: room for tensors' headers, without their data.
pub(crate) struct Context(NonNull<sys::ggml_context>);

impl Context {
    /// For `n` tensors, and `more` bytes.
    pub fn new(n: usize, more: usize) -> Self {
        // SAFETY: reads a constant.
        let overhead = unsafe { sys::ggml_tensor_overhead() };
        let params = sys::ggml_init_params {
            mem_size: (n + 1) * overhead + more,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: the parameters ask ggml to allocate the memory itself.
        Self(NonNull::new(unsafe { sys::ggml_init(params) }).expect("room for tensors' headers"))
    }

    pub fn raw(&self) -> *mut sys::ggml_context {
        self.0.as_ptr()
    }

    /// A tensor's header. There must be room for it.
    pub fn tensor(&self, dtype: DType, shape: &Shape) -> NonNull<sys::ggml_tensor> {
        let sizes = shape.map(|n| i64::try_from(n).expect("sizes were checked"));
        // SAFETY: the context is live; ggml reads four sizes.
        let raw = unsafe { sys::ggml_new_tensor(self.raw(), dtype.number(), 4, sizes.as_ptr()) };
        NonNull::new(raw).expect("the context has room")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: a home's handles hold an `Arc` of it, and a graph's tensors borrow its builder, so none
        // is left.
        unsafe { sys::ggml_free(self.raw()) }
    }
}
