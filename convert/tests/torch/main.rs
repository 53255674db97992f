//! Files by `torch.save`: what is read of sound ones, and why others are refused.

mod mutated;
mod refused;
mod shared;
mod writer;

use std::collections::BTreeMap;
use std::io::Cursor;

use half::{bf16, f16};
use openvla_convert::tensors::Tensors;
use openvla_convert::torch::{self, Tensor};
use safetensors::Dtype;

use writer::{
    Code, Entry, call, entries, file, filled, global, int, ordered_dict, pickle, state_dict,
    storage, tensor, text, tuple, view, zip,
};

fn read(file: &[u8]) -> BTreeMap<String, Tensor> {
    torch::read(Cursor::new(file)).unwrap()
}

fn names(file: &[u8]) -> Vec<String> {
    read(file).into_keys().collect()
}

/// The numbers 1, 2 … of a storage.
fn floats(n: usize) -> Vec<u8> {
    (1..=n).flat_map(|x| (x as f32).to_le_bytes()).collect()
}

#[test]
fn tensors_of_every_type_are_read_as_f32() {
    let storages = [
        ("0", floats(12)),
        ("1", [1.5, -2.0].iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()),
        ("2", [0.25, 3.0].iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()),
    ];
    let shared = storage("Float", "0", 12);
    let pickle = state_dict(&[
        ("all", tensor("Float", "0", &[2, 3, 2])),
        ("part", view(shared.clone(), 5, &[2, 3], &[3, 1])),
        ("scalar", view(shared, 11, &[], &[])),
        ("bf16", tensor("BFloat16", "1", &[2])),
        ("f16", tensor("Half", "2", &[1, 2])),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("action_head--latest_checkpoint.pt");
    std::fs::write(&path, file(pickle, &storages)).unwrap();
    let mut tensors = Tensors::default();
    tensors.add_torch(&path, "action_head.").unwrap();
    let numbers = |name: &str| {
        tensors.check_type(name).unwrap();
        let matrix = tensors.matrix(name).unwrap();
        let mut numbers = vec![0.0; matrix.row * matrix.n_row];
        matrix.read(0, &mut numbers);
        (tensors.entries()[name].shape.clone(), numbers)
    };
    let count = |from: u8, to: u8| (from..=to).map(f32::from).collect::<Vec<_>>();
    assert_eq!(numbers("action_head.all"), (vec![2, 3, 2], count(1, 12)));
    assert_eq!(numbers("action_head.part"), (vec![2, 3], count(6, 11)));
    assert_eq!(numbers("action_head.bf16"), (vec![2], vec![1.5, -2.0]));
    assert_eq!(numbers("action_head.f16"), (vec![1, 2], vec![0.25, 3.0]));
    assert_eq!(tensors.entries()["action_head.scalar"].shape, [0; 0]);
    assert_eq!(tensors.entries().len(), 5);

    let twice = format!("{:#}", tensors.add_torch(&path, "action_head.").unwrap_err());
    assert!(twice.contains("latest_checkpoint.pt holds action_head.all, which another"), "{twice}");
    std::fs::write(&path, [0x80, 2]).unwrap();
    let error = format!("{:#}", tensors.add_torch(&path, "").unwrap_err());
    assert!(error.contains("latest_checkpoint.pt: it is a bare pickle"), "{error}");
}

#[test]
fn the_scalars_place_is_the_files() {
    let file = file(
        state_dict(&[("x", view(storage("Float", "0", 3), 2, &[], &[]))]),
        &[("0", floats(3))],
    );
    let Tensor { dtype, shape, offset, length } = &read(&file)["x"];
    assert_eq!((*dtype, shape.len(), *length), (Dtype::F32, 0, 4));
    assert_eq!(file[*offset as usize..][..4], 3_f32.to_le_bytes());
}

#[test]
fn module_is_left_out_if_all_names_start_with_it() {
    let of = |names: &[&str]| {
        let tensors: Vec<_> =
            names.iter().map(|name| (*name, tensor("Float", "0", &[1]))).collect();
        self::names(&file(state_dict(&tensors), &[("0", floats(1))]))
    };
    assert_eq!(of(&["module.a", "module.module.b"]), ["a", "module.b"]);
    assert_eq!(of(&["module.a", "b"]), ["b", "module.a"]);
    assert_eq!(of(&["modulea", "moduleb"]), ["modulea", "moduleb"]);
    assert!(of(&[]).is_empty());
}

#[test]
fn metadata_and_parameters_are_seen_through() {
    let version = filled(b"}".to_vec(), &[("version", int(1))]);
    let metadata = filled(ordered_dict(), &[("", version.clone()), ("module", version)]);
    let attributes = [b"}".to_vec(), text("_metadata"), metadata, b"sb".to_vec()].concat();
    let parameter = [tensor("Float", "0", &[2]), b"\x88".to_vec(), ordered_dict()];
    let parameter = call(global("torch._utils", "_rebuild_parameter"), &parameter);
    let dict = filled(ordered_dict(), &[("weight", parameter)]);
    let file = file(pickle(&[dict, attributes].concat()), &[("0", floats(2))]);
    assert_eq!(read(&file)["weight"].shape, [2]);
}

/// A value under a short index of the memo, and from there.
#[test]
fn values_are_stored_and_fetched() {
    let put = |index: u32| [&b"r"[..], &index.to_le_bytes()].concat();
    let get = |index: u32| [&b"j"[..], &index.to_le_bytes()].concat();
    let stored = [tensor("Float", "0", &[2]), b"q\x07".to_vec(), put(u32::MAX)].concat();
    let dict = [("a", stored), ("b", b"h\x07".to_vec()), ("c", get(u32::MAX))];
    let file = file(state_dict(&dict), &[("0", floats(2))]);
    let tensors = read(&file);
    assert_eq!(tensors.len(), 3);
    assert!(tensors.values().all(|tensor| *tensor == tensors["a"]));
}

#[test]
fn integers_of_every_width_are_read() {
    // 70 000 numbers of one byte, in each way that there is to write the number.
    let wide = |n: u8| [&[0x8A, n][..], &70_000_i64.to_le_bytes()[..n.into()]].concat();
    for n in [int(70_000), wide(3), wide(4), wide(8)] {
        let id = [text("storage"), global("torch", "ByteStorage"), text("0"), text("cpu"), n];
        let storage: Code = [tuple(&id), b"Q".to_vec()].concat();
        let pickle = state_dict(&[("x", view(storage, 0x1_0000, &[300], &[1]))]);
        assert_eq!(read(&file(pickle, &[("0", vec![0; 70_000])]))["x"].length, 300);
    }
}

#[test]
fn strides_of_sides_of_one_do_not_matter() {
    let strided = view(storage("Float", "0", 6), 0, &[1, 3, 1, 2], &[99, 2, 0, 1]);
    let file = file(state_dict(&[("x", strided)]), &[("0", floats(6))]);
    assert_eq!(read(&file)["x"].shape, [1, 3, 1, 2]);
}

#[test]
fn archives_with_and_without_64_bits_are_read() {
    let pickle = state_dict(&[("x", tensor("Float", "0", &[6]))]);
    let narrow = entries(pickle, &[("0", floats(6))]);
    let wide: Vec<_> = narrow.iter().map(|entry| Entry { wide: true, ..entry.clone() }).collect();
    let want = read(&zip(&narrow, false));
    assert_eq!(want["x"].length, 24);
    for (entries, ends) in [(&narrow, true), (&wide, false), (&wide, true)] {
        assert_eq!(read(&zip(entries, ends)), want);
    }
    // Saturated numbers in the last record stand for those of the one before.
    let mut saturated = zip(&wide, true);
    let n = saturated.len();
    saturated[n - 14..n - 2].fill(0xFF);
    assert_eq!(read(&saturated), want);
}

#[test]
fn the_folder_is_that_of_the_pickle_whatever_it_is_called() {
    let mut entries =
        entries(state_dict(&[("x", tensor("Float", "0", &[6]))]), &[("0", floats(6))]);
    for entry in &mut entries {
        entry.name = entry.name.replace("head/", "an/archive/");
    }
    entries.retain(|entry| !entry.name.ends_with("byteorder")); // older files have none
    assert_eq!(names(&zip(&entries, true)), ["x"]);
}
