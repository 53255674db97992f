//! A device that owns memory and computes graphs.

use std::ffi::{CStr, c_char, c_void};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use llama_cpp_sys_2 as sys;

use crate::{Error, Result};

/// Whose products of quantised matrices a CPU computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// Our own where the CPU has AVX-512 VNNI, else ggml's. They round activations as ggml does, and
    /// differ in the order of sums in f32.
    #[default]
    Fastest,
    /// ggml's, which are llama.cpp's to the bit.
    Ggml,
}

/// A ggml backend: today the CPU. Values of this type prove that ggml has started.
pub struct Backend {
    raw: NonNull<sys::ggml_backend>,
    name: String,
    n_threads: usize,
    products: Products,
    /// One computation or transfer at a time: ggml's backends are not made for two.
    gate: Mutex<()>,
}

// SAFETY: ggml ties no backend to a thread, and every use of `raw` that changes anything happens
// under `gate`.
unsafe impl Send for Backend {}
// SAFETY: as above.
unsafe impl Sync for Backend {}

impl Backend {
    /// The CPU with that many threads.
    ///
    /// # Errors
    /// [`Error::Device`] if ggml was built without its CPU backend.
    pub fn cpu(n_threads: usize) -> Result<Arc<Self>> {
        Self::cpu_with(n_threads, Products::default())
    }

    /// The same, with a choice of products.
    ///
    /// # Errors
    /// As [`Backend::cpu`].
    pub fn cpu_with(n_threads: usize, products: Products) -> Result<Arc<Self>> {
        silence();
        let kind = sys::GGML_BACKEND_DEVICE_TYPE_CPU;
        // SAFETY: the registry is built on first use, behind C++'s own lock; a null parameter
        // string is its documented default.
        let raw = unsafe { sys::ggml_backend_init_by_type(kind, std::ptr::null()) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::Device {
            device: "CPU".into(),
            why: "ggml was built without its CPU backend".into(),
        })?;
        // SAFETY: `raw` is a live backend, whose name is a C string that lives as long.
        let name = unsafe { CStr::from_ptr(sys::ggml_backend_name(raw.as_ptr())) };
        let name = name.to_string_lossy().into_owned();
        let n_threads = n_threads.clamp(1, 512);
        let backend = Self { raw, name, n_threads, products, gate: Mutex::new(()) };
        backend.set_threads();
        Ok(Arc::new(backend))
    }

    /// The device's name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Through the registry, since a CPU backend that was loaded at run time exports nothing else.
    fn set_threads(&self) {
        type SetThreads = unsafe extern "C" fn(sys::ggml_backend_t, i32);
        if let Some(found) = self.function(c"ggml_backend_set_n_threads") {
            // SAFETY: under this name a registry gives a function of exactly this type
            // (`ggml_backend_set_n_threads_t` in ggml-backend.h).
            let set = unsafe { std::mem::transmute::<NonNull<c_void>, SetThreads>(found) };
            let n = i32::try_from(self.n_threads).expect("512 fits");
            // SAFETY: `raw` is a live backend of that registry.
            unsafe { set(self.raw(), n) };
        }
    }

    /// Threads that it computes with.
    pub(crate) fn n_threads(&self) -> usize {
        self.n_threads
    }

    pub(crate) fn products(&self) -> Products {
        self.products
    }

    pub(crate) fn device(&self) -> sys::ggml_backend_dev_t {
        // SAFETY: `raw` is live; ggml never frees devices.
        unsafe { sys::ggml_backend_get_device(self.raw()) }
    }

    /// What the backend's registry has under a name, whose type its header says.
    pub(crate) fn function(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the device and its registry, which ggml never frees, are live.
        NonNull::new(unsafe {
            let registry = sys::ggml_backend_dev_backend_reg(self.device());
            sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr())
        })
    }

    pub(crate) fn raw(&self) -> sys::ggml_backend_t {
        self.raw.as_ptr()
    }

    /// Waits for the device to be idle and keeps it so. A panic elsewhere leaves nothing broken
    /// that the next graph does not write anew, so a poisoned lock is as good as a clean one.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: everything allocated on the backend holds an `Arc` of it, so nothing is left.
        unsafe { sys::ggml_backend_free(self.raw()) }
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Backend").field(&self.name).finish()
    }
}

/// ggml logs to stderr by itself; a library has no business there, and failures come back as errors.
fn silence() {
    unsafe extern "C" fn drop_message(_: sys::ggml_log_level, _: *const c_char, _: *mut c_void) {}
    static ONCE: Once = Once::new();
    // SAFETY: the callback touches nothing, and `ONCE` keeps two threads from setting it at once.
    ONCE.call_once(|| unsafe { sys::ggml_log_set(Some(drop_message), std::ptr::null_mut()) });
}
