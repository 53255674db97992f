//! Weights and states: each tensor is taken once and in its shape, data survives the way to the
//! device and back.

mod common;

use common::{backend, compute, file, numbers, read, state, weight, zeros};
use openvla_kernels::{DType, Gguf, Graph, Header, Weight, Weights, shape};

fn weights() -> Weights {
    let mut header = Header::default();
    header.tensor("matrix", DType::F16, [4, 2, 1, 1]);
    header.tensor("bias", DType::F32, [2, 1, 1, 1]);
    header.tensor("ids", DType::I32, [2, 1, 1, 1]);
    Weights::load(&read(&file(&header)).unwrap(), backend()).unwrap()
}

#[test]
fn a_tensor_is_taken_once_in_its_shape_and_type() {
    let mut w = weights();
    let taken = w.take("matrix", shape(&[4, 2])).unwrap();
    assert_eq!((taken.dtype(), taken.shape()), (DType::F16, [4, 2, 1, 1]));
    assert!(w.take_f32("bias", shape(&[2])).is_ok());
    let errors = [
        (w.take("matrix", shape(&[4, 2])).err(), "test.gguf: tensor `matrix` is missing"),
        (w.take("none", shape(&[1])).err(), "tensor `none` is missing"),
        (w.take("ids", shape(&[2])).err(), "tensor `ids` holds I32 elements, not weights"),
        (weights().take("matrix", shape(&[2, 4])).err(), "[4, 2, 1, 1]; [2, 4, 1, 1] is needed"),
        (weights().take("matrix", [4, 2, 1, 2]).err(), "[4, 2, 1, 1]; [4, 2, 1, 2] is needed"),
        (weights().take_f32("matrix", shape(&[4, 2])).err(), "`matrix` is F16; F32 is needed"),
    ];
    for (error, wanted) in errors {
        let error = error.expect(wanted).to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn a_tensor_that_is_left_over_is_an_error() {
    let mut w = weights();
    w.take("matrix", shape(&[4, 2])).unwrap();
    w.take("bias", shape(&[2])).unwrap();
    let error = w.finish().unwrap_err().to_string();
    assert!(error.contains("tensor `ids` belongs to no part of this model"), "{error}");
    let mut header = Header::default();
    header.tensor("only", DType::F32, [1; 4]);
    let mut w = Weights::load(&read(&file(&header)).unwrap(), backend()).unwrap();
    w.take("only", [1; 4]).unwrap();
    assert!(w.finish().is_ok());
}

#[test]
fn a_file_without_tensors_is_no_model() {
    let gguf = read(&Header::default().encode()).unwrap();
    let error = Weights::load(&gguf, backend()).err().unwrap().to_string();
    assert!(error.contains("test.gguf") && error.contains("it holds no tensors"), "{error}");
}

/// Files are copied, and so are built-in bytes that are not aligned.
#[test]
fn mapped_and_copied_weights_hold_the_files_numbers() {
    let data = numbers(64, 1);
    let mut header = Header::default();
    header.tensor("w", DType::F32, [32, 2, 1, 1]);
    let mut bytes = header.encode();
    data.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.gguf");
    std::fs::write(&path, &bytes).unwrap();
    let askew: &'static [u8] = Box::leak([vec![0], bytes].concat().into_boxed_slice());
    let files = [Gguf::open(&path), Gguf::built_in("askew", &askew[1..])];
    let [mapped, askew] = files.map(|file| {
        let mut w = Weights::load(&file.unwrap(), backend()).unwrap();
        w.take("w", shape(&[32, 2])).unwrap()
    });
    drop(dir); // the map outlives the file's name
    for weight in [mapped, askew] {
        assert_eq!(compute(&[32, 2], |g| g.weight(&weight).contiguous()), data);
    }
}

/// In the file as it is and in panels, where the CPU has them; `c` is of another type than `a` and `b`,
/// and `d` does not follow `a`.
#[test]
fn matrices_that_follow_each_other_are_one() {
    let mut header = Header::default();
    for (name, dtype) in
        [("a", DType::Q8_0), ("b", DType::Q8_0), ("c", DType::F32), ("d", DType::Q8_0)]
    {
        header.tensor(name, dtype, shape(&[64, 32]));
    }
    let mut bytes = header.encode();
    for tensor in read(&file(&header)).unwrap().tensors() {
        let mut data = vec![0; tensor.range.len()];
        tensor.dtype.encode(&numbers(64 * 32, bytes.len() as u64), 64, None, &mut data);
        bytes.extend(data);
    }
    let file = read(&bytes).unwrap();
    let x = state(&[64, 2], &numbers(128, 9));
    let placed = Weights::placed(&file, backend(), &[], &|_| 0).unwrap();
    let mut n_left = 0;
    for mut w in [Weights::load(&file, backend()).unwrap(), placed] {
        let mut take = |name| w.take(name, shape(&[64, 32])).unwrap();
        let [a, b, c, d] = ["a", "b", "c", "d"].map(&mut take);
        for parts in [[&b, &c], [&c, &d], [&a, &d], [&b, &a]] {
            assert!(Weight::stacked(&parts).is_none());
        }
        // ggml's packed layouts are left alone.
        let Some(stack) = Weight::stacked(&[&a, &b]) else {
            n_left += 1;
            continue;
        };
        assert_eq!((stack.dtype(), stack.shape()), (DType::Q8_0, [64, 64, 1, 1]));
        let both = compute(&[64, 2], |g| g.weight(&stack).mul_mat(g.state(&x)));
        let [a, b] = [a, b].map(|w| compute(&[32, 2], |g| g.weight(&w).mul_mat(g.state(&x))));
        assert_eq!(both, [&a[..32], &b[..32], &a[32..], &b[32..]].concat());
    }
    assert!(n_left <= usize::from(!backend().has_own_kernels()), "{n_left} are not stacked");
    let mut w = Weights::load(&file, backend()).unwrap();
    let _observer = w.observe();
    let [a, b] = ["a", "b"].map(|name| w.take(name, shape(&[64, 32])).unwrap());
    assert!(Weight::stacked(&[&a, &b]).is_none(), "each is observed by itself");
}

#[test]
fn a_state_holds_what_was_written() {
    let ids = zeros(DType::I32, &[3]);
    assert_eq!(ids.read::<i32>(), [0; 3]);
    ids.write(&[1_i32, -2, i32::MAX]);
    ids.write(&[7_i32]); // from the first on
    assert_eq!(ids.read::<i32>(), [7, -2, i32::MAX]);
    let places = zeros(DType::I64, &[2]);
    places.write(&[1_i64 << 40, -1]);
    assert_eq!(places.read::<i64>(), [1 << 40, -1]);
    let mask = zeros(DType::F16, &[2]);
    mask.write(&[0xFC00_u16, 0x3C00]);
    assert_eq!(mask.read::<u16>(), [0xFC00, 0x3C00]);
    assert_eq!(mask.shape(), [2, 1, 1, 1]);
}

#[test]
#[should_panic(expected = "a state is written in its own type")]
fn a_state_of_ids_takes_no_floats() {
    zeros(DType::I32, &[1]).write(&[1.0_f32]);
}

#[test]
#[should_panic(expected = "a state is read in its own type")]
fn a_state_of_halves_gives_no_floats() {
    zeros(DType::F16, &[1]).read::<f32>();
}

#[test]
#[should_panic(expected = "3 elements into [2, 1, 1, 1]")]
fn a_state_takes_no_more_than_it_holds() {
    zeros(DType::I32, &[2]).write(&[1_i32, 2, 3]);
}

#[test]
fn a_graph_runs_many_times_and_keeps_what_it_reads_alive() {
    let (x, result) = (state(&[2], &[1.0, 2.0]), zeros(DType::F32, &[2]));
    let mut graph = {
        let (scale, _) = weight(DType::F32, &[2], &[10.0, 100.0]);
        Graph::build(backend(), 8, |g| g.store(g.state(&x) * g.weight(&scale), &result)).unwrap()
    };
    graph.compute().unwrap();
    assert_eq!(result.read::<f32>(), [10.0, 200.0]);
    x.write(&[-1.0_f32, 0.5]);
    graph.compute().unwrap();
    assert_eq!(result.read::<f32>(), [-10.0, 50.0]);
}
