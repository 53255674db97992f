//! A graph under construction, and the handles of its nodes.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::context::Context;
use crate::guard::Guard;
use crate::memory::{Home, TensorHandle};
use crate::observer::{Observed, Sink};
use crate::own::activations::Activations;
use crate::own::isa::Isa;
use crate::state::is_countable;
use crate::{Backend, DType, Shape, State, Weight};

/// A node of a graph. `Copy`, so that model code reads like the formula.
#[derive(Clone, Copy)]
pub struct Tensor<'g> {
    pub(crate) builder: &'g Builder,
    pub(crate) raw: NonNull<sys::ggml_tensor>,
}

impl Tensor<'_> {
    /// Sizes, fastest first.
    pub fn shape(self) -> Shape {
        // SAFETY: the tensor lives as long as its builder's context or the homes it keeps.
        unsafe { self.raw.as_ref() }.ne.map(|n| usize::try_from(n).expect("sizes are positive"))
    }

    /// Bytes from one element to the next, per dimension.
    pub(crate) fn strides(self) -> Shape {
        // SAFETY: as in `shape`.
        unsafe { self.raw.as_ref() }.nb
    }

    /// Bytes from the start of what is [viewed](Self::viewed).
    pub(crate) fn offset(self) -> usize {
        self.views().map(|view| view.view_offs).sum()
    }

    pub(crate) fn dtype(self) -> DType {
        // SAFETY: as in `shape`.
        let number = unsafe { self.raw.as_ref() }.type_;
        DType::from_number(number).expect("graphs are made of our types")
    }

    pub(crate) fn is_contiguous(self) -> bool {
        // SAFETY: as in `shape`. ggml does not look at the stride of rows of one element, but its kernels do.
        self.is_packed() && unsafe { sys::ggml_is_contiguous(self.raw.as_ptr()) }
    }

    /// Whether ggml's activations take it for contiguous, too, which look at the stride of dimension 1 even
    /// where its size is 1.
    pub(crate) fn is_plainly_contiguous(self) -> bool {
        self.is_contiguous() && self.has_plain_rows()
    }

    /// Whether ggml's activations take it for rows without gaps, between which there may be some.
    pub(crate) fn has_plain_rows(self) -> bool {
        // SAFETY: as in `shape`.
        self.is_packed() && unsafe { sys::ggml_is_contiguous_1(self.raw.as_ptr()) }
    }

    /// Whether the elements of a row follow each other.
    pub(crate) fn is_packed(self) -> bool {
        self.strides()[0] == self.dtype().block_bytes()
    }

    /// The tensor whose bytes these are: itself, unless it is a view, or [computed in](Builder::compute_in) a state.
    pub(crate) fn viewed(self) -> NonNull<sys::ggml_tensor> {
        self.views().last().and_then(|view| NonNull::new(view.view_src)).unwrap_or(self.raw)
    }

    /// Itself, if it is a view, and the views that it is a view of.
    fn views<'t>(self) -> impl Iterator<Item = &'t sys::ggml_tensor> {
        // SAFETY: as in `shape`; a view's source lives as long as the view.
        let view = |raw: NonNull<sys::ggml_tensor>| unsafe { raw.as_ref() };
        let is_view = move |tensor: &&'t sys::ggml_tensor| !tensor.view_src.is_null();
        let first = Some(view(self.raw)).filter(is_view);
        std::iter::successors(first, move |tensor| {
            NonNull::new(tensor.view_src).map(view).filter(is_view)
        })
    }

    /// Whether its bytes are a weight's or a state's, rather than an operation's result.
    pub(crate) fn is_leaf(self) -> bool {
        // SAFETY: as in `shape`; a view's source lives as long as the view.
        unsafe { self.viewed().as_ref() }.op == sys::GGML_OP_NONE
    }

    /// Whether it is to be read after the graph has run.
    pub(crate) fn is_output(self) -> bool {
        // SAFETY: as in `shape`.
        let flags = unsafe { self.raw.as_ref() }.flags;
        flags & sys::GGML_TENSOR_FLAG_OUTPUT as i32 != 0
    }

    /// Whether it is a weight packed for our own products.
    pub(crate) fn is_packed_weight(self) -> bool {
        self.builder.packed.borrow().contains(&self.raw)
    }

    /// Whether its bytes are a weight's, which may be the file's own.
    pub(crate) fn is_weight(self) -> bool {
        // SAFETY: as in `shape`; a view's source lives as long as the view.
        let buffer = unsafe { self.viewed().as_ref() }.buffer;
        let weights = sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
        // SAFETY: a tensor's buffer, if it has one yet, is live.
        !buffer.is_null() && unsafe { sys::ggml_backend_buffer_get_usage(buffer) } == weights
    }

    pub(crate) fn is_f32(self) -> bool {
        self.dtype() == DType::F32
    }

    /// The arguments every constructor of ggml starts with. Each call is for one node.
    pub(crate) fn args(self) -> (*mut sys::ggml_context, *mut sys::ggml_tensor) {
        (self.builder.context_for_one(), self.raw.as_ptr())
    }

    pub(crate) fn same_graph(self, other: Tensor<'_>) {
        assert!(std::ptr::eq(self.builder, other.builder), "operands of two graphs");
    }
}

/// By what they look at: a guard and its node.
pub(crate) type Guards =
    BTreeMap<NonNull<sys::ggml_tensor>, (NonNull<sys::ggml_tensor>, Arc<Guard>)>;

/// Where results may begin on every device, in bytes: the most that a Vulkan device may ask for.
const ALIGNMENT: usize = 256;

/// A graph under construction. Its [`Tensor`]s borrow it.
pub struct Builder {
    pub(crate) raw: NonNull<sys::ggml_cgraph>,
    pub(crate) context: Context,
    backend: Arc<Backend>,
    pub(crate) homes: RefCell<Vec<Arc<Home>>>,
    /// Where to tell what these weights are multiplied by.
    sinks: RefCell<BTreeMap<NonNull<sys::ggml_tensor>, Sink>>,
    pub(crate) observed: RefCell<Vec<Observed>>,
    pub(crate) guards: RefCell<Guards>,
    /// The names of weights.
    names: RefCell<BTreeMap<NonNull<sys::ggml_tensor>, Arc<str>>>,
    /// What the elements of states that hold row numbers stay below.
    bounds: RefCell<BTreeMap<NonNull<sys::ggml_tensor>, usize>>,
    /// Weights packed for our own products.
    pub(crate) packed: RefCell<BTreeSet<NonNull<sys::ggml_tensor>>>,
    /// What is known of the activations that those are multiplied by.
    pub(crate) activations: RefCell<Activations>,
    /// What nodes compute with.
    pub(crate) kept: RefCell<Vec<Box<dyn Any + Send + Sync>>>,
    pub(crate) nodes_left: Cell<usize>,
    /// Weights and states that nodes were given, each time.
    pub(crate) leaves: Cell<usize>,
}

impl Builder {
    pub(crate) fn new(backend: &Arc<Backend>, max_nodes: usize) -> Self {
        // ggml has as much room for leaves as for nodes; attention reads four, and may be computed in another.
        let slots = 5 * max_nodes.max(1);
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
            packed: RefCell::default(),
            activations: RefCell::default(),
            kept: RefCell::default(),
            nodes_left: Cell::new(max_nodes),
            leaves: Cell::new(0),
        }
    }

    /// A weight as a graph's operand.
    pub fn weight(&self, weight: &Weight) -> Tensor<'_> {
        let leaf = self.leaf(&weight.handle);
        if weight.is_packed {
            self.packed.borrow_mut().insert(leaf.raw);
        }
        self.names.borrow_mut().insert(leaf.raw, weight.name.clone());
        if let Some(sink) = &weight.sink {
            self.sinks.borrow_mut().insert(leaf.raw, sink.clone());
        }
        leaf
    }

    /// A state as a graph's operand: what it holds when the node that reads it runs.
    pub fn state(&self, state: &State) -> Tensor<'_> {
        let leaf = self.leaf(&state.handle);
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

    /// As [`Builder::store_in`], but `x` is computed there and not copied, where that can be: a launch less. Read the slice from
    /// then on, and not `x`, which is what the slice holds, whatever else is stored there.
    ///
    /// # Panics
    /// As [`Builder::store_in`].
    pub fn compute_in(&self, x: Tensor<'_>, to: Tensor<'_>) {
        assert!(std::ptr::eq(self, x.builder), "operands of two graphs");
        assert!(std::ptr::eq(self, to.builder), "operands of two graphs");
        let whole = Tensor { raw: x.viewed(), ..x };
        let x = if whole.shape() == x.shape() && x.is_contiguous() { whole } else { x };
        if x.shape() != to.shape() || !self.can_compute_in(x, to) {
            return self.store_in(x, to);
        }
        let (place, offset) = (to.viewed(), to.offset());
        // No operation may read the state, and ggml's allocator makes room for leaves that it was told of.
        self.run(Tensor { raw: place, ..to });
        let mut raw = x.raw;
        // SAFETY: the node is live, has no memory yet, and nothing reads its header meanwhile; the state's is live, and
        // has as many bytes there, in the same order.
        unsafe { (raw.as_mut().view_src, raw.as_mut().view_offs) = (place.as_ptr(), offset) }
        // SAFETY: as before.
        unsafe { raw.as_mut().data = to.raw.as_ref().data }
        self.run(x);
    }

    /// Whether an operation that does not run yet may write its result into a slice of a state: of one layout and on
    /// one device with it, and nothing that runs with the operation reads the state.
    fn can_compute_in(&self, x: Tensor<'_>, to: Tensor<'_>) -> bool {
        let plain = |x: Tensor<'_>| x.is_f32() && x.is_contiguous();
        let is_state = to.is_leaf() && !to.is_weight() && to.offset().is_multiple_of(ALIGNMENT);
        if x.is_leaf() || x.raw != x.viewed() || !is_state || !plain(x) || !plain(to) {
            return false;
        }
        // SAFETY: the graph is live, and every index is below its count.
        let running: BTreeSet<_> = unsafe {
            let n = sys::ggml_graph_n_nodes(self.raw.as_ptr());
            (0..n).map(|i| sys::ggml_graph_node(self.raw.as_ptr(), i)).collect()
        };
        // SAFETY: a state has a buffer, and its type a device.
        let device = |buffer| unsafe {
            sys::ggml_backend_buft_get_device(sys::ggml_backend_buffer_get_type(buffer))
        };
        // SAFETY: a state's header and buffer are live.
        let (home, is_host) = unsafe {
            let buffer = to.viewed().as_ref().buffer;
            (device(buffer), sys::ggml_backend_buffer_is_host(buffer))
        };
        let (mut seen, mut left) = (BTreeSet::new(), vec![x.raw.as_ptr()]);
        while let Some(raw) = left.pop() {
            if running.contains(&raw) && raw != x.raw.as_ptr() || !seen.insert(raw) {
                continue;
            }
            // SAFETY: a graph's nodes and their sources are live.
            let node = unsafe { &*raw };
            for source in node.src.iter().filter_map(|source| NonNull::new(*source)) {
                let source = Tensor { builder: self, raw: source };
                // SAFETY: as before.
                let buffer = unsafe { source.viewed().as_ref() }.buffer;
                let elsewhere =
                    raw == x.raw.as_ptr() && !buffer.is_null() && device(buffer) != home;
                if source.viewed() == to.viewed() || elsewhere {
                    return false;
                }
                left.push(source.raw.as_ptr());
            }
        }
        // SAFETY: as before.
        let is_ours = unsafe { x.raw.as_ref() }.op == sys::GGML_OP_CUSTOM;
        !running.contains(&x.raw.as_ptr()) && !x.is_output() && (!is_ours || is_host)
    }

    /// Makes `x` part of what runs, after everything that was made so before it.
    pub(crate) fn run(&self, x: Tensor<'_>) {
        // SAFETY: the graph has room for as many nodes as the context, which counts them.
        unsafe { sys::ggml_build_forward_expand(self.raw.as_ptr(), x.raw.as_ptr()) }
    }

    /// What our own products of packed weights compute with.
    pub(crate) fn isa_of_weights(&self) -> Option<Isa> {
        self.backend.isa()
    }

    /// What our other kernels compute with, if they are to.
    pub(crate) fn isa(&self) -> Option<Isa> {
        self.backend.isa().filter(|_| self.backend.has_own_kernels())
    }

    /// Keeps something as long as the graph.
    pub(crate) fn keep(&self, what: Box<dyn Any + Send + Sync>) {
        self.kept.borrow_mut().push(what);
    }

    /// Who observes what a weight is multiplied by, if anybody does.
    pub(crate) fn sink(&self, weight: Tensor<'_>) -> Option<Sink> {
        self.sinks.borrow().get(&weight.raw).cloned()
    }

    /// Tells a weight's sink about an output of the graph: contiguous f32.
    pub(crate) fn observe(&self, x: Tensor<'_>, sink: Sink) {
        self.observed.borrow_mut().push(Observed::new(x.raw, x.shape(), sink));
    }

    /// Whether nodes may run on another device than the CPU.
    pub fn has_gpu(&self) -> bool {
        self.backend.host() > 0
    }

    /// The node that looks at `x`, made by `make` if there is none. `None` where there are GPUs: `x` would have to
    /// leave them.
    pub(crate) fn guard<'g>(
        &'g self,
        weight: Tensor<'g>,
        x: Tensor<'g>,
        make: impl FnOnce(Arc<Guard>) -> Tensor<'g>,
    ) -> Option<Tensor<'g>> {
        if self.has_gpu() {
            return None;
        }
        let mut guards = self.guards.borrow_mut();
        let (node, _) = guards.entry(x.raw).or_insert_with(|| {
            let name = self.names.borrow().get(&weight.raw).map(ToString::to_string);
            let guard = Arc::new(Guard::new(name.unwrap_or_default()));
            (make(guard.clone()).raw, guard)
        });
        Some(Tensor { builder: self, raw: *node })
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

    fn leaf(&self, handle: &TensorHandle) -> Tensor<'_> {
        let same = Arc::ptr_eq(&handle.home.backend, &self.backend);
        assert!(same, "a graph's weights and states are on its own backend");
        let mut homes = self.homes.borrow_mut();
        if !homes.iter().any(|home| Arc::ptr_eq(home, &handle.home)) {
            homes.push(handle.home.clone());
        }
        self.leaves.set(self.leaves.get() + 1);
        Tensor { builder: self, raw: handle.raw }
    }
}
