//! Attention and GELU of our own against naive twins: on a machine that has none of our own, both are
//! ggml's, and the same holds of them. More shapes of attention are in `tests/ops.rs`.

mod common;

use common::{cases, numbers};
use openvla_kernels::{Backend, DType, Graph, Kernels, State, shape};
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
            prop_assert!((f64::from(*got) - want).abs() < 2e-6, "{i}: {got}, {want} wanted");
        }
        let others = tower.compute(n_threads, Kernels::Fastest);
        prop_assert_eq!(bits(&got), bits(&others), "{} threads", n_threads);
    }
}

/// A number that is none stays visible, and where it was.
#[test]
fn what_is_not_finite_stays_in_its_row_and_head() {
    let [d, n_head, n] = [16, 3, 40];
    for bad in [f32::NAN, f32::INFINITY] {
        let mut tower = Tower::new([d, n_head, n], 1);
        tower.qkv[((37 * 3) * n_head + 1) * d + 5] = bad; // query 37 of head 1
        let got = tower.compute(2, Kernels::Fastest);
        for (i, out) in got.chunks_exact(d).enumerate() {
            let finite = out.iter().filter(|x| x.is_finite()).count();
            assert_eq!(finite, if i == 37 * n_head + 1 { 0 } else { d }, "{bad}: {i}");
        }
    }
}

fn gelu(x: &[f32], kernels: Kernels) -> Vec<f32> {
    let backend = Backend::open(&[], 2, kernels).unwrap();
    let zeros = || State::zeros(&backend, DType::F32, shape(&[x.len()])).unwrap();
    let (from, to) = (zeros(), zeros());
    from.write(x);
    let mut graph = Graph::build(&backend, 4, |g| g.store(g.state(&from).gelu_erf(), &to)).unwrap();
    graph.compute().unwrap();
    to.read()
}

/// ggml's is libm's `erff`, which is right to the last bit or nearly.
#[test]
fn gelu_is_ggmls() {
    let many = (-200_000..=200_000).map(|i| i as f32 * 1e-4);
    let x: Vec<f32> = many.chain([-0.0, 1e-30, -1e-30, 1e30, -1e30, f32::INFINITY]).collect();
    let (got, want) = (gelu(&x, Kernels::Fastest), gelu(&x, Kernels::Ggml));
    for (x, (got, want)) in x.iter().zip(got.iter().zip(&want)) {
        let limit = 1.2e-7 * x.abs();
        assert!(got == want || (got - want).abs() <= limit, "gelu({x}) is {got}, {want} wanted");
    }
    assert!(gelu(&[1.0, f32::NAN, 2.0], Kernels::Fastest)[1].is_nan());
    assert!((1..40).all(|n| gelu(&x[..n], Kernels::Fastest) == got[..n]), "tails");
}
