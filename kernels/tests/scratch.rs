//! Graphs on the CPU alone share the memory between their operations.

mod common;

use std::sync::Arc;

use common::numbers;
use openvla_kernels::{Backend, DType, Error, Graph, Kernels, State, shape};

/// Sums of a state's columns with their norms, again and again, so that several tensors live at once.
struct Chain {
    input: State,
    output: State,
    graph: Graph,
}

impl Chain {
    fn new(backend: &Arc<Backend>, n: usize) -> Self {
        let zeros = || State::zeros(backend, DType::F32, shape(&[64, n])).unwrap();
        let (input, output) = (zeros(), zeros());
        let graph = Graph::build(backend, 64, |g| {
            let x = g.state(&input);
            g.store((0..8).fold(x, |sum, _| (sum + x).norm(1e-6) + x), &output);
        });
        Self { graph: graph.unwrap(), input, output }
    }

    fn compute(&mut self, seed: u64) -> Vec<f32> {
        self.input.write(&numbers(self.input.shape().iter().product(), seed));
        self.graph.compute().unwrap();
        self.output.read()
    }
}

/// What a graph computes on a backend of its own.
fn alone(n: usize, seed: u64) -> Vec<f32> {
    Chain::new(&cpu(), n).compute(seed)
}

fn cpu() -> Arc<Backend> {
    Backend::open(&[], 2, Kernels::default()).unwrap()
}

fn graph_bytes(backend: &Backend) -> usize {
    backend.usage()[0].graphs
}

#[test]
fn they_take_as_much_as_the_largest_and_compute_what_they_compute_alone() {
    let backend = cpu();
    let mut small = Chain::new(&backend, 3);
    let at_first = graph_bytes(&backend);
    assert!(at_first >= 64 * 3 * 4, "{at_first} bytes");
    assert_eq!(small.compute(1), alone(3, 1));

    // Built after it has run, it moves the other's tensors.
    let mut large = Chain::new(&backend, 300);
    let both = graph_bytes(&backend);
    let other = cpu();
    let _large = Chain::new(&other, 300);
    assert!(both > at_first && both == graph_bytes(&other), "{at_first}, then {both} bytes");
    for seed in 2..5 {
        assert_eq!(small.compute(seed), alone(3, seed));
        assert_eq!(large.compute(seed), alone(300, seed));
    }

    drop(large);
    assert_eq!(small.compute(9), alone(3, 9));
    let mut again = Chain::new(&backend, 200);
    assert_eq!(again.compute(9), alone(200, 9));
    assert_eq!(graph_bytes(&backend), both, "what was enough is kept");
}

#[test]
fn they_take_turns_when_threads_run_them() {
    let backend = cpu();
    std::thread::scope(|scope| {
        for n in [1, 40, 90] {
            let backend = &backend;
            scope.spawn(move || {
                for more in 0..20 {
                    assert_eq!(Chain::new(backend, n + more).compute(7), alone(n + more, 7));
                }
            });
        }
    });
}

/// 16 TiB, of products that are all needed at the end. Where Linux promises all that is asked for, it has them.
#[test]
fn what_no_memory_holds_is_an_error_that_leaves_the_others() {
    let promises = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
    if promises.is_ok_and(|mode| mode.trim() == "1") {
        return;
    }
    let backend = cpu();
    let mut chain = Chain::new(&backend, 5);
    let (n, n_product) = (46_340, 2048); // a product of 8 GiB
    let zeros = |dims: &[usize]| State::zeros(&backend, DType::F32, shape(dims)).unwrap();
    let (x, y) = (zeros(&[1, n]), zeros(&[n]));
    let graph = Graph::build(&backend, 4 * n_product, |g| {
        let products: Vec<_> =
            (0..n_product).map(|_| g.state(&x).mul_mat(g.state(&x)).slice(1, 3, 1)).collect();
        g.store(products.into_iter().reduce(|sum, x| x + sum).unwrap(), &y);
    });
    let error = graph.err().expect("it has no room");
    let wanted = n_product * n * n * 4;
    assert!(matches!(error, Error::Memory { bytes, .. } if bytes >= wanted), "{error}");
    assert_eq!(chain.compute(3), alone(5, 3));
}
