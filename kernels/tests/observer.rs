//! What an observer sees: the squares of everything that its weights are multiplied by, and nothing
//! else; and that graphs do not notice.

mod common;

use std::collections::BTreeMap;

use common::{backend, numbers, read, state, zeros};
use openvla_kernels::{DType, Graph, Header, Squares, Weight, Weights, shape};

const N_IN: usize = 32;

/// A file with two matrices `[32, 3]` and a scale `[32]`.
fn weights() -> Weights {
    let mut header = Header::default();
    let mut data = Vec::new();
    for (name, dtype, n_row) in
        [("a", DType::F32, 3), ("b", DType::Q8_0, 3), ("scale", DType::F32, 1)]
    {
        header.tensor(name, dtype, shape(&[N_IN, n_row]));
        let mut bytes = vec![0; n_row * dtype.row_bytes(N_IN).unwrap()];
        dtype.encode(&numbers(n_row * N_IN, data.len() as u64), N_IN, None, &mut bytes);
        bytes.resize(bytes.len().next_multiple_of(openvla_kernels::ALIGNMENT), 0);
        data.extend(bytes);
    }
    Weights::load(&read(&[header.encode(), data].concat()).unwrap(), backend()).unwrap()
}

fn take(w: &mut Weights) -> [Weight; 3] {
    [("a", 3), ("b", 3), ("scale", 1)].map(|(name, n)| w.take(name, shape(&[N_IN, n])).unwrap())
}

/// Sums of squares by column, added up in the order of the rows.
fn squares(batches: &[&[f32]]) -> Squares {
    let mut sums = vec![0.0; N_IN];
    let rows: Vec<f32> = batches.concat();
    for (i, x) in rows.iter().enumerate() {
        sums[i % N_IN] += f64::from(*x) * f64::from(*x);
    }
    Squares { sums, n_row: (rows.len() / N_IN) as u64 }
}

#[test]
fn sums_are_those_of_every_row_of_every_graph() {
    let mut w = weights();
    let observer = w.observe();
    let [a, b, _] = take(&mut w);
    assert!(observer.squares().is_empty(), "nothing was multiplied yet");
    let data = [numbers(5 * N_IN, 1), numbers(N_IN, 2), numbers(5 * N_IN, 3)];
    let (five, one) = (state(&[N_IN, 5], &data[0]), state(&[N_IN], &data[1]));
    let (out, single) = (zeros(DType::F32, &[3, 5]), zeros(DType::F32, &[3]));
    let mut many = Graph::build(backend(), 8, |g| {
        let x = g.state(&five);
        g.store(g.weight(&a).mul_mat(x) + g.weight(&b).mul_mat(x), &out);
    })
    .unwrap();
    let mut few = Graph::build(backend(), 8, |g| {
        g.store(g.weight(&a).mul_mat(g.state(&one)), &single);
    })
    .unwrap();
    many.compute().unwrap();
    few.compute().unwrap();
    five.write(&data[2]);
    many.compute().unwrap();
    let want = [
        ("a".to_owned(), squares(&[&data[0], &data[1], &data[2]])),
        ("b".to_owned(), squares(&[&data[0], &data[2]])),
    ];
    assert_eq!(observer.squares(), BTreeMap::from(want), "in f64, so to the last bit");
}

/// Ten products one after the other, whose inputs' memory ggml would use again, and views.
fn chain(a: &Weight, scale: &Weight, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (input, output) = (state(&[N_IN, 4], x), zeros(DType::F32, &[3, 4]));
    let last = zeros(DType::F32, &[N_IN, 4]);
    let mut graph = Graph::build(backend(), 256, |g| {
        let mut x = g.state(&input);
        for _ in 0..10 {
            x = x.norm(1e-5) * g.weight(scale);
            let y = g.weight(a).mul_mat(x.reshape(&[N_IN, 4])); // [3, 4]
            x = x + y.slice(0, 0, 1) + y.slice(0, 2, 1);
        }
        g.store(x, &last);
        g.store(g.weight(a).mul_mat(x), &output);
    })
    .unwrap();
    graph.compute().unwrap();
    (last.read(), output.read())
}

#[test]
fn graphs_compute_the_same_and_inputs_outlive_what_follows_them() {
    let x = numbers(4 * N_IN, 9);
    let [a, _, scale] = take(&mut weights());
    let plain = chain(&a, &scale, &x);
    let mut w = weights();
    let observer = w.observe();
    let [a, _, scale] = take(&mut w);
    assert_eq!(chain(&a, &scale, &x), plain);
    // The same chain by hand, from what the unobserved graph computes step by step.
    let mut batches = Vec::new();
    let mut rows = x;
    let [a, _, scale] = take(&mut weights());
    for _ in 0..10 {
        let normed = one(&a, &scale, &rows);
        batches.push(normed.0);
        rows = normed.1;
    }
    batches.push(rows);
    let batches: Vec<&[f32]> = batches.iter().map(Vec::as_slice).collect();
    assert_eq!(observer.squares(), BTreeMap::from([("a".to_owned(), squares(&batches))]));
}

/// One link of [`chain`]: what the weight is multiplied by, and the result.
fn one(a: &Weight, scale: &Weight, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let input = state(&[N_IN, 4], x);
    let (normed, sum) = (zeros(DType::F32, &[N_IN, 4]), zeros(DType::F32, &[N_IN, 4]));
    let mut graph = Graph::build(backend(), 32, |g| {
        let x = g.state(&input).norm(1e-5) * g.weight(scale);
        let y = g.weight(a).mul_mat(x);
        g.store(x, &normed);
        g.store(x + y.slice(0, 0, 1) + y.slice(0, 2, 1), &sum);
    })
    .unwrap();
    graph.compute().unwrap();
    (normed.read(), sum.read())
}

/// A graph may write the state that it multiplied by; and a product that nothing reads is not run.
#[test]
fn states_count_as_they_were_and_what_never_runs_does_not_count() {
    let mut w = weights();
    let observer = w.observe();
    let [a, b, _] = take(&mut w);
    let data = numbers(2 * N_IN, 5);
    let (x, out) = (state(&[N_IN, 2], &data), zeros(DType::F32, &[3, 2]));
    let mut graph = Graph::build(backend(), 16, |g| {
        let rows = g.state(&x);
        g.store(g.weight(&a).mul_mat(rows), &out);
        g.weight(&b).mul_mat(rows.norm(0.1));
        g.store(rows + rows, &x);
    })
    .unwrap();
    graph.compute().unwrap();
    assert_eq!(x.read::<f32>(), data.iter().map(|x| x + x).collect::<Vec<_>>());
    assert_eq!(observer.squares(), BTreeMap::from([("a".to_owned(), squares(&[&data]))]));
}

/// Values that a product of its own would otherwise compute while it packs them, of which there would be no tensor.
#[test]
fn values_of_functions_are_seen() {
    let mut w = weights();
    let observer = w.observe();
    let [_, b, _] = take(&mut w);
    let x = state(&[N_IN, 5], &numbers(5 * N_IN, 1));
    let (values, out) = (zeros(DType::F32, &[N_IN, 5]), zeros(DType::F32, &[3, 5]));
    let mut graph = Graph::build(backend(), 16, |g| {
        let swiglu = || (g.state(&x) + g.state(&x)).swiglu(g.state(&x) + g.state(&x));
        g.store(g.weight(&b).mul_mat(swiglu()), &out);
        g.store(swiglu(), &values);
    })
    .unwrap();
    graph.compute().unwrap();
    let want = squares(&[&values.read::<f32>()]);
    assert_eq!(observer.squares(), BTreeMap::from([("b".to_owned(), want)]));
}

/// Graphs of weights that were taken before, or of another file, are not observed.
#[test]
fn only_the_weights_of_an_observed_file_are_seen() {
    let [a, ..] = take(&mut weights());
    let mut w = weights();
    let before = w.take("a", shape(&[N_IN, 3])).unwrap();
    let observer = w.observe();
    let (x, out) = (state(&[N_IN], &numbers(N_IN, 1)), zeros(DType::F32, &[3]));
    for weight in [&a, &before] {
        let build = Graph::build(backend(), 8, |g| {
            g.store(g.weight(weight).mul_mat(g.state(&x)), &out);
        });
        build.unwrap().compute().unwrap();
    }
    assert!(observer.squares().is_empty());
}
