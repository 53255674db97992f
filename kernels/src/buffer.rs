//! Memory on a device, counted while it lives.

use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::Backend;
use crate::usage::Use;

/// A buffer of ggml's, freed when it is dropped. Its tensors' context must outlive it.
pub(crate) struct Buffer {
    raw: NonNull<sys::ggml_backend_buffer>,
    backend: Arc<Backend>,
    device: usize,
    what: Use,
    bytes: usize,
}

impl Buffer {
    /// Takes over a buffer on one of the backend's devices, of which `bytes` are used. Null gives
    /// `None`: ggml had no room.
    ///
    /// # Safety
    /// `raw` must be null, or a live buffer that nothing else frees.
    pub unsafe fn new(
        raw: *mut sys::ggml_backend_buffer,
        backend: &Arc<Backend>,
        device: usize,
        what: Use,
        bytes: usize,
    ) -> Option<Self> {
        let raw = NonNull::new(raw)?;
        let usage = match what {
            Use::Weights => sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS,
            Use::States | Use::Graphs => sys::GGML_BACKEND_BUFFER_USAGE_ANY,
        };
        // SAFETY: the caller's promise.
        unsafe { sys::ggml_backend_buffer_set_usage(raw.as_ptr(), usage) };
        backend.counts(device).add(what, bytes);
        Some(Self { raw, backend: backend.clone(), device, what, bytes })
    }

    pub fn raw(&self) -> sys::ggml_backend_buffer_t {
        self.raw.as_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.backend.counts(self.device).subtract(self.what, self.bytes);
        // SAFETY: nothing else frees it, and its owner lets no tensor of it outlive it.
        unsafe { sys::ggml_backend_buffer_free(self.raw.as_ptr()) }
    }
}
