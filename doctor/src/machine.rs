//! The machine: what it has, what is used of it, and how fast it could be.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use openvla::cli::{memory, processor};
use openvla::{Config, Device, Kernels, OftConfig, Options};
use openvla_kernels::{Backend, DType, Gguf, Graph, State, TensorInfo, shape};
use serde::Serialize;

/// What was found, and what is wrong with it in words.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor's name for itself.
    pub cpu: String,
    /// Instructions that kernels are made of, and that it has.
    pub features: Vec<String>,
    /// Whose kernels it computes with.
    pub kernels: String,
    /// All that it could compute with.
    pub kernels_available: Vec<String>,
    /// Cores of the machine.
    pub cores: usize,
    /// Cores that this process may use, by affinity and cgroup.
    pub cores_granted: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Processes that ran or waited in the last minute, on average.
    pub load: Option<f64>,
    /// Bytes that are free, by the system and by the cgroup.
    pub memory_free: Option<u64>,
    /// Bytes of the model's weights.
    pub memory_needed: u64,
    /// The system's setting of transparent huge pages.
    pub huge_pages: Option<String>,
    /// GPUs, each with why it is used or not.
    pub devices: Vec<String>,
    /// NVIDIA's driver, as its kernel module says.
    pub driver: Option<String>,
    /// Bytes read and written per second by a copy that no cache holds.
    pub copy_bytes_per_s: f64,
    /// Operations per second of a large product with an F16 matrix.
    pub product_flop_per_s: f64,
    /// Control steps per second, as far as these two say.
    pub expected_hz: f64,
    /// What is wrong, and what to do.
    pub warnings: Vec<String>,
}

/// Looks at the machine, and measures it for a second or so.
///
/// # Errors
/// If a device that `options` name is missing or fails.
pub fn examine(file: &Gguf, config: &Config, options: &Options) -> Result<Machine> {
    let gpus = options.devices.gpus()?;
    let used: Vec<_> = gpus.iter().map(|gpu| gpu.name.clone()).collect();
    let devices = Device::all();
    let describe = |device: &Device| {
        let (free, total) = device.memory();
        let taken =
            if used.contains(&device.name) { "used" } else { "not used: --device names others" };
        format!(
            "{} ({}), {} of {} free: {taken}",
            device.name,
            device.description,
            gigabytes(free as u64),
            gigabytes(total as u64)
        )
    };
    let backend = Backend::open(&gpus, options.n_threads, options.kernels)?;
    let (copy, product) = (copy(&backend)?, product(&backend)?);
    drop(backend);
    let n_core = online_cores();
    let mut machine = Machine {
        cpu: processor(),
        features: features(),
        kernels: options.kernels.resolve().to_string(),
        kernels_available: Kernels::available().iter().map(Kernels::to_string).collect(),
        cores: n_core,
        cores_granted: std::thread::available_parallelism().map_or(1, usize::from),
        threads: options.n_threads,
        load: read("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok()),
        memory_free: memory::free().map(|bytes| bytes as u64),
        memory_needed: file.tensors().iter().map(|tensor| tensor.range.len() as u64).sum(),
        huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled").map(|text| chosen(&text)),
        devices: devices.iter().map(describe).collect(),
        driver: read("/proc/driver/nvidia/version")
            .and_then(|text| Some(text.lines().next()?.to_owned())),
        copy_bytes_per_s: copy,
        product_flop_per_s: product,
        expected_hz: 1.0 / step_seconds(file, config, copy, product),
        warnings: Vec::new(),
    };
    machine.warnings = warnings(&machine, &devices, options);
    Ok(machine)
}

fn warnings(machine: &Machine, devices: &[Device], options: &Options) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut warn = |is_wrong: bool, why: String| {
        if is_wrong {
            warnings.push(why);
        }
    };
    let Machine { cores, cores_granted, threads, memory_needed, .. } = *machine;
    warn(
        cores_granted < cores,
        format!(
            "{cores_granted} of {cores} cores are granted: look at the cgroup's cpu.max, or taskset"
        ),
    );
    warn(
        threads > cores_granted,
        format!(
            "{threads} threads share {cores_granted} cores and wait for each other: say --threads {cores_granted}"
        ),
    );
    warn(
        threads < cores_granted && devices.is_empty(),
        format!(
            "{threads} threads leave {} cores idle: say --threads {cores_granted}",
            cores_granted.saturating_sub(threads)
        ),
    );
    if let Some(free) = machine.memory_free {
        let why = format!(
            "the weights take {}, and {} are free: convert with fewer bits",
            gigabytes(memory_needed),
            gigabytes(free)
        );
        warn(free < memory_needed && devices.is_empty(), why);
    }
    if let Some(load) = machine.load {
        let why = format!(
            "other programs keep {load:.1} cores busy: steps take longer, and not equally long"
        );
        warn(load > 0.5 * cores as f64, why);
    }
    let is_never = machine.huge_pages.as_deref() == Some("never");
    warn(
        is_never,
        "transparent huge pages are off: weights in small pages are read more slowly".to_owned(),
    );
    let best = Kernels::Fastest.resolve();
    warn(
        options.kernels.resolve() != best,
        format!(
            "{} kernels are taken, {best} would be faster: leave --kernels out",
            machine.kernels
        ),
    );
    if let Some(why) = options.devices.left_alone() {
        warn(true, why.to_string());
    }
    let is_card = Path::new("/dev/nvidia0").exists() || machine.driver.is_some();
    if is_card && devices.is_empty() {
        let why = Device::complaint().unwrap_or_else(|| {
            "this program is built for CPUs alone: --features cuda or vulkan is needed".to_owned()
        });
        warn(true, format!("there is an NVIDIA card that is not used: {why}"));
    }
    warnings
}

/// Bytes for people.
pub fn gigabytes(bytes: u64) -> String {
    if bytes < 100_000_000 {
        format!("{:.1} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.1} GB", bytes as f64 / 1e9)
    }
}

/// Instructions that our kernels and ggml's are made of.
fn features() -> Vec<String> {
    #[cfg(target_arch = "x86_64")]
    let all = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx-vnni", is_x86_feature_detected!("avxvnni")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512-vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512-bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    let all = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
        ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ];
    all.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name.to_owned()).collect()
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The word in brackets: `always [madvise] never`.
fn chosen(text: &str) -> String {
    let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    word.map_or(text.trim(), |(word, _)| word).to_owned()
}

fn online_cores() -> usize {
    let lines = read("/proc/cpuinfo").unwrap_or_default();
    lines.lines().filter(|line| line.starts_with("processor")).count().max(1)
}

/// Numbers that are copied: 64 MiB, more than most caches hold.
const COPIED: usize = 1 << 24;
/// Sides of the matrix, and columns that it is multiplied by.
const SIDE: usize = 2048;
const COLUMNS: usize = 256;
/// The best of these counts.
const ATTEMPTS: usize = 3;

fn copy(backend: &Arc<Backend>) -> Result<f64> {
    let state = || State::zeros(backend, DType::F32, shape(&[COPIED]));
    let (from, to) = (state()?, state()?);
    let mut graph = Graph::build(backend, 4, |g| g.store(g.state(&from), &to))?;
    Ok((2 * 4 * COPIED) as f64 / graph.fastest(ATTEMPTS)?)
}

fn product(backend: &Arc<Backend>) -> Result<f64> {
    let state = |dtype, dims: &[usize]| State::zeros(backend, dtype, shape(dims));
    let matrix = state(DType::F16, &[SIDE, SIDE])?;
    let (x, y) = (state(DType::F32, &[SIDE, COLUMNS])?, state(DType::F32, &[SIDE, COLUMNS])?);
    let mut graph =
        Graph::build(backend, 8, |g| g.store(g.state(&matrix).mul_mat(g.state(&x)), &y))?;
    Ok((2 * SIDE * SIDE * COLUMNS) as f64 / graph.fastest(ATTEMPTS)?)
}

/// Ids of a usual prompt.
const PROMPT: usize = 20;

/// What a step takes at these rates: every matrix times its rows, and for each token after the first, all of the
/// Llama's weights read once.
fn step_seconds(file: &Gguf, config: &Config, bytes_per_s: f64, flop_per_s: f64) -> f64 {
    let oft = config.oft.as_ref();
    let n_patch = config.n_patch() * oft.map_or(1, |oft| oft.cameras.len());
    let n_row = n_patch + PROMPT + oft.map_or(0, OftConfig::n_slot);
    let is_llama = |tensor: &&TensorInfo| tensor.name.starts_with("blk.");
    let rows = |tensor: &TensorInfo| if tensor.name.starts_with("blk.") { n_row } else { n_patch };
    let matrices = file
        .tensors()
        .iter()
        .filter(|t| t.shape[1] > 1 && !t.name.contains("embd") && !t.name.starts_with("output"));
    let flop: f64 =
        matrices.map(|t| 2.0 * t.shape.iter().product::<usize>() as f64 * rows(t) as f64).sum();
    let read: usize = file.tensors().iter().filter(is_llama).map(|tensor| tensor.range.len()).sum();
    let n_token = if oft.is_some() { 0 } else { config.statistics.longest() - 1 };
    // A copy reads and writes; weights are only read, about as fast as both together.
    flop / flop_per_s + (n_token * read) as f64 / bytes_per_s
}
