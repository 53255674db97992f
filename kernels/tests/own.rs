//! Products of floats, attention, GELU and SwiGLU against naive twins, and our own bit for bit against each other: with
//! every set of kernels that this CPU has the instructions for. Where none of ours runs, ggml's are held
//! to the same, as far as ggml does not round. More shapes of attention are in `tests/ops.rs`; products of quantized
//! matrices in `tests/panels.rs`.

mod common;

use std::sync::Arc;

use common::{cases, data_bytes, hash, numbers, read};
use openvla_kernels::{
    Backend, DType, Graph, Header, Kernels, State, Tensor, Weight, Weights, shape,
};
use proptest::prelude::*;

/// Queries, keys and values as a tower has them: `[d, n_head, 3, n]`.
struct Tower {
    d: usize,
    n_head: usize,
    n: usize,
    qkv: Vec<f32>,
}

impl Tower {
    fn new([d, n_head, n]: [usize; 3], seed: u64) -> Self {
        let qkv = numbers(d * n_head * 3 * n, seed).iter().map(|x| 2.0 * x).collect();
        Self { d, n_head, n, qkv }
    }

    /// `[d, n_head, n]`
    fn compute(&self, n_threads: usize, kernels: Kernels) -> Vec<f32> {
        let Self { d, n_head, n, .. } = *self;
        let backend = Backend::open(&[], n_threads, kernels).unwrap();
        let zeros = |dims: &[usize]| State::zeros(&backend, DType::F32, shape(dims)).unwrap();
        let (qkv, out) = (zeros(&[d, n_head, 3, n]), zeros(&[d, n_head, n]));
        qkv.write(&self.qkv);
        let mut graph = Graph::build(&backend, 16, |g| {
            let part = |i| g.state(&qkv).slice(2, i, 1).permute([0, 2, 3, 1]);
            let [q, k, v] = [0, 1, 2].map(part);
            g.store(q.flash_attention(k, v, None, (d as f32).sqrt().recip()), &out);
        })
        .unwrap();
        graph.compute().unwrap();
        out.read()
    }

    fn row(&self, part: usize, row: usize, head: usize) -> &[f32] {
        &self.qkv[((row * 3 + part) * self.n_head + head) * self.d..][..self.d]
    }

    fn twin(&self) -> Vec<f64> {
        let Self { d, n_head, n, .. } = *self;
        let mut out = vec![0.0; d * n_head * n];
        for (i, out) in out.chunks_exact_mut(d).enumerate() {
            let (row, head) = (i / n_head, i % n_head);
            let score = |at: usize| {
                let pairs = self.row(0, row, head).iter().zip(self.row(1, at, head));
                let dot: f64 = pairs.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                (dot / (d as f64).sqrt()).exp()
            };
            let scores: Vec<f64> = (0..n).map(score).collect();
            let total: f64 = scores.iter().sum();
            for (at, score) in scores.iter().enumerate() {
                let values = out.iter_mut().zip(self.row(2, at, head));
                values.for_each(|(out, v)| *out += score / total * f64::from(*v));
            }
        }
        out
    }
}

/// Our own that this CPU has the instructions for, or ggml's.
fn own() -> Vec<Kernels> {
    let all = Kernels::available();
    if all.len() > 1 { all[..all.len() - 1].to_vec() } else { all }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn attention_is_the_twins_on_any_number_of_threads(
        d in 1_usize..18,
        n_head in 1_usize..5,
        n in prop_oneof![30_usize..70, Just(256), Just(261)],
        n_threads in 2_usize..6,
        seed in any::<u64>(),
    ) {
        let tower = Tower::new([8 * d, n_head, n], seed);
        let got = tower.compute(1, Kernels::Fastest);
        for (i, (got, want)) in got.iter().zip(tower.twin()).enumerate() {
            prop_assert!((f64::from(*got) - want).abs() < 1e-5, "{i}: {got}, {want} wanted");
        }
        for kernels in own() {
            let others = tower.compute(n_threads, kernels);
            prop_assert_eq!(bits(&got), bits(&others), "{} threads, {}", n_threads, kernels);
        }
    }
}

/// A file with a matrix `w [k, m]` of a type.
fn matrix(dtype: DType, [k, m]: [usize; 2], seed: u64) -> Vec<u8> {
    let mut header = Header::default();
    header.tensor("w", dtype, shape(&[k, m]));
    let mut data = vec![0; data_bytes(dtype, shape(&[k, m]))];
    dtype.encode(&numbers(k * m, seed), k, None, &mut data);
    [header.encode(), data].concat()
}

fn take(file: &[u8], sizes: [usize; 2], backend: &Arc<Backend>) -> Weight {
    let mut weights = Weights::placed(&read(file).unwrap(), backend, &[], &|_| 0).unwrap();
    weights.take("w", shape(&sizes)).unwrap()
}

/// `w [k, m]` of a type, times `x [k, n]`: two products of one input, the second of which must be the same.
fn product(
    file: &[u8],
    [k, m, n]: [usize; 3],
    x: &[f32],
    n_threads: usize,
    kernels: Kernels,
) -> Vec<f32> {
    let backend = Backend::open(&[], n_threads, kernels).unwrap();
    let weight = take(file, [k, m], &backend);
    let zeros = |dims: &[usize]| State::zeros(&backend, DType::F32, shape(dims)).unwrap();
    let (input, first, second) = (zeros(&[k, n]), zeros(&[m, n]), zeros(&[m, n]));
    input.write(x);
    let mut graph = Graph::build(&backend, 16, |g| {
        let x = g.state(&input) + g.state(&input);
        g.store(g.weight(&weight).mul_mat(x), &first);
        g.store(g.weight(&weight).mul_mat(x), &second);
    })
    .unwrap();
    graph.compute().unwrap();
    assert_eq!(bits(&first.read::<f32>()), bits(&second.read::<f32>()));
    first.read()
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn products_of_floats_are_the_twins_on_any_number_of_threads(
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        k in 1_usize..400,
        m in 1_usize..100,
        n in 1_usize..60,
        n_threads in 2_usize..6,
        seed in any::<u64>(),
    ) {
        let file = matrix(dtype, [k, m], seed);
        let data = file.len() - data_bytes(dtype, shape(&[k, m]));
        let (w, x) = (dtype.decode(&file[data..]), numbers(k * n, !seed));
        let got = product(&file, [k, m, n], &x, 1, Kernels::Fastest);
        // Where there are few columns, ggml rounds them to the matrix's type.
        let limit = if dtype == DType::F32 { 1e-6 } else { 1e-2 };
        for (i, got) in got.iter().enumerate() {
            let pairs = || w[i % m * k..][..k].iter().zip(&x[i / m * k..][..k]);
            let want: f64 = pairs().map(|(w, x)| 2.0 * f64::from(*w) * f64::from(*x)).sum();
            let size: f64 = pairs().map(|(w, x)| 2.0 * f64::from((w * x).abs())).sum();
            let error = (f64::from(*got) - want).abs();
            prop_assert!(error <= limit * size + 1e-30, "{dtype} {i}: {got}, {want} wanted");
        }
        for kernels in own() {
            let others = product(&file, [k, m, n], &x, n_threads, kernels);
            prop_assert_eq!(bits(&got), bits(&others), "{} threads, {}", n_threads, kernels);
        }
    }
}

/// A number that is not finite stays visible, in its row and head.
#[test]
fn what_is_not_finite_stays_in_its_row_and_head() {
    let [d, n_head, n] = [16, 3, 40];
    let kernels = Kernels::available().into_iter();
    for (kernels, bad) in kernels.flat_map(|k| [(k, f32::NAN), (k, f32::INFINITY)]) {
        let mut tower = Tower::new([d, n_head, n], 1);
        tower.qkv[((37 * 3) * n_head + 1) * d + 5] = bad; // query 37 of head 1
        let got = tower.compute(2, kernels);
        for (i, out) in got.chunks_exact(d).enumerate() {
            let finite = out.iter().filter(|x| x.is_finite()).count();
            let wanted = if i == 37 * n_head + 1 { 0 } else { d };
            assert_eq!(finite, wanted, "{kernels:?} {bad}: {i}");
        }
    }
}

/// A function of the numbers at one place of two lists.
type Function = fn(&[f32], &[f32], Kernels) -> Vec<f32>;

fn gelu(x: &[f32], by: &[f32], kernels: Kernels) -> Vec<f32> {
    values([x, by], kernels, |x, _| x.gelu_erf())
}

fn swiglu(gate: &[f32], up: &[f32], kernels: Kernels) -> Vec<f32> {
    values([gate, up], kernels, |gate, up| gate.swiglu(up))
}

fn values(
    data: [&[f32]; 2],
    kernels: Kernels,
    f: impl for<'g> Fn(Tensor<'g>, Tensor<'g>) -> Tensor<'g>,
) -> Vec<f32> {
    let backend = Backend::open(&[], 2, kernels).unwrap();
    let [x, y, to] =
        [0, 1, 0].map(|i| State::zeros(&backend, DType::F32, shape(&[data[i].len()])).unwrap());
    x.write(data[0]);
    y.write(data[1]);
    let mut graph =
        Graph::build(&backend, 4, |g| g.store(f(g.state(&x), g.state(&y)), &to)).unwrap();
    graph.compute().unwrap();
    to.read()
}

/// ggml's are of libm's `erff` and `expf`, which are right to the last bit or nearly.
#[test]
fn functions_are_ggmls() {
    const ENDS: [f32; 10] =
        [-0.0, 1e-30, -1e-30, 1e30, -1e30, -87.4, -88.8, -104.0, f32::MIN, f32::INFINITY];
    let x: Vec<f32> = (-200_000..=200_000).map(|i| i as f32 * 1e-4).chain(ENDS).collect();
    let by: Vec<f32> = numbers(x.len(), 3).iter().map(|x| 3.0 * x).collect();
    // A GELU's last bits are relative to its operand; a SwiGLU of gates below -88 is as good as 0.
    let limits: [fn(f32, f32) -> f32; 2] =
        [|x, _| 1.2e-7 * x.abs(), |_, want| 6e-7 * want.abs() + 1e-36];
    let functions: [Function; 2] = [gelu, swiglu];
    for (f, limit) in functions.into_iter().zip(limits) {
        let (got, want) = (f(&x, &by, Kernels::Fastest), f(&x, &by, Kernels::Ggml));
        for (x, (got, want)) in x.iter().zip(got.iter().zip(&want)) {
            let is_close = got == want || (got - want).abs() <= limit(*x, *want);
            assert!(is_close, "of {x}: {got}, {want} wanted");
        }
        for kernels in own() {
            assert_eq!(bits(&got), bits(&f(&x, &by, kernels)), "{kernels}");
        }
        let is_first = |n| f(&x[..n], &by[..n], Kernels::Fastest) == got[..n];
        assert!((1..40).all(is_first), "tails");
        for kernels in Kernels::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let got = f(&[1.0, bad, 2.0], &[1.0; 3], kernels);
                let finite = got.iter().map(|x| x.is_finite());
                assert!(finite.eq([true, false, true]), "{kernels}: of {bad} {got:?}");
            }
        }
    }
    let by_nan = |kernels: &_| swiglu(&[-200.0], &[f32::NAN], *kernels)[0].is_nan();
    assert!(Kernels::available().iter().all(by_nan));
}

/// A product that computes what it is multiplied by while it packs it is the product of the values to the last bit.
#[test]
fn products_of_functions_are_those_of_their_values() {
    let functions: [for<'g> fn([Tensor<'g>; 2]) -> Tensor<'g>; 2] =
        [|[x, _]| x.gelu_erf(), |[gate, up]| gate.swiglu(up)];
    for (kernels, f) in Kernels::available().into_iter().flat_map(|k| functions.map(|f| (k, f))) {
        for (dtype, [k, m, n]) in [(DType::Q4_K, [512, 40, 1]), (DType::Q8_0, [288, 33, 7])] {
            let backend = Backend::open(&[], 2, kernels).unwrap();
            let weight = take(&matrix(dtype, [k, m], 1), [k, m], &backend);
            let zeros = |dims: &[usize]| State::zeros(&backend, DType::F32, shape(dims)).unwrap();
            let ([x, y], values) = ([0, 1].map(|_| zeros(&[k, n])), zeros(&[k, n]));
            let [of_function, of_values] = [0, 1].map(|_| zeros(&[m, n]));
            x.write(&numbers(k * n, 2));
            y.write(&numbers(k * n, 3));
            let mut graph = Graph::build(&backend, 32, |g| {
                let operands = || [&x, &y].map(|x| g.state(x) + g.state(x));
                g.store(g.weight(&weight).mul_mat(f(operands())), &of_function);
                g.store(f(operands()), &values);
                g.store(g.weight(&weight).mul_mat(g.state(&values)), &of_values);
            })
            .unwrap();
            graph.compute().unwrap();
            let [got, want] = [of_function, of_values].map(|out| bits(&out.read()));
            assert_eq!(got, want, "{dtype} {kernels}");
        }
    }
}

/// Our own compute these bits on every machine, whose sets of kernels cannot be compared with each other.
#[test]
fn our_own_have_the_same_bits_everywhere() {
    const HASHES: [u64; 4] = [
        0x5200_8947_4a7a_344b,
        0xcd8c_3fca_bf01_2d6b,
        0x6e32_0f19_296c_2ead,
        0x5ce2_6fa9_5ecf_3429,
    ];
    let [k, m, n] = [300, 53, 20];
    let file = matrix(DType::F16, [k, m], 1);
    let x: Vec<f32> = (-2000..2000).map(|i| i as f32 * 5e-3).collect();
    for kernels in Kernels::available().into_iter().filter(|k| *k != Kernels::Ggml) {
        let got = [
            Tower::new([40, 3, 70], 1).compute(2, kernels),
            product(&file, [k, m, n], &numbers(k * n, 2), 2, kernels),
            gelu(&x, &x, kernels),
            swiglu(&x, &numbers(x.len(), 3), kernels),
        ];
        let got = got.map(|x| hash(&x));
        assert_eq!(got, HASHES, "{kernels}: {got:#018x?}");
    }
}
