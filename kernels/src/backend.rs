//! What a model runs on: GPUs, if any, and the CPU, which takes what they leave.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use llama_cpp_sys_2 as sys;

use crate::device::{keep, start};
use crate::exceptions::{openvla_free, openvla_start};
use crate::own::isa::Isa;
use crate::scratch::Scratch;
use crate::usage::{Counts, Use};
use crate::{Device, Error, Kernels, Result, Usage, threads};

/// Devices that own memory and compute together. Values of this type prove that ggml has started.
pub struct Backend {
    /// One computation or transfer at a time: ggml's backends are not made for two. Graphs of the CPU alone use this
    /// memory in turn.
    gate: Mutex<Scratch>,
    /// GPUs in the order they were named, then the CPU.
    devices: Vec<OpenDevice>,
    n_threads: usize,
    /// What our own kernels compute with, if they are to.
    isa: Option<Isa>,
}

/// A device of a [`Backend`].
struct OpenDevice {
    raw: NonNull<sys::ggml_backend>,
    name: String,
    counts: Counts,
}

// SAFETY: ggml ties no backend to a thread, and every use of `raw` that changes anything happens
// under the gate.
unsafe impl Send for OpenDevice {}
// SAFETY: as above.
unsafe impl Sync for OpenDevice {}

impl Backend {
    /// The CPU alone, with that many threads.
    ///
    /// # Errors
    /// As [`Backend::open`].
    pub fn cpu(n_threads: usize) -> Result<Arc<Self>> {
        Self::open(&[], n_threads, Kernels::default())
    }

    /// GPUs, and the CPU with that many threads and those functions.
    ///
    /// # Errors
    /// [`Error::Device`] if one of them cannot be used, the CPU because this build or these kernels are for
    /// newer ones or because the system does not start that many threads.
    pub fn open(gpus: &[Device], n_threads: usize, kernels: Kernels) -> Result<Arc<Self>> {
        start()?;
        // SAFETY: ggml has started.
        let cpu = unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) };
        if cpu.is_null() {
            let why = "ggml's CPU module (libggml-cpu-*.so) is not beside the program".to_owned();
            return Err(Error::Device { device: "CPU".into(), why });
        }
        let isa = kernels.isa();
        if isa.is_none() && !matches!(kernels, Kernels::Fastest | Kernels::Ggml) {
            let available: Vec<_> = Kernels::available().iter().map(|k| k.name()).collect();
            let why = format!(
                "it lacks the instructions of the {kernels} kernels; take one of {}",
                available.join(", ")
            );
            return Err(Error::Device { device: "CPU".into(), why });
        }
        let devices = gpus.iter().map(Device::raw).chain([cpu]);
        let devices = devices.map(OpenDevice::new).collect::<Result<_>>()?;
        let n_threads = n_threads.clamp(1, 512);
        // OpenMP starts them at the first graph, and ends the process where it cannot.
        let startable = 1 + threads::startable(n_threads - 1);
        if startable < n_threads {
            let why = format!(
                "only {startable} of {n_threads} threads can be started here; take fewer with \
                 --threads, or raise `ulimit -u` or the container's limit on processes"
            );
            return Err(Error::Device { device: "CPU".into(), why });
        }
        let backend = Self { devices, n_threads, isa, gate: Mutex::default() };
        backend.set_threads();
        Ok(Arc::new(backend))
    }

    /// How many devices it has: the GPUs, then the CPU.
    pub fn n_device(&self) -> usize {
        self.devices.len()
    }

    /// A device's name for messages.
    ///
    /// # Panics
    /// If there are fewer devices.
    pub fn name(&self, device: usize) -> &str {
        &self.devices[device].name
    }

    /// What is allocated on each device now.
    pub fn usage(&self) -> Vec<Usage> {
        let usage = |OpenDevice { name, counts, .. }: &OpenDevice| Usage {
            device: name.clone(),
            weights: counts.get(Use::Weights),
            states: counts.get(Use::States),
            graphs: counts.get(Use::Graphs),
        };
        self.devices.iter().map(usage).collect()
    }

    pub(crate) fn counts(&self, device: usize) -> &Counts {
        &self.devices[device].counts
    }

    /// The CPU's place among the devices: the last.
    pub(crate) fn host(&self) -> usize {
        self.devices.len() - 1
    }

    /// Through the registry, since a CPU backend that was loaded at run time exports nothing else.
    fn set_threads(&self) {
        type SetThreads = unsafe extern "C" fn(sys::ggml_backend_t, i32);
        if let Some(found) = self.host_function(c"ggml_backend_set_n_threads") {
            // SAFETY: under this name a registry gives a function of exactly this type
            // (`ggml_backend_set_n_threads_t` in ggml-backend.h).
            let set = unsafe { std::mem::transmute::<NonNull<c_void>, SetThreads>(found) };
            let n = i32::try_from(self.n_threads).expect("512 fits");
            // SAFETY: a live backend of that registry.
            unsafe { set(self.raw(self.host()), n) };
        }
    }

    /// Threads that the CPU computes with.
    pub(crate) fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// What our own products of quantized weights compute with on the CPU, if they are to.
    pub(crate) fn isa(&self) -> Option<Isa> {
        self.isa
    }

    /// Whether our own kernels compute all that there are: on a CPU that has the instructions, and no GPU
    /// besides it, where all but products would be.
    pub fn has_own_kernels(&self) -> bool {
        self.isa.is_some() && self.host() == 0
    }

    pub(crate) fn device(&self, device: usize) -> sys::ggml_backend_dev_t {
        // SAFETY: a live backend; ggml never frees devices.
        unsafe { sys::ggml_backend_get_device(self.raw(device)) }
    }

    /// What the CPU's registry has under a name, whose type its header says.
    pub(crate) fn host_function(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the device and its registry, which ggml never frees, are live.
        NonNull::new(unsafe {
            let registry = sys::ggml_backend_dev_backend_reg(self.device(self.host()));
            sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr())
        })
    }

    pub(crate) fn raw(&self, device: usize) -> sys::ggml_backend_t {
        self.devices[device].raw.as_ptr()
    }

    /// All of them, the CPU last.
    pub(crate) fn raws(&self) -> Vec<sys::ggml_backend_t> {
        self.devices.iter().map(|device| device.raw.as_ptr()).collect()
    }

    /// Waits for the devices to be idle and keeps them so. A panic elsewhere leaves nothing broken
    /// that the next graph does not write anew, so a poisoned lock is as good as a clean one.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Scratch> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenDevice {
    fn new(device: sys::ggml_backend_dev_t) -> Result<Self> {
        // SAFETY: a device of the registry, whose name is a C string that lives as long.
        let (name, raw) = unsafe {
            let name = CStr::from_ptr(sys::ggml_backend_dev_name(device));
            let raw = openvla_start(device, keep);
            (name.to_string_lossy().into_owned(), raw)
        };
        let why = || Device::complaint().unwrap_or_else(|| "ggml cannot start it".to_owned());
        match NonNull::new(raw) {
            Some(raw) => Ok(Self { raw, name, counts: Counts::default() }),
            None => Err(Error::Device { device: name, why: why() }),
        }
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        // SAFETY: everything allocated on the backend holds an `Arc` of it, so nothing is left.
        unsafe { openvla_free(self.raw.as_ptr()) }
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.devices.iter().map(|device| &device.name)).finish()
    }
}
