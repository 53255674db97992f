//! Nodes that all of the CPU's threads compute with a function of ours.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use llama_cpp_sys_2 as sys;

use crate::{DType, Shape, Tensor};

/// What computes a node: it is given the node, the thread's number, how many there are, and `data`.
pub(crate) type Function =
    extern "C" fn(*mut sys::ggml_tensor, i: c_int, n_thread: c_int, data: *mut c_void);

/// ggml's `GGML_N_TASKS_MAX`.
const ALL_THREADS: c_int = -1;

/// A node whose sources are `args`, on a CPU that has AVX-512 VNNI.
///
/// # Panics
/// If this CPU does not have it.
///
/// # Safety
/// The function must be sound for these arguments, this type and shape, and this `data`, on such a CPU.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn node<'g>(
    dtype: DType,
    shape: Shape,
    args: &[Tensor<'g>],
    function: Function,
    data: *mut c_void,
) -> Tensor<'g> {
    assert!(crate::panel::available(), "our own kernels need AVX-512 VNNI");
    // SAFETY: the caller's promise.
    unsafe { portable_node(dtype, shape, args, function, data) }
}

/// A node whose sources are `args`, on any CPU.
///
/// # Safety
/// The function must be sound for these arguments, this type and shape, and this `data`.
pub(crate) unsafe fn portable_node<'g>(
    dtype: DType,
    shape: Shape,
    args: &[Tensor<'g>],
    function: Function,
    data: *mut c_void,
) -> Tensor<'g> {
    let builder = args[0].builder;
    let context = builder.context_for_one();
    let mut raws: Vec<_> = args.iter().map(|arg| arg.raw.as_ptr()).collect();
    let [a, b, c, d] = shape.map(|n| n as i64);
    // SAFETY: the arguments are live, of this graph and fewer than ggml's limit; the rest is the
    // caller's promise.
    builder.node(unsafe {
        sys::ggml_custom_4d(
            context,
            dtype.number(),
            a,
            b,
            c,
            d,
            raws.as_mut_ptr(),
            raws.len() as c_int,
            Some(function),
            ALL_THREADS,
            data,
        )
    })
}

/// Thread `i`'s share of `total` things.
pub(crate) fn share(total: usize, i: c_int, n_thread: c_int) -> Range<usize> {
    let start = |i: c_int| i as usize * total / n_thread as usize;
    start(i)..start(i + 1)
}
