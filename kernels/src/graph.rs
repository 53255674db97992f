//! One stage's computation: built once with fixed shapes, allocated once, run many times.

use std::any::Any;
use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use llama_cpp_sys_2 as sys;

use crate::context::Context;
use crate::device::{complained, keep};
use crate::exceptions::{openvla_compute, openvla_free_scheduler};
use crate::guard::Guard;
use crate::memory::Home;
use crate::observer::Observed;
use crate::repack::Layout;
use crate::usage::{Counts, Use};
use crate::{Backend, Builder, Error, Result};

/// A computation that is ready to run. What it reads and writes are [states](crate::State).
///
/// Each operation runs where its weights are, else where its operands are; ggml's scheduler copies
/// what goes from one device to the next. It plans once, when the graph is built, so that a device
/// sees the same graph at the same addresses every time and can replay it.
pub struct Graph {
    raw: NonNull<sys::ggml_cgraph>,
    /// Of the nodes. Freed after the scheduler.
    _context: Context,
    scheduler: NonNull<sys::ggml_backend_sched>,
    backend: Arc<Backend>,
    observed: Vec<Observed>,
    guards: Vec<Arc<Guard>>,
    /// Weights and states that nodes point to.
    _homes: Vec<Arc<Home>>,
    /// What nodes compute with.
    _kept: Vec<Box<dyn Any + Send + Sync>>,
}

// SAFETY: a graph is its own memory plus homes, which may be shared; running it takes `&mut self`
// and the backend's lock.
unsafe impl Send for Graph {}

impl Graph {
    /// No graph has more operations: ggml walks them by recursion, on the caller's stack.
    pub const MAX_NODES: usize = 1 << 14;

    /// Builds a graph of at most `max_nodes` operations and allocates the tensors between them.
    ///
    /// # Errors
    /// [`Error::Device`] if no device has an operation, [`Error::Memory`] if one has no room.
    ///
    /// # Panics
    /// If `build` makes more nodes, or an operation whose shapes do not fit; or if `max_nodes` is more than
    /// [`Graph::MAX_NODES`].
    pub fn build(
        backend: &Arc<Backend>,
        max_nodes: usize,
        build: impl FnOnce(&Builder),
    ) -> Result<Self> {
        let most = Self::MAX_NODES;
        assert!(max_nodes <= most, "a graph of {max_nodes} operations; {most} are possible");
        let builder = Builder::new(backend, max_nodes);
        build(&builder);
        let Builder { raw, context: _context, nodes_left, leaves, .. } = builder;
        let size = max_nodes - nodes_left.get() + leaves.get();
        let mut raws = backend.raws();
        let (list, n) = (raws.as_mut_ptr(), i32::try_from(raws.len()).expect("a few devices"));
        // SAFETY: live backends, the CPU last; null selects their own buffer types.
        let scheduler = unsafe {
            sys::ggml_backend_sched_new(list, std::ptr::null_mut(), n, size, false, false)
        };
        let scheduler = NonNull::new(scheduler).expect("ggml allocates its scheduler");
        let guards = builder.guards.into_inner().into_values().map(|(_, guard)| guard).collect();
        let mut graph = Self {
            raw,
            _context,
            scheduler,
            backend: backend.clone(),
            observed: builder.observed.into_inner(),
            guards,
            _homes: builder.homes.into_inner(),
            _kept: builder.kept.into_inner(),
        };
        graph.check_support(&builder.packed.into_inner())?;
        graph.keep_own_nodes();
        let idle = graph.backend.lock();
        // SAFETY: graph and scheduler are live, every node has a device that computes it, and
        // nothing runs there meanwhile.
        let allocated =
            unsafe { sys::ggml_backend_sched_alloc_graph(scheduler.as_ptr(), graph.raw.as_ptr()) };
        drop(idle);
        if !allocated {
            return Err(graph.no_room());
        }
        graph.observed.retain(Observed::is_computed);
        graph.count(Counts::add);
        Ok(graph)
    }

    /// Runs the graph and waits for it.
    ///
    /// # Errors
    /// [`Error::Device`] if a device fails, [`Error::NotFinite`] if ggml's kernels multiplied a quantized
    /// weight by a number that is not finite, which they would round to some number.
    pub fn compute(&mut self) -> Result<()> {
        let _idle = self.backend.lock();
        // SAFETY: the graph is allocated on these devices, its shapes were asserted node by node,
        // and nothing else runs there.
        let status = unsafe { openvla_compute(self.scheduler.as_ptr(), self.raw.as_ptr(), keep) };
        if status == sys::GGML_STATUS_SUCCESS {
            self.observed.iter().for_each(Observed::add);
            let mut result = Ok(());
            for guard in &self.guards {
                result = result.and(guard.check()); // each is asked, so that it starts the next run anew
            }
            return result;
        }
        let why = format!("computing a graph failed with ggml's status {status}{}", complained());
        Err(Error::Device { device: self.backend.name(0).to_owned(), why })
    }

    /// Seconds of the fastest of `n` runs, after one that does not count.
    ///
    /// # Errors
    /// As [`Graph::compute`].
    pub fn fastest(&mut self, n: usize) -> Result<f64> {
        self.compute()?;
        let mut seconds = f64::INFINITY;
        for _ in 0..n {
            let start = Instant::now();
            self.compute()?;
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    /// Our own functions run on the CPU, whatever a device claims to support.
    fn keep_own_nodes(&self) {
        let host = self.backend.raw(self.backend.host());
        for node in self.nodes() {
            // SAFETY: the node, the scheduler and the backend, which the scheduler knows, are live.
            unsafe {
                if (*node).op == sys::GGML_OP_CUSTOM {
                    let scheduler = self.scheduler.as_ptr();
                    sys::ggml_backend_sched_set_tensor_backend(scheduler, node, host);
                }
            }
        }
    }

    fn nodes(&self) -> Vec<*mut sys::ggml_tensor> {
        // SAFETY: the graph is live, and every index is below its count.
        unsafe {
            let n = sys::ggml_graph_n_nodes(self.raw.as_ptr());
            (0..n).map(|i| sys::ggml_graph_node(self.raw.as_ptr(), i)).collect()
        }
    }

    /// It could not be allocated: names the device that it needs most of.
    fn no_room(&self) -> Error {
        let mut sizes = vec![0; self.backend.n_device()];
        let _idle = self.backend.lock();
        // SAFETY: scheduler and graph are live, and `sizes` has a number for each device. Nothing is allocated.
        unsafe {
            sys::ggml_backend_sched_reserve_size(
                self.scheduler.as_ptr(),
                self.raw.as_ptr(),
                sizes.as_mut_ptr(),
            );
        }
        let largest = (0..sizes.len()).max_by_key(|device| sizes[*device]).unwrap_or(0);
        let device = self.backend.name(largest).to_owned();
        Error::Memory { device, what: "a computation".to_owned(), bytes: sizes[largest] }
    }

    /// Bytes of intermediate tensors on one device.
    fn bytes(&self, device: usize) -> usize {
        let backend = self.backend.raw(device);
        // SAFETY: the scheduler is live and knows the backend.
        unsafe { sys::ggml_backend_sched_get_buffer_size(self.scheduler.as_ptr(), backend) }
    }

    fn count(&self, change: fn(&Counts, Use, usize)) {
        for device in 0..self.backend.n_device() {
            change(self.backend.counts(device), Use::Graphs, self.bytes(device));
        }
    }

    /// ggml aborts when no device has an operation, or when that of the memory that it writes has
    /// not; so ask before. `own_packed` are the weights that only our own products can read.
    fn check_support(&self, own_packed: &BTreeSet<NonNull<sys::ggml_tensor>>) -> Result<()> {
        let (raws, packed) = (self.backend.raws(), Layout::packed(&self.backend));
        for node in self.nodes() {
            // SAFETY: node and backends are live; a view's source lives as long as the view, and so
            // does a buffer as long as its tensors.
            let can = unsafe {
                let written =
                    (*node).view_src.as_ref().map_or((*node).buffer, |whole| whole.buffer);
                let reaches = |raw| {
                    written.is_null()
                        || sys::ggml_backend_supports_buft(
                            raw,
                            sys::ggml_backend_buffer_get_type(written),
                        )
                };
                raws.iter().any(|raw| reaches(*raw) && sys::ggml_backend_supports_op(*raw, node))
            };
            let misused =
                |node| reads_packed_bytes(own_packed, node) || Layout::misused(&packed, node);
            if can && !NonNull::new(node).is_some_and(misused) {
                continue;
            }
            // SAFETY: the node is live; its description is a C string of ggml's constant tables.
            let op = unsafe { std::ffi::CStr::from_ptr(sys::ggml_op_desc(node)) };
            let why = format!("cannot compute {} for these shapes", op.to_string_lossy());
            return Err(Error::Device { device: self.backend.name(0).to_owned(), why });
        }
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.count(Counts::subtract);
        // SAFETY: the scheduler is live, and nothing runs there.
        unsafe { openvla_free_scheduler(self.scheduler.as_ptr()) }
    }
}

/// Whether a node of ggml's reads the bytes of a weight in our own layout, of which it knows nothing.
fn reads_packed_bytes(
    packed: &BTreeSet<NonNull<sys::ggml_tensor>>,
    node: NonNull<sys::ggml_tensor>,
) -> bool {
    // SAFETY: a graph's nodes are live.
    let node = unsafe { node.as_ref() };
    let mut sources = node.src.iter().filter_map(|source| NonNull::new(*source));
    node.op != sys::GGML_OP_CUSTOM
        && sources.any(|source| {
            // SAFETY: a node's sources are live, as is what they view.
            let viewed = unsafe { source.as_ref() }.view_src;
            packed.contains(&NonNull::new(viewed).unwrap_or(source))
        })
}
