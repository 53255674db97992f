//! Matrix products, attention and GELU, ours against ggml's, on one core of the CPU; and how threads wait for
//! each other, on all cores, where other programs want them too.
//!
//! ```sh
//! cargo bench -p openvla-kernels                      # every shape and type
//! cargo bench -p openvla-kernels -- 'Q4_K 4096x4096'
//! cargo bench -p openvla-kernels -- barriers
//! GOMP_SPINCOUNT=300000 cargo bench -p openvla-kernels -- barriers    # as libgomp waits by itself
//! ```
//!
//! Shapes are those of openvla-7b. A product with one column is bound by memory, so its throughput is in
//! bytes of weights; of many, it is in operations: two per weight and column. Times are the processor's,
//! which other programs of the machine do not stretch much, but for barriers the clock's. What was measured is in `SPEED.md`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use openvla_kernels::{
    Backend, DType, Gguf, Graph, Header, Kernels, State, Tensor, Weights, shape,
};

/// Types of weights, and columns and rows of matrices that have it in a Q4_K_M file.
const MATRICES: [(DType, &[[usize; 2]]); 9] = [
    (DType::Q4_K, &[[4096, 4096], [4096, 11008], [11008, 4096]]),
    (DType::Q6_K, &[[4096, 4096], [11008, 4096], [4096, 32064]]),
    (DType::Q8_0, &[[1024, 4096], [1152, 4320], [8704, 4096]]),
    (DType::Q5_K, &[[4096, 4096]]),
    (DType::Q4_0, &[[4096, 4096]]),
    (DType::IQ4_NL, &[[4096, 4096]]),
    (DType::IQ4_XS, &[[4096, 4096]]),
    (DType::BF16, &[[4096, 4096]]),
    (DType::F32, &[[4096, 4096]]),
];

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    for (dtype, sizes) in MATRICES {
        for [k, m] in sizes {
            let mut group = criterion.benchmark_group(format!("{dtype} {k}x{m}"));
            let file = matrix(dtype, *k, *m);
            let weight = &file.bytes()[file.tensors()[0].range.clone()];
            group.throughput(Throughput::Bytes(weight.len() as u64));
            group.bench_function("all are finite", |b| b.iter(|| dtype.first_not_finite(weight)));
            for kernels in [Kernels::Ggml, Kernels::Fastest] {
                for n in [1, 7, 281] {
                    group.throughput(match n {
                        1 => Throughput::Bytes(file.tensors()[0].range.len() as u64),
                        _ => Throughput::Elements(2 * (k * m * n) as u64),
                    });
                    let name = format!("{n} columns, {kernels:?}");
                    bench(&mut group, &name, || product(&file, kernels, n));
                }
            }
        }
    }
    // DINOv2, SigLIP, Llama; the operations of all scores, though the Llama's mask hides half.
    for [d, n_head, n] in [[64, 16, 261], [72, 16, 256], [128, 32, 275]] {
        let mut group = criterion.benchmark_group(format!("attention {d}x{n_head}, {n} rows"));
        group.throughput(Throughput::Elements((4 * n * n * d * n_head) as u64));
        for kernels in [Kernels::Ggml, Kernels::Fastest] {
            bench(&mut group, &format!("{kernels:?}"), || attention(kernels, [d, n_head, n]));
        }
    }
    // An MLP of DINOv2, and of Llama.
    let functions: [(&str, [usize; 2], Function); 2] = [
        ("gelu", [4096, 261], |x, _| x.gelu_erf()),
        ("swiglu", [11008, 275], |gate, up| gate.swiglu(up)),
    ];
    for (name, [k, n], f) in functions {
        let mut group = criterion.benchmark_group(format!("{name} {k}x{n}"));
        group.throughput(Throughput::Elements((k * n) as u64));
        for kernels in [Kernels::Ggml, Kernels::Fastest] {
            bench(&mut group, &format!("{kernels:?}"), || function(kernels, [k, n], f));
        }
        group.finish();
    }
    let mut group = criterion.benchmark_group("barriers");
    let file = matrix(DType::Q4_K, 4096, 4096);
    let n_core = std::thread::available_parallelism().map_or(1, usize::from);
    for (name, n_loop) in [("idle", 0), ("one core busy", 1), ("all cores busy", n_core)] {
        group.bench_function(format!("200 small nodes, {name}"), |b| {
            let mut graph = small_nodes(n_core, 200);
            let _busy = Busy::new(n_loop);
            b.iter(|| graph.compute().unwrap());
        });
        group.bench_function(format!("64 products of a decode step, {name}"), |b| {
            let mut graph = products(&file, n_core, 64);
            let _busy = Busy::new(n_loop);
            b.iter(|| graph.compute().unwrap());
        });
    }
    group.finish();
    criterion.final_summary();
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, make: impl Fn() -> Graph) {
    let mut graph = None;
    group.bench_function(name, |b| {
        let graph = graph.get_or_insert_with(&make);
        b.iter_custom(|times| {
            let start = processor_time();
            (0..times).for_each(|_| graph.compute().unwrap());
            processor_time() - start
        });
    });
}

/// A file with one matrix, whose rows repeat: quantizing takes long.
fn matrix(dtype: DType, k: usize, m: usize) -> Gguf {
    let numbers: Vec<f32> = (0..k * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut rows = vec![0; 32 * dtype.row_bytes(k).unwrap()];
    dtype.encode(&numbers, k, None, &mut rows);
    let mut header = Header::default();
    header.tensor("w", dtype, shape(&[k, m]));
    let file = [header.encode(), rows.repeat(m / 32)].concat();
    Gguf::built_in("w", Box::leak(file.into_boxed_slice())).unwrap()
}

fn product(file: &Gguf, kernels: Kernels, n: usize) -> Graph {
    let backend = Backend::open(&[], 1, kernels).unwrap();
    let mut weights = Weights::placed(file, &backend, &[], &|_| 0).unwrap();
    let [k, m, ..] = file.tensors()[0].shape;
    let weight = weights.take("w", shape(&[k, m])).unwrap();
    let zeros = |dims: &[usize]| State::zeros(&backend, DType::F32, shape(dims)).unwrap();
    let (x, y) = (zeros(&[k, n]), zeros(&[m, n]));
    x.write(&(0..k * n).map(|i| (i as f32 * 0.71).cos()).collect::<Vec<_>>());
    Graph::build(&backend, 16, |g| g.store(g.weight(&weight).mul_mat(g.state(&x)), &y)).unwrap()
}

/// Of a Llama's layer if heads have 128 channels, with a causal mask and keys in f16; else a tower's.
fn attention(kernels: Kernels, [d, n_head, n]: [usize; 3]) -> Graph {
    let backend = Backend::open(&[], 1, kernels).unwrap();
    let zeros = |dtype, dims: &[usize]| State::zeros(&backend, dtype, shape(dims)).unwrap();
    let is_llama = d == 128;
    let dtype = if is_llama { DType::F16 } else { DType::F32 };
    let [q, y] = [0, 1].map(|_| zeros(DType::F32, &[d, n_head, n]));
    let [k, v] = [0, 1].map(|_| zeros(dtype, &[d, n_head, n]));
    let mask = is_llama.then(|| zeros(DType::F16, &[n, n]));
    if let Some(mask) = &mask {
        let seen = |row| (0..n).map(move |at| if at <= row { 0_u16 } else { 0xFC00 });
        mask.write(&(0..n).flat_map(seen).collect::<Vec<_>>());
    }
    q.write(&(0..d * n_head * n).map(|i| (i as f32 * 0.71).cos()).collect::<Vec<_>>());
    Graph::build(&backend, 16, |g| {
        let [q, k, v] = [&q, &k, &v].map(|x| g.state(x).permute([0, 2, 1, 3]));
        let mask = mask.as_ref().map(|mask| g.state(mask));
        g.store(q.flash_attention(k, v, mask, 0.1), &y);
    })
    .unwrap()
}

type Function = for<'g> fn(Tensor<'g>, Tensor<'g>) -> Tensor<'g>;

fn function(kernels: Kernels, dims: [usize; 2], f: Function) -> Graph {
    let backend = Backend::open(&[], 1, kernels).unwrap();
    let [x, up, y] = [0, 1, 2].map(|_| State::zeros(&backend, DType::F32, shape(&dims)).unwrap());
    let n = dims[0] * dims[1];
    x.write(&(0..n).map(|i| 4.0 * (i as f32 * 0.71).cos()).collect::<Vec<_>>());
    up.write(&(0..n).map(|i| (i as f32 * 0.37).cos()).collect::<Vec<_>>());
    Graph::build(&backend, 4, |g| g.store(f(g.state(&x), g.state(&up)), &y)).unwrap()
}

/// Sums of a few numbers each, one after the other.
fn small_nodes(n_thread: usize, n: usize) -> Graph {
    let backend = Backend::open(&[], n_thread, Kernels::Fastest).unwrap();
    let [x, y] = [0, 1].map(|_| State::zeros(&backend, DType::F32, shape(&[256, 64])).unwrap());
    Graph::build(&backend, n + 1, |g| {
        let sum = (0..n).fold(g.state(&x), |sum, _| sum + g.state(&x));
        g.store(sum, &y);
    })
    .unwrap()
}

/// Products of a square matrix and one column, one after the other.
fn products(file: &Gguf, n_thread: usize, n: usize) -> Graph {
    let backend = Backend::open(&[], n_thread, Kernels::Fastest).unwrap();
    let mut weights = Weights::placed(file, &backend, &[], &|_| 0).unwrap();
    let [k, m, ..] = file.tensors()[0].shape;
    let weight = weights.take("w", shape(&[k, m])).unwrap();
    let [x, y] = [0, 1].map(|_| State::zeros(&backend, DType::F32, shape(&[k])).unwrap());
    x.write(&vec![1e-3; k]);
    Graph::build(&backend, 3 * n + 1, |g| {
        let last = (0..n).fold(g.state(&x), |x, _| g.weight(&weight).mul_mat(x.rms_norm(1e-6)));
        g.store(last, &y);
    })
    .unwrap()
}

/// Threads that do nothing but take cores from others, until it is dropped.
struct Busy(Arc<AtomicBool>, Vec<JoinHandle<()>>);

impl Busy {
    fn new(n: usize) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let work = || {
            let is_over = is_over.clone();
            std::thread::spawn(move || while !is_over.load(Ordering::Relaxed) {})
        };
        let threads = (0..n).map(|_| work()).collect();
        Self(is_over, threads)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// What this process has used of the processor.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
