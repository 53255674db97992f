//! One stage's computation: built once with fixed shapes, allocated once, run many times.

use std::any::Any;
use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use llama_cpp_sys_2 as sys;

use crate::context::Context;
use crate::device::complained;
use crate::guard::Guard;
use crate::memory::Home;
use crate::observer::Observed;
use crate::repack::Layout;
use crate::scheduler::Scheduler;
use crate::scratch::Offsets;
use crate::{Backend, Builder, Error, Result};

/// A computation that is ready to run. What it reads and writes are [states](crate::State).
///
/// Each operation runs where its weights are, else where its operands are; ggml's scheduler copies
/// what goes from one device to the next. On the CPU alone, graphs share the memory between operations.
pub struct Graph {
    plan: Plan,
    raw: NonNull<sys::ggml_cgraph>,
    /// Of the nodes. Freed after the plan.
    _context: Context,
    backend: Arc<Backend>,
    observed: Vec<Observed>,
    guards: Vec<Arc<Guard>>,
    /// Weights and states that nodes point to.
    _homes: Vec<Arc<Home>>,
    /// What nodes compute with.
    _kept: Vec<Box<dyn Any + Send + Sync>>,
}

/// Where what the nodes compute lies, and who computes it.
enum Plan {
    Alone(Offsets),
    Spread(Scheduler),
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
        let nodes = nodes(raw);
        check_support(backend, &nodes, &builder.packed.into_inner())?;
        // SAFETY: the graph is live, as long as its context, and every node has a device that computes it.
        let plan = unsafe {
            if backend.n_device() == 1 {
                Plan::Alone(Offsets::new(backend, raw, &nodes)?)
            } else {
                Plan::Spread(Scheduler::new(backend, raw, &nodes, size)?)
            }
        };
        let mut observed = builder.observed.into_inner();
        observed.retain(|observed| nodes.contains(&observed.raw()));
        Ok(Self {
            plan,
            raw,
            _context,
            backend: backend.clone(),
            observed,
            guards: builder.guards.into_inner().into_values().map(|(_, guard)| guard).collect(),
            _homes: builder.homes.into_inner(),
            _kept: builder.kept.into_inner(),
        })
    }

    /// Runs the graph and waits for it.
    ///
    /// # Errors
    /// [`Error::Device`] if a device fails, [`Error::Memory`] if it has no room any more, [`Error::NotFinite`] if
    /// ggml's kernels multiplied a quantized weight by a number that is not finite, which they would round to some
    /// number.
    pub fn compute(&mut self) -> Result<()> {
        let mut scratch = self.backend.lock();
        // SAFETY: the graph is live and planned for these devices, its shapes were asserted node by node,
        // and nothing else runs there.
        let status = unsafe {
            match &mut self.plan {
                Plan::Alone(offsets) => offsets.compute(&self.backend, &mut scratch, self.raw)?,
                Plan::Spread(scheduler) => scheduler.compute(self.raw),
            }
        };
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
}

fn nodes(graph: NonNull<sys::ggml_cgraph>) -> Vec<*mut sys::ggml_tensor> {
    // SAFETY: the graph is live, and every index is below its count.
    unsafe {
        let n = sys::ggml_graph_n_nodes(graph.as_ptr());
        (0..n).map(|i| sys::ggml_graph_node(graph.as_ptr(), i)).collect()
    }
}

/// ggml aborts when no device has an operation, or when that of the memory that it writes has
/// not; so ask before. `own_packed` are the weights that only our own products can read.
fn check_support(
    backend: &Arc<Backend>,
    nodes: &[*mut sys::ggml_tensor],
    own_packed: &BTreeSet<NonNull<sys::ggml_tensor>>,
) -> Result<()> {
    let (raws, packed) = (backend.raws(), Layout::packed(backend));
    for node in nodes.iter().copied() {
        // SAFETY: node and backends are live; a view's source lives as long as the view, and so
        // does a buffer as long as its tensors.
        let can = unsafe {
            let written = (*node).view_src.as_ref().map_or((*node).buffer, |whole| whole.buffer);
            let reaches = |raw| {
                written.is_null()
                    || sys::ggml_backend_supports_buft(
                        raw,
                        sys::ggml_backend_buffer_get_type(written),
                    )
            };
            raws.iter().any(|raw| reaches(*raw) && sys::ggml_backend_supports_op(*raw, node))
        };
        let misused = |node| reads_packed_bytes(own_packed, node) || Layout::misused(&packed, node);
        if can && !NonNull::new(node).is_some_and(misused) {
            continue;
        }
        // SAFETY: the node is live; its description is a C string of ggml's constant tables.
        let op = unsafe { std::ffi::CStr::from_ptr(sys::ggml_op_desc(node)) };
        let why = format!("cannot compute {} for these shapes", op.to_string_lossy());
        return Err(Error::Device { device: backend.name(0).to_owned(), why });
    }
    Ok(())
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
