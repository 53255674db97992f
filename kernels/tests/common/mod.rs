//! What the tests share: files in memory, numbers, one operation at a time.

#![allow(dead_code)] // each test binary uses its own part

use std::sync::{Arc, OnceLock};

use openvla_kernels::{
    Backend, Builder, DType, Gguf, Graph, Header, Result, Shape, State, Tensor, Weight, Weights,
    shape,
};
use proptest::test_runner::Config as ProptestConfig;

/// That many cases of a property, or `PROPTEST_CASES` if it is set. A failure prints its input.
pub fn cases(n: u32) -> ProptestConfig {
    ProptestConfig { cases: n, failure_persistence: None, ..ProptestConfig::default() }
}

/// A whole file: the header, and every byte of data told by its place.
pub fn file(header: &Header) -> Vec<u8> {
    let mut bytes = header.encode();
    bytes.extend((0..header.data_bytes()).map(|i| (i % 251) as u8));
    bytes
}

/// Reads a file that only exists in memory.
pub fn read(bytes: &[u8]) -> Result<Gguf> {
    Gguf::built_in("test.gguf", Box::leak(bytes.to_vec().into_boxed_slice()))
}

/// Bytes of a tensor's data.
pub fn data_bytes(dtype: DType, shape: Shape) -> usize {
    dtype.row_bytes(shape[0]).unwrap() * shape[1..].iter().product::<usize>()
}

pub fn backend() -> &'static Arc<Backend> {
    static BACKEND: OnceLock<Arc<Backend>> = OnceLock::new();
    BACKEND.get_or_init(|| Backend::cpu(2).unwrap())
}

/// Numbers in -1..1 that look random: a linear congruence, its high bits.
pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// FNV-1a of the numbers' bits.
pub fn hash(x: &[f32]) -> u64 {
    let bytes = x.iter().flat_map(|x| x.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A zeroed state.
pub fn zeros(dtype: DType, dims: &[usize]) -> State {
    State::zeros(backend(), dtype, shape(dims)).unwrap()
}

/// Row numbers below a bound, all zero.
pub fn ids(dtype: DType, n: usize, below: usize) -> State {
    State::ids(backend(), dtype, n, below).unwrap()
}

/// A state of f32.
pub fn state(dims: &[usize], data: &[f32]) -> State {
    let state = zeros(DType::F32, dims);
    assert_eq!(data.len(), dims.iter().product::<usize>());
    state.write(data);
    state
}

/// A weight of any type, from a file of its own; and the numbers that it stands for after rounding.
pub fn weight(dtype: DType, dims: &[usize], data: &[f32]) -> (Weight, Vec<f32>) {
    let mut header = Header::default();
    header.tensor("w", dtype, shape(dims));
    let mut bytes = vec![0; data_bytes(dtype, shape(dims))];
    dtype.encode(data, dims[0], None, &mut bytes);
    let rounded = dtype.decode(&bytes);
    let mut file = header.encode();
    file.extend(bytes);
    let mut weights = Weights::load(&read(&file).unwrap(), backend()).unwrap();
    (weights.take("w", shape(dims)).unwrap(), rounded)
}

/// Builds and runs a graph that ends in one result of f32.
pub fn compute(out: &[usize], build: impl for<'g> FnOnce(&'g Builder) -> Tensor<'g>) -> Vec<f32> {
    let result = zeros(DType::F32, out);
    let mut graph = Graph::build(backend(), 16, |g| g.store(build(g), &result)).unwrap();
    graph.compute().unwrap();
    result.read()
}

/// The root mean square of the difference, over that of what is wanted, is at most `limit`.
pub fn assert_close(what: &str, got: &[f32], want: &[f64], limit: f64) {
    assert_eq!(got.len(), want.len(), "{what}: numbers of elements");
    let wrong: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum();
    let error = (wrong / want.iter().map(|w| w * w).sum::<f64>()).sqrt();
    assert!(error <= limit, "{what}: error {error:.1e} > {limit:.0e}; {got:?}, {want:?} wanted");
}
