//! Matrices in ggml's packed layouts and in our panels give the products of those in the file's, and nothing else.

mod common;

use std::sync::Arc;

use common::{assert_close, backend, numbers, read};
use openvla_kernels::{
    ALIGNMENT, Backend, Builder, DType, Error, Gguf, Graph, Header, Kernels, State, Weight,
    Weights, shape,
};

const N_IN: usize = 512;
const TYPES: [DType; 8] = [
    DType::Q8_0,
    DType::Q6_K,
    DType::Q5_K,
    DType::Q4_K,
    DType::Q4_0,
    DType::IQ4_NL,
    DType::IQ4_XS,
    DType::F16,
];

/// A file with a matrix of each type, of so many rows, and their numbers after rounding.
fn matrices(n_row: usize) -> (Vec<u8>, Vec<Vec<f32>>) {
    let (mut header, mut data, mut rounded) = (Header::default(), Vec::new(), Vec::new());
    for (i, dtype) in TYPES.into_iter().enumerate() {
        header.tensor(&dtype.to_string(), dtype, shape(&[N_IN, n_row]));
        let mut bytes = vec![0; n_row * dtype.row_bytes(N_IN).unwrap()];
        dtype.encode(&numbers(n_row * N_IN, i as u64), N_IN, None, &mut bytes);
        rounded.push(dtype.decode(&bytes));
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        data.extend(bytes);
    }
    ([header.encode(), data].concat(), rounded)
}

/// `weight [N_IN, n_row]` times columns of `N_IN` numbers.
fn product(backend: &Arc<Backend>, weight: &Weight, data: &[f32]) -> Vec<f32> {
    let (n, n_row) = (data.len() / N_IN, weight.shape()[1]);
    let state = |dims: &[usize]| State::zeros(backend, DType::F32, shape(dims)).unwrap();
    let (x, y) = (state(&[N_IN, n]), state(&[n_row, n]));
    x.write(data);
    let build = |g: &Builder| g.store(g.weight(weight).mul_mat(g.state(&x)), &y);
    Graph::build(backend, 8, build).unwrap().compute().unwrap();
    y.read()
}

/// One row and many, whose rows are and are not whole groups of what is interleaved.
#[test]
fn products_are_the_same() {
    for n_row in [1, 7, 8, 64] {
        let (file, rounded) = matrices(n_row);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.gguf");
        std::fs::write(&path, &file).unwrap();
        let (in_memory, mapped) = (read(&file).unwrap(), Gguf::open(&path).unwrap());
        for (file, products) in [
            (&in_memory, Kernels::Ggml),
            (&in_memory, Kernels::Fastest),
            (&mapped, Kernels::Ggml),
            (&mapped, Kernels::Fastest),
        ] {
            let backend = Backend::open(&[], 2, products).unwrap();
            let mut weights = Weights::placed(file, &backend, &[], &|_| 0).unwrap();
            for (dtype, matrix) in TYPES.into_iter().zip(&rounded) {
                let weight = weights.take(&dtype.to_string(), shape(&[N_IN, n_row])).unwrap();
                for n in [1, 3, 20] {
                    let data = numbers(n * N_IN, 99);
                    let got = product(&backend, &weight, &data);
                    let dot = |(row, x): (&[f32], &[f32])| {
                        row.iter().zip(x).map(|(a, b)| f64::from(a * b)).sum::<f64>()
                    };
                    let rows = |x| matrix.chunks(N_IN).map(move |row| dot((row, x)));
                    let want: Vec<f64> = data.chunks(N_IN).flat_map(rows).collect();
                    assert_close(&format!("{dtype} {n_row}x{n}"), &got, &want, 3e-2);
                }
            }
            weights.finish().unwrap();
        }
    }
}

/// Rows cannot be looked up in a matrix that was interleaved: an error, where ggml would give
/// arbitrary numbers or abort. A table that was named is left as it is.
#[test]
fn tables_are_left_alone() {
    let (file, rounded) = matrices(8);
    let file = read(&file).unwrap();
    let look_up = |tables: &[&str]| {
        let mut weights = Weights::placed(&file, backend(), tables, &|_| 0).unwrap();
        let weight = weights.take("Q4_0", shape(&[N_IN, 8])).unwrap();
        let ids = common::ids(DType::I32, 1, 8);
        ids.write(&[5_i32]);
        let row = common::zeros(DType::F32, &[N_IN]);
        let mut graph = Graph::build(backend(), 8, |g| {
            g.store(g.weight(&weight).get_rows(g.state(&ids)), &row);
        })?;
        graph.compute()?;
        Ok::<Vec<f32>, Error>(row.read())
    };
    let table = TYPES.iter().position(|dtype| *dtype == DType::Q4_0).unwrap();
    assert_eq!(look_up(&["Q4_0"]).unwrap(), rounded[table][5 * N_IN..6 * N_IN]);
    if cfg!(target_arch = "x86_64") {
        let error = look_up(&[]).unwrap_err().to_string();
        assert!(error.contains("cannot compute GET_ROWS"), "{error}");
    }
}
