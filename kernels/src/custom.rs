//! Nodes computed by our own functions, on all of the CPU's threads.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use llama_cpp_sys_2 as sys;

use crate::builder::Tensor;
use crate::{DType, Shape};

/// What ggml calls: with the node, the thread's number, how many threads there are, and `data`.
pub(crate) type Function =
    extern "C" fn(*mut sys::ggml_tensor, i: c_int, n_thread: c_int, data: *mut c_void);

/// ggml's `GGML_N_TASKS_MAX`.
const ALL_THREADS: c_int = -1;

/// Which of a node's 16 parameters counts the work items that threads took. ggml uses those before it.
const COUNTER: usize = 8;

/// A node whose sources are `args`, and that `compute` computes: each thread calls it once. The graph keeps it.
///
/// # Safety
/// The function must be sound for a node of this type and shape, and these sources.
pub(crate) unsafe fn node<'g, F>(
    dtype: DType,
    shape: Shape,
    args: &[Tensor<'g>],
    compute: F,
) -> Tensor<'g>
where
    F: Fn(&Job) + Send + Sync + 'static,
{
    extern "C" fn call<F: Fn(&Job)>(
        node: *mut sys::ggml_tensor,
        i: c_int,
        n_thread: c_int,
        data: *mut c_void,
    ) {
        let job = Job { node, thread: i as usize, n_thread: n_thread as usize };
        // SAFETY: `data` is the closure that the graph keeps, and which is only read.
        unsafe { (*data.cast::<F>())(&job) }
    }
    let compute = Box::new(compute);
    let data = (&raw const *compute).cast_mut().cast();
    args[0].builder.keep(compute);
    // SAFETY: the caller's promise; `call` is for this closure.
    unsafe { raw_node(dtype, shape, args, call::<F>, data) }
}

/// A node whose sources are `args`, and that `function` computes.
///
/// # Safety
/// The function must be sound for these arguments, this type and shape, and this `data`.
pub(crate) unsafe fn raw_node<'g>(
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

/// A node that is being computed, as one of the threads sees it. It and its sources are live and have data.
pub(crate) struct Job {
    /// Other threads change the counter in it, so nothing refers to it as a whole.
    node: *mut sys::ggml_tensor,
    thread: usize,
    n_thread: usize,
}

impl Job {
    pub fn n_thread(&self) -> usize {
        self.n_thread
    }

    /// This thread's part of `total` work items.
    pub fn thread_range(&self, total: usize) -> Range<usize> {
        self.thread * total / self.n_thread..(self.thread + 1) * total / self.n_thread
    }

    /// The next of `total` work items, which the threads take one by one, or `None` if they took all. Each
    /// thread must ask until there is none.
    pub fn next(&self, total: usize) -> Option<usize> {
        // SAFETY: the node is live, and its parameters are numbers of 32 bits, aligned as such; ggml set this
        // one to zero and nothing else uses it.
        let counter =
            unsafe { AtomicU32::from_ptr((&raw mut (*self.node).op_params[COUNTER]).cast()) };
        let item = counter.fetch_add(1, Ordering::Relaxed) as usize;
        if item + 1 == total + self.n_thread {
            counter.store(0, Ordering::Relaxed); // the last thread to find none left: for the next run
        }
        (item < total).then_some(item)
    }

    /// The node's sizes.
    pub fn shape(&self) -> Shape {
        // SAFETY: the node is live.
        unsafe { (*self.node).ne }.map(|n| n as usize)
    }

    /// A source of the node, if there are that many.
    pub fn source(&self, i: usize) -> Option<&sys::ggml_tensor> {
        // SAFETY: the node and its sources are live; nothing changes a source's header.
        unsafe { (*self.node).src[i].as_ref() }
    }

    /// The sizes of a source.
    ///
    /// # Panics
    /// If there are fewer sources.
    pub fn source_shape(&self, i: usize) -> Shape {
        self.source(i).expect("a source").ne.map(|n| n as usize)
    }

    /// The first `n` elements of a source.
    ///
    /// # Safety
    /// The source must have so many of this type, without gaps.
    pub unsafe fn slice<T>(&self, i: usize, n: usize) -> &[T] {
        let data = self.source(i).expect("a source").data.cast::<T>();
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(data, n) }
    }

    /// A row of a source.
    ///
    /// # Safety
    /// The source must be of this type, without gaps in its rows, and none between its planes.
    pub unsafe fn row<T>(&self, i: usize, row: usize) -> &[T] {
        let source = self.source(i).expect("a source");
        // SAFETY: the caller's promise.
        unsafe {
            let data = source.data.byte_add(row * source.nb[1]);
            std::slice::from_raw_parts(data.cast(), source.ne[0] as usize)
        }
    }

    /// The node's elements. Threads write different ones.
    pub fn out<T>(&self) -> *mut T {
        // SAFETY: the node is live.
        unsafe { (*self.node).data }.cast()
    }
}
