//! ggml's functions that may throw C++ exceptions, behind functions that do not: see `exceptions.cpp`.

use std::ffi::{c_char, c_void};

use llama_cpp_sys_2 as sys;

/// Takes the words of an exception: a C string.
pub(crate) type Said = unsafe extern "C" fn(*const c_char);

unsafe extern "C" {
    /// From now on, `ends`, which must not return, is called where an exception has nowhere to go.
    pub(crate) fn openvla_end_at_exceptions(ends: Said);

    /// `ggml_backend_graph_compute`; an exception gives `GGML_STATUS_FAILED`, its words go to `keep`.
    pub(crate) fn openvla_compute(
        backend: sys::ggml_backend_t,
        graph: *mut sys::ggml_cgraph,
        keep: Said,
    ) -> sys::ggml_status;

    /// `ggml_backend_sched_graph_compute`, likewise.
    pub(crate) fn openvla_compute_scheduled(
        scheduler: sys::ggml_backend_sched_t,
        graph: *mut sys::ggml_cgraph,
        keep: Said,
    ) -> sys::ggml_status;

    /// `ggml_backend_dev_init`; an exception gives null, its words go to `keep`.
    pub(crate) fn openvla_start(device: sys::ggml_backend_dev_t, keep: Said)
    -> sys::ggml_backend_t;

    /// `ggml_backend_tensor_set` from the first byte on.
    pub(crate) fn openvla_tensor_set(tensor: *mut sys::ggml_tensor, data: *const c_void, n: usize);

    /// `ggml_backend_tensor_get` from the first byte on.
    pub(crate) fn openvla_tensor_get(tensor: *const sys::ggml_tensor, data: *mut c_void, n: usize);

    /// `ggml_backend_buffer_clear` to zeros.
    pub(crate) fn openvla_buffer_clear(buffer: sys::ggml_backend_buffer_t);

    /// `ggml_backend_sched_free`
    pub(crate) fn openvla_free_scheduler(scheduler: sys::ggml_backend_sched_t);

    /// `ggml_backend_free`
    pub(crate) fn openvla_free(backend: sys::ggml_backend_t);
}

#[cfg(test)]
mod tests {
    use std::ffi::c_int;

    use super::*;
    use crate::custom::{Function, raw_node};
    use crate::{Backend, DType, Graph, State, shape};

    unsafe extern "C-unwind" {
        /// libstdc++'s `std::__throw_runtime_error(const char *)`.
        #[link_name = "_ZSt21__throw_runtime_errorPKc"]
        fn throw_runtime_error(words: *const c_char) -> !;
    }

    type Throwing = unsafe extern "C-unwind" fn(*mut sys::ggml_tensor, c_int, c_int, *mut c_void);

    unsafe extern "C-unwind" fn lose(_: *mut sys::ggml_tensor, _: c_int, _: c_int, _: *mut c_void) {
        // SAFETY: a C string; nothing here is left to drop.
        unsafe { throw_runtime_error(c"the device is lost".as_ptr()) }
    }

    #[test]
    fn what_is_thrown_in_a_computation_is_an_error_with_the_same_words() {
        let backend = Backend::cpu(1).unwrap();
        let state = || State::zeros(&backend, DType::F32, shape(&[4])).unwrap();
        let (x, y) = (state(), state());
        // SAFETY: one thread computes in the caller's, through frames that have unwind tables.
        let lose = unsafe { std::mem::transmute::<Throwing, Function>(lose) };
        let mut graph = Graph::build(&backend, 2, |g| {
            let (args, shape) = ([g.state(&x)], shape(&[4]));
            // SAFETY: it touches nothing.
            let node = unsafe { raw_node(DType::F32, shape, &args, lose, std::ptr::null_mut()) };
            g.store(node, &y);
        })
        .unwrap();
        let error = graph.compute().unwrap_err().to_string();
        assert!(error.starts_with("CPU: ") && error.contains("the device is lost"), "{error}");
    }
}
