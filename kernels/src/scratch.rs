//! What lies between the operations of graphs that run on the CPU alone: one piece of memory, which all of them use in
//! turn. They run one at a time, and what one leaves for another is in states.

use std::collections::BTreeSet;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;
use memmap2::MmapMut;

use crate::exceptions::openvla_compute;
use crate::usage::Use;
use crate::{Backend, Error, Result, device};

/// Memory on a backend's CPU: as much as the graph needs that needs most.
#[derive(Default)]
pub(crate) struct Scratch {
    memory: Option<Memory>,
    /// How often it was allocated.
    n: usize,
}

/// A mapping, since what the allocator gets back it often keeps.
struct Memory {
    buffer: NonNull<sys::ggml_backend_buffer>,
    map: MmapMut,
    /// How many there were before it, and itself.
    generation: usize,
}

// SAFETY: ggml ties no memory to a thread.
unsafe impl Send for Memory {}

impl Memory {
    fn new(bytes: usize, generation: usize) -> Option<Self> {
        let mut map = MmapMut::map_anon(bytes.max(1)).ok()?;
        // SAFETY: the mapping begins with a page and lives as long as the buffer, which does not own it.
        let buffer =
            unsafe { sys::ggml_backend_cpu_buffer_from_ptr(map.as_mut_ptr().cast(), map.len()) };
        Some(Self { buffer: NonNull::new(buffer)?, map, generation })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing else frees it, and graphs use only what `reserve` last gave.
        unsafe { sys::ggml_backend_buffer_free(self.buffer.as_ptr()) }
    }
}

impl Scratch {
    /// At least so many bytes. What was in them is lost if there were fewer.
    fn reserve(&mut self, backend: &Backend, bytes: usize) -> Result<&mut Memory> {
        let counts = backend.counts(backend.host());
        let before = self.memory.as_ref().map_or(0, |memory| memory.map.len());
        if self.memory.is_none() || before < bytes {
            counts.subtract(Use::Graphs, before);
            self.n += 1;
            self.memory = None; // given back first
            self.memory = Memory::new(bytes, self.n);
            counts.add(Use::Graphs, self.memory.as_ref().map_or(0, |memory| memory.map.len()));
        }
        self.memory.as_mut().ok_or_else(|| no_room(backend, bytes))
    }
}

fn no_room(backend: &Backend, bytes: usize) -> Error {
    let device = backend.name(backend.host()).to_owned();
    Error::Memory { device, what: "a computation".to_owned(), bytes }
}

/// Where the tensors of a graph lie in that memory.
pub(crate) struct Offsets {
    /// Bytes from its beginning to that of each.
    tensors: Vec<(NonNull<sys::ggml_tensor>, usize)>,
    bytes: usize,
    /// Of the memory that they point into; before the first, 0.
    generation: usize,
}

impl Offsets {
    /// Asks ggml's allocator, which plans in memory that nothing touches, and reserves as much.
    ///
    /// # Errors
    /// [`Error::Memory`]
    ///
    /// # Safety
    /// The graph must be live, and nothing allocated that it computes.
    pub unsafe fn new(
        backend: &Backend,
        graph: NonNull<sys::ggml_cgraph>,
        nodes: &[*mut sys::ggml_tensor],
    ) -> Result<Self> {
        if nodes.is_empty() {
            return Ok(Self { tensors: vec![], bytes: 0, generation: 0 }); // ggml's allocator would pass null to memset
        }
        let mut scratch = backend.lock();
        // SAFETY: nodes and their sources are live, as is the backend, and the allocator is freed once. Nothing reads
        // the tensors' memory after that: they have none until `compute` gives them some.
        unsafe {
            let sources = nodes.iter().flat_map(|node| (**node).src).filter_map(NonNull::new);
            let tensors = nodes.iter().filter_map(|node| NonNull::new(*node)).chain(sources);
            let left: BTreeSet<_> = tensors.filter(|x| x.as_ref().data.is_null()).collect();
            let buffers = sys::ggml_backend_get_default_buffer_type(backend.raw(backend.host()));
            let allocator = sys::ggml_gallocr_new(buffers);
            let (raw, same, mut bytes) = (graph.as_ptr(), std::ptr::null(), 0);
            sys::ggml_gallocr_reserve_n_size(allocator, raw, same, same, &raw mut bytes);
            let is_planned = sys::ggml_gallocr_reserve(allocator, raw)
                && sys::ggml_gallocr_alloc_graph(allocator, raw);
            let offset = |tensor: NonNull<sys::ggml_tensor>| {
                let base = sys::ggml_backend_buffer_get_base(tensor.as_ref().buffer);
                (tensor, tensor.as_ref().data as usize - base as usize)
            };
            let placed =
                if is_planned { left.iter().copied().map(offset).collect() } else { vec![] };
            for tensor in left {
                (*tensor.as_ptr()).data = std::ptr::null_mut();
                (*tensor.as_ptr()).buffer = std::ptr::null_mut();
            }
            sys::ggml_gallocr_free(allocator);
            if !is_planned {
                return Err(no_room(backend, bytes));
            }
            scratch.reserve(backend, bytes)?;
            Ok(Self { tensors: placed, bytes, generation: 0 })
        }
    }

    /// Runs the graph that this is of.
    ///
    /// # Errors
    /// [`Error::Memory`]
    ///
    /// # Safety
    /// The graph and its tensors must be live.
    pub unsafe fn compute(
        &mut self,
        backend: &Backend,
        scratch: &mut Scratch,
        graph: NonNull<sys::ggml_cgraph>,
    ) -> Result<sys::ggml_status> {
        let Memory { buffer, map, generation } = scratch.reserve(backend, self.bytes)?;
        // SAFETY: the memory is live and as large as the plan, whose tensors are; and nothing else computes.
        unsafe {
            if self.generation != *generation {
                for (tensor, offset) in &self.tensors {
                    (*tensor.as_ptr()).data = map.as_mut_ptr().byte_add(*offset).cast();
                    (*tensor.as_ptr()).buffer = buffer.as_ptr();
                }
                self.generation = *generation;
            }
            Ok(openvla_compute(backend.raw(backend.host()), graph.as_ptr(), device::keep))
        }
    }
}
