//! Products of quantised matrices with activations, ours against ggml's, on one core of the CPU.
//!
//! ```sh
//! cargo bench -p openvla-kernels                      # every shape and type
//! cargo bench -p openvla-kernels -- 'Q4_K 4096x4096'
//! ```
//!
//! Shapes are those of openvla-7b. One column is bound by memory, so its throughput is in bytes of
//! weights; of many, it is in operations: two per weight and column. Times are the processor's, which
//! other programs of the machine do not stretch much. What was measured is in `SPEED.md`.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use openvla_kernels::{Backend, DType, Gguf, Graph, Header, Products, State, Weights, shape};

/// Types of weights, and columns and rows of matrices that have it in a Q4_K_M file.
const MATRICES: [(DType, &[[usize; 2]]); 7] = [
    (DType::Q4_K, &[[4096, 4096], [4096, 11008], [11008, 4096]]),
    (DType::Q6_K, &[[4096, 4096], [11008, 4096], [4096, 32064]]),
    (DType::Q8_0, &[[1024, 4096], [1152, 4320], [8704, 4096]]),
    (DType::Q5_K, &[[4096, 4096]]),
    (DType::Q4_0, &[[4096, 4096]]),
    (DType::IQ4_NL, &[[4096, 4096]]),
    (DType::IQ4_XS, &[[4096, 4096]]),
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
            for products in [Products::Ggml, Products::Fastest] {
                for n in [1, 7, 281] {
                    group.throughput(match n {
                        1 => Throughput::Bytes(file.tensors()[0].range.len() as u64),
                        _ => Throughput::Elements(2 * (k * m * n) as u64),
                    });
                    let mut graph = None;
                    group.bench_function(format!("{n} columns, {products:?}"), |b| {
                        let graph = graph.get_or_insert_with(|| product(&file, products, n));
                        b.iter_custom(|times| {
                            let start = processor_time();
                            (0..times).for_each(|_| graph.compute().unwrap());
                            processor_time() - start
                        });
                    });
                }
            }
        }
    }
    criterion.final_summary();
}

/// A file with one matrix, whose rows repeat: quantising takes long.
fn matrix(dtype: DType, k: usize, m: usize) -> Gguf {
    let numbers: Vec<f32> = (0..k * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut rows = vec![0; 32 * dtype.row_bytes(k).unwrap()];
    dtype.encode(&numbers, k, None, &mut rows);
    let mut header = Header::default();
    header.tensor("w", dtype, shape(&[k, m]));
    let file = [header.encode(), rows.repeat(m / 32)].concat();
    Gguf::built_in("w", Box::leak(file.into_boxed_slice())).unwrap()
}

fn product(file: &Gguf, products: Products, n: usize) -> Graph {
    let backend = Backend::open(&[], 1, products).unwrap();
    let mut weights = Weights::placed(file, &backend, &[], &|_| 0).unwrap();
    let [k, m, ..] = file.tensors()[0].shape;
    let weight = weights.take("w", shape(&[k, m])).unwrap();
    let zeros = |dims: &[usize]| State::zeros(&backend, DType::F32, shape(dims)).unwrap();
    let (x, y) = (zeros(&[k, n]), zeros(&[m, n]));
    x.write(&(0..k * n).map(|i| (i as f32 * 0.71).cos()).collect::<Vec<_>>());
    Graph::build(&backend, 16, |g| g.store(g.weight(&weight).mul_mat(g.state(&x)), &y)).unwrap()
}

/// What this process has used of the processor.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
