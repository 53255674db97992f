//! What this machine is, and what it reaches at best: a copy and large matrix products, on the same
//! backend and threads as the model.

use std::sync::Arc;

use anyhow::{Result, ensure};
use openvla::Options;
use openvla::cli::{processor, value_of};
use openvla_kernels::{Backend, DType, Graph, State, shape};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// What a measurement says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// What was typed.
    pub command: String,
    /// Of the source that the program was built from; "unknown" outside of git.
    pub commit: String,
    /// When it began, in UTC.
    pub date: String,
    /// Where.
    pub machine: Machine,
}

impl Origin {
    /// Of a measurement that begins now, in a program of this name.
    ///
    /// # Errors
    /// If the machine lacks a device that `options` name.
    pub fn now(program: &str, options: &Options) -> Result<Self> {
        let typed = std::iter::once(program.to_owned()).chain(std::env::args().skip(1));
        Ok(Self {
            command: typed.collect::<Vec<_>>().join(" "),
            commit: env!("COMMIT").to_owned(),
            date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            machine: Machine::here(options)?,
        })
    }
}

/// Where a measurement was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The GPUs, or "CPU".
    pub device: String,
    /// The processor's name for itself.
    pub cpu: String,
    /// Kernel, release and architecture.
    pub os: String,
    /// Threads that computed.
    pub threads: usize,
    /// The kernels that the CPU computed with; older results do not say.
    #[serde(default)]
    pub kernels: String,
}

/// What the machine reaches without a model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes read and written per second by a copy that no cache holds.
    pub copy_bytes_per_s: f64,
    /// Operations per second of a large product with an F32 matrix.
    pub product_f32_flop_per_s: f64,
    /// The same with an F16 matrix.
    pub product_f16_flop_per_s: f64,
}

impl Limits {
    /// The faster product. Products of small integers, which quantized files are multiplied by, may
    /// be faster still.
    pub fn flop_per_s(&self) -> f64 {
        self.product_f32_flop_per_s.max(self.product_f16_flop_per_s)
    }
}

impl Machine {
    /// This machine.
    ///
    /// # Errors
    /// If it lacks a device that `options` name.
    pub fn here(options: &Options) -> Result<Self> {
        let gpus = options.devices.gpus()?;
        let names: Vec<_> = gpus.iter().map(|gpu| gpu.description.clone()).collect();
        let uname = rustix::system::uname();
        let words = [uname.sysname(), uname.release(), uname.machine()];
        Ok(Self {
            device: if names.is_empty() { "CPU".to_owned() } else { names.join(" + ") },
            cpu: processor(),
            os: words.map(|word| word.to_string_lossy().into_owned()).join(" "),
            threads: options.n_threads,
            kernels: options.kernels.resolve().to_string(),
        })
    }
}

/// The most memory that this process had so far, in bytes, mapped files among it. Known on Linux.
pub fn peak_bytes() -> Option<u64> {
    let value = value_of("/proc/self/status", "VmHWM")?;
    Some(value.strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Bytes that this process made the system read from a disk so far. Known on Linux.
pub fn disk_bytes() -> Option<u64> {
    value_of("/proc/self/io", "read_bytes")?.parse().ok()
}

/// Milliseconds that all threads of this process have computed so far.
pub fn cpu_ms() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// Numbers that are copied: 256 MiB, more than caches hold.
const COPIED: usize = 1 << 26;
/// In so many tensors: some Vulkan drivers take none of more than 128 MiB.
const PARTS: usize = 4;
/// Sides of the matrix, and columns that it is multiplied by.
const SIDE: usize = 2048;
const COLUMNS: usize = 512;
/// The best of these is the limit.
const ATTEMPTS: usize = 5;

/// Measures the limits of the first device; takes half a gigabyte.
///
/// # Errors
/// If the device has no room or fails.
pub fn limits(options: &Options) -> Result<Limits> {
    let backend = Backend::open(&options.devices.gpus()?, options.n_threads, options.kernels)?;
    let flop = (2 * SIDE * SIDE * COLUMNS) as f64;
    Ok(Limits {
        copy_bytes_per_s: (2 * 4 * COPIED) as f64 / copy(&backend)?,
        product_f32_flop_per_s: flop / product(&backend, DType::F32)?,
        product_f16_flop_per_s: flop / product(&backend, DType::F16)?,
    })
}

fn copy(backend: &Arc<Backend>) -> Result<f64> {
    let state = || State::zeros(backend, DType::F32, shape(&[COPIED / PARTS]));
    let parts: Vec<(State, State)> =
        (0..PARTS).map(|_| Ok((state()?, state()?))).collect::<Result<_>>()?;
    parts.iter().for_each(|(from, _)| from.write(&vec![0.5_f32; COPIED / PARTS]));
    let mut graph = Graph::build(backend, 4 * PARTS, |g| {
        parts.iter().for_each(|(from, to)| g.store(g.state(from), to));
    })?;
    let seconds = graph.fastest(ATTEMPTS)?;
    let is_copied = |(_, to): &(State, State)| to.read::<f32>()[COPIED / PARTS - 1] == 0.5;
    ensure!(
        parts.iter().all(is_copied),
        "the device copied a tensor wrongly: it does not compute as it should"
    );
    Ok(seconds)
}

fn product(backend: &Arc<Backend>, dtype: DType) -> Result<f64> {
    let state = |dtype, dims: &[usize]| State::zeros(backend, dtype, shape(dims));
    let matrix = state(dtype, &[SIDE, SIDE])?;
    match dtype {
        DType::F16 => matrix.write(&vec![0x3800_u16; SIDE * SIDE]), // 0.5
        _ => matrix.write(&vec![0.5_f32; SIDE * SIDE]),
    }
    let x = state(DType::F32, &[SIDE, COLUMNS])?;
    x.write(&vec![0.5_f32; SIDE * COLUMNS]);
    let y = state(DType::F32, &[SIDE, COLUMNS])?;
    let mut graph =
        Graph::build(backend, 8, |g| g.store(g.state(&matrix).mul_mat(g.state(&x)), &y))?;
    let seconds = graph.fastest(ATTEMPTS)?;
    assert_eq!(y.read::<f32>()[0], SIDE as f32 / 4.0, "the product was computed");
    Ok(seconds)
}
