//! One stage's computation: built once with fixed shapes, allocated once, run many times.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::buffer::{Counts, Use};
use crate::device::{complained, keep};
use crate::exceptions::{openvla_compute, openvla_free_scheduler};
use crate::finite::Guard;
use crate::memory::{Context, Home, Place};
use crate::observer::{Observed, Sink};
use crate::panel::Rounding;
use crate::repack::Layout;
use crate::state::is_countable;
use crate::{Backend, DType, Error, Result, State, Tensor, Weight, panel};

/// A computation that is ready to run. What it reads and writes are [`State`]s.
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
}

// SAFETY: a graph is its own memory plus homes, which may be shared; running it takes `&mut self`
// and the backend's lock.
unsafe impl Send for Graph {}

impl Graph {
    /// No graph has more operations: ggml walks them by recursion, on the caller's stack.
    pub const MAX_NODES: usize = 1 << 14;

    /// Builds a graph of at most `max_nodes` operations and allocates what lies between them.
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
        let builder = Builder::new(backend, max_nodes);
        build(&builder);
        let Builder { raw, context: _context, homes, observed, guards, nodes_left, leaves, .. } =
            builder;
        let size = max_nodes - nodes_left.get() + leaves.get();
        let mut raws = backend.raws();
        let (list, n) = (raws.as_mut_ptr(), i32::try_from(raws.len()).expect("a few devices"));
        // SAFETY: live backends, the CPU last; null stands for their own buffer types.
        let scheduler = unsafe {
            sys::ggml_backend_sched_new(list, std::ptr::null_mut(), n, size, false, false)
        };
        let scheduler = NonNull::new(scheduler).expect("ggml allocates its scheduler");
        let (observed, _homes) = (observed.into_inner(), homes.into_inner());
        let guards = guards.into_inner().into_values().map(|(_, guard)| guard).collect();
        let backend = backend.clone();
        let mut graph = Self { raw, _context, scheduler, backend, observed, guards, _homes };
        graph.check_support()?;
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

    /// Functions of ours run on the CPU, whatever a device says of them.
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

    /// Bytes that lie between its operations on one device.
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
    /// not; so ask before.
    fn check_support(&self) -> Result<()> {
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
            let misused = |node| panel::misused(node) || Layout::misused(&packed, node);
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

/// How functions of ours have activations.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Laid {
    /// Rounded to 8 bits: for products with panels.
    Rounded(Rounding),
    /// As they are, eight columns side by side: for products with floats.
    #[cfg(target_arch = "x86_64")]
    ByEights,
}

/// The node that lays a node in some way.
type LaidNodes = BTreeMap<(NonNull<sys::ggml_tensor>, Laid), NonNull<sys::ggml_tensor>>;

/// By what they look at: a guard and its node.
type Guards = BTreeMap<NonNull<sys::ggml_tensor>, (NonNull<sys::ggml_tensor>, Arc<Guard>)>;

/// A graph under construction. Its [`Tensor`]s borrow it.
pub struct Builder {
    raw: NonNull<sys::ggml_cgraph>,
    context: Context,
    backend: Arc<Backend>,
    homes: RefCell<Vec<Arc<Home>>>,
    /// Where to tell what these weights are multiplied by.
    sinks: RefCell<BTreeMap<NonNull<sys::ggml_tensor>, Sink>>,
    observed: RefCell<Vec<Observed>>,
    guards: RefCell<Guards>,
    /// The names of weights.
    names: RefCell<BTreeMap<NonNull<sys::ggml_tensor>, Arc<str>>>,
    /// What the elements of states that hold row numbers stay below.
    bounds: RefCell<BTreeMap<NonNull<sys::ggml_tensor>, usize>>,
    /// Activations that were laid for products of ours.
    laid: RefCell<LaidNodes>,
    nodes_left: Cell<usize>,
    /// Weights and states that nodes were given, each time.
    leaves: Cell<usize>,
}

impl Builder {
    fn new(backend: &Arc<Backend>, max_nodes: usize) -> Self {
        let most = Graph::MAX_NODES;
        assert!(max_nodes <= most, "a graph of {max_nodes} operations; {most} are possible");
        // ggml has as much room for leaves as for nodes; attention reads four.
        let slots = 4 * max_nodes.max(1);
        // SAFETY: computes a size.
        let bytes = unsafe { sys::ggml_graph_overhead_custom(slots, false) };
        let context = Context::new(max_nodes, bytes);
        // SAFETY: the context has room for one graph of that size.
        let raw = unsafe { sys::ggml_new_graph_custom(context.raw(), slots, false) };
        Self {
            raw: NonNull::new(raw).expect("the context has room for its graph"),
            context,
            backend: backend.clone(),
            homes: RefCell::default(),
            sinks: RefCell::default(),
            observed: RefCell::default(),
            guards: RefCell::default(),
            names: RefCell::default(),
            bounds: RefCell::default(),
            laid: RefCell::default(),
            nodes_left: Cell::new(max_nodes),
            leaves: Cell::new(0),
        }
    }

    /// A weight as a graph's operand.
    pub fn weight(&self, weight: &Weight) -> Tensor<'_> {
        let leaf = self.leaf(&weight.place);
        self.names.borrow_mut().insert(leaf.raw, weight.name.clone());
        if let Some(sink) = &weight.sink {
            self.sinks.borrow_mut().insert(leaf.raw, sink.clone());
        }
        leaf
    }

    /// A state as a graph's operand: what it holds when the node that reads it runs.
    pub fn state(&self, state: &State) -> Tensor<'_> {
        let leaf = self.leaf(&state.place);
        if let Some(below) = state.below {
            self.bounds.borrow_mut().insert(leaf.raw, below);
        }
        leaf
    }

    /// Whether row numbers, which are a state's, stay below `n_row`: see [`State::ids`].
    pub(crate) fn are_below(&self, ids: Tensor<'_>, n_row: usize) -> bool {
        self.bounds.borrow().get(&ids.viewed()).is_some_and(|below| *below <= n_row)
    }

    /// Copies `x` into the whole of `state`, converting to its type.
    ///
    /// # Panics
    /// If their shapes differ, or ggml does not convert one type to the other: integers are not converted,
    /// quantized elements only to F32, and rows with gaps not to quantized ones.
    pub fn store(&self, x: Tensor<'_>, state: &State) {
        self.store_in(x, self.state(state));
    }

    /// As [`Builder::store`], into a slice of a state. Runs after what was stored before.
    ///
    /// # Panics
    /// As [`Builder::store`], or if `to` does not belong to a state.
    pub fn store_in(&self, x: Tensor<'_>, to: Tensor<'_>) {
        assert_eq!(x.shape(), to.shape(), "store: shapes differ");
        assert!(std::ptr::eq(self, x.builder), "operands of two graphs");
        assert!(std::ptr::eq(self, to.builder), "operands of two graphs");
        assert!(to.is_leaf() && !to.is_weight(), "store: only states are written");
        let (from, into) = (x.dtype(), to.dtype());
        assert!(from.is_float() && into.is_float(), "store: not of floats");
        let converts = from == into || !from.is_quantized() || into == DType::F32;
        assert!(converts, "store: ggml does not convert {from} to {into}");
        let encodes = !into.is_quantized() || x.is_packed();
        assert!(encodes, "store: rows with gaps are not converted to {into}");
        let fills = to.is_contiguous() || (from, into) == (DType::F32, DType::F32);
        assert!(fills, "store: {from} is not stored in a slice of {into}");
        let (context, raw, to) = (self.context_for_one(), x.raw.as_ptr(), to.raw.as_ptr());
        // SAFETY: both tensors are live, of one shape, and of types that ggml converts.
        self.run(self.node(unsafe { sys::ggml_cpy(context, raw, to) }));
    }

    /// Makes `x` part of what runs, after everything that was made so before it.
    pub(crate) fn run(&self, x: Tensor<'_>) {
        // SAFETY: the graph has room for as many nodes as the context, which counts them.
        unsafe { sys::ggml_build_forward_expand(self.raw.as_ptr(), x.raw.as_ptr()) }
    }

    /// [`Backend::has_own_kernels`]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_own_kernels(&self) -> bool {
        self.backend.has_own_kernels()
    }

    /// What `weight` is multiplied by in place of `x`: the same, but kept if somebody observes it.
    pub(crate) fn observe<'g>(&self, weight: Tensor<'g>, x: Tensor<'g>) -> Tensor<'g> {
        let Some(sink) = self.sinks.borrow().get(&weight.raw).cloned() else { return x };
        let x = x.kept();
        self.observed.borrow_mut().push(Observed::new(x, sink));
        x
    }

    /// A node that makes [`Graph::compute`] fail if `x`, which ggml's kernels multiply the quantized
    /// `weight` by, is not finite. None where there are GPUs: `x` would have to leave them.
    pub(crate) fn guard<'g>(&'g self, weight: Tensor<'g>, x: Tensor<'g>) -> Option<Tensor<'g>> {
        if self.backend.host() > 0 {
            return None;
        }
        let name =
            self.names.borrow().get(&weight.raw).map_or_else(String::new, |name| name.to_string());
        let mut guards = self.guards.borrow_mut();
        let (node, _) = guards.entry(x.raw).or_insert_with(|| Guard::new(name, x));
        Some(Tensor { builder: self, raw: *node })
    }

    /// `x`, laid: by `make`, unless that was made before and `x` cannot have changed since.
    pub(crate) fn laid<'g>(
        &'g self,
        x: Tensor<'g>,
        how: Laid,
        make: impl FnOnce() -> Tensor<'g>,
    ) -> Tensor<'g> {
        if x.is_leaf() {
            return make();
        }
        let mut laid = self.laid.borrow_mut();
        let raw = *laid.entry((x.raw, how)).or_insert_with(|| make().raw);
        Tensor { builder: self, raw }
    }

    /// The context, for exactly one more tensor.
    ///
    /// # Panics
    /// If the graph is full: before ggml, which would abort, notices.
    pub(crate) fn context_for_one(&self) -> *mut sys::ggml_context {
        let left = self.nodes_left.get().checked_sub(1);
        self.nodes_left.set(left.expect("the graph is larger than its builder was told"));
        self.context.raw()
    }

    /// A node that ggml just made in this context.
    ///
    /// # Panics
    /// If it has more elements than ggml can count.
    pub(crate) fn node(&self, raw: *mut sys::ggml_tensor) -> Tensor<'_> {
        let node = Tensor { builder: self, raw: NonNull::new(raw).expect("ggml made a node") };
        assert!(is_countable(&node.shape()), "a node of shape {:?} is too large", node.shape());
        node
    }

    fn leaf(&self, place: &Place) -> Tensor<'_> {
        let same = Arc::ptr_eq(&place.home.backend, &self.backend);
        assert!(same, "a graph's weights and states are on its own backend");
        let mut homes = self.homes.borrow_mut();
        if !homes.iter().any(|home| Arc::ptr_eq(home, &place.home)) {
            homes.push(place.home.clone());
        }
        self.leaves.set(self.leaves.get() + 1);
        Tensor { builder: self, raw: place.raw }
    }
}
