//! What lies between the operations of graphs on several devices, and which device computes what: ggml's scheduler.

use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::device::keep;
use crate::exceptions::{openvla_compute_scheduled, openvla_free_scheduler};
use crate::usage::{Counts, Use};
use crate::{Backend, Error, Result};

/// The scheduler of one graph. It plans once, so that a device sees the same graph at the same addresses every time and
/// can replay it.
pub(crate) struct Scheduler {
    raw: NonNull<sys::ggml_backend_sched>,
    backend: Arc<Backend>,
}

impl Scheduler {
    /// Plans a graph of `size` tensors, and allocates what it computes.
    ///
    /// # Errors
    /// [`Error::Memory`]
    ///
    /// # Safety
    /// The graph must be live, longer than the scheduler, and each node have a device that computes it.
    pub unsafe fn new(
        backend: &Arc<Backend>,
        graph: NonNull<sys::ggml_cgraph>,
        nodes: &[*mut sys::ggml_tensor],
        size: usize,
    ) -> Result<Self> {
        let mut raws = backend.raws();
        let (list, n) = (raws.as_mut_ptr(), i32::try_from(raws.len()).expect("a few devices"));
        // SAFETY: live backends, the CPU last; null selects their own buffer types.
        let raw = unsafe {
            sys::ggml_backend_sched_new(list, std::ptr::null_mut(), n, size, false, false)
        };
        let raw = NonNull::new(raw).expect("ggml allocates its scheduler");
        let scheduler = Self { raw, backend: backend.clone() };
        let host = backend.raw(backend.host());
        let idle = backend.lock();
        // SAFETY: nodes, scheduler and the backend, which the scheduler knows, are live, and nothing runs there
        // meanwhile. Our own functions run on the CPU, whatever a device claims to support.
        let allocated = unsafe {
            for node in nodes.iter().filter(|node| (***node).op == sys::GGML_OP_CUSTOM) {
                sys::ggml_backend_sched_set_tensor_backend(raw.as_ptr(), *node, host);
            }
            sys::ggml_backend_sched_alloc_graph(raw.as_ptr(), graph.as_ptr())
        };
        scheduler.count(Counts::add);
        // SAFETY: as before.
        let result = if allocated { Ok(()) } else { Err(unsafe { scheduler.no_room(graph) }) };
        drop(idle);
        result.map(|()| scheduler)
    }

    /// Runs the graph that this is of.
    ///
    /// # Safety
    /// The graph must be live, and nothing else run on the devices.
    pub unsafe fn compute(&self, graph: NonNull<sys::ggml_cgraph>) -> sys::ggml_status {
        // SAFETY: the scheduler is live and has allocated the graph; the rest is the caller's promise.
        unsafe { openvla_compute_scheduled(self.raw.as_ptr(), graph.as_ptr(), keep) }
    }

    /// The graph could not be allocated: names the device that it needs most of.
    ///
    /// # Safety
    /// As [`Scheduler::compute`].
    unsafe fn no_room(&self, graph: NonNull<sys::ggml_cgraph>) -> Error {
        let mut sizes = vec![0; self.backend.n_device()];
        let (raw, list) = (self.raw.as_ptr(), sizes.as_mut_ptr());
        // SAFETY: scheduler and graph are live, and `sizes` has a number for each device. Nothing is allocated.
        unsafe { sys::ggml_backend_sched_reserve_size(raw, graph.as_ptr(), list) };
        let largest = (0..sizes.len()).max_by_key(|device| sizes[*device]).unwrap_or(0);
        let device = self.backend.name(largest).to_owned();
        Error::Memory { device, what: "a computation".to_owned(), bytes: sizes[largest] }
    }

    /// Bytes of intermediate tensors, by device.
    fn count(&self, change: fn(&Counts, Use, usize)) {
        for device in 0..self.backend.n_device() {
            let (raw, backend) = (self.raw.as_ptr(), self.backend.raw(device));
            // SAFETY: the scheduler is live and knows the backend.
            let bytes = unsafe { sys::ggml_backend_sched_get_buffer_size(raw, backend) };
            change(self.backend.counts(device), Use::Graphs, bytes);
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.count(Counts::subtract);
        // SAFETY: the scheduler is live, and nothing runs there.
        unsafe { openvla_free_scheduler(self.raw.as_ptr()) }
    }
}
