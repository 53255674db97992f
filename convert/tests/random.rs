//! Files of random weights, against those that converting such a checkpoint writes.

mod common;

use std::path::Path;

use common::{assert_fails, openvla_convert, stderr, stdout};
use openvla::image::RgbImage;
use openvla::image::imageops;
use openvla::oft::{Observation, OpenVlaOft};
use openvla::{OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, Size, Spec, Variant, table_image};
use openvla_kernels::Gguf;

fn write(conversion: &Conversion, out: &Path) -> Gguf {
    conversion.write(out, &indicatif::ProgressBar::hidden()).unwrap();
    Gguf::open(out).unwrap()
}

/// Holds every type of a size to the converted checkpoint of that size.
fn assert_like_converted(size: Size) {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { size, ..COMMITTED };
    let checkpoint = dir.path().join(spec.folder());
    openvla_example::write(&checkpoint, &spec).unwrap();
    for encoding in Encoding::ALL {
        let name = encoding.name;
        let conversion = Conversion::new(&checkpoint, &encoding.into()).unwrap();
        let wanted = write(&conversion, &dir.path().join("converted.gguf"));
        let path = dir.path().join("random.gguf");
        let random = write(&Conversion::random(&spec, encoding, 1).unwrap(), &path);
        let tensors = |file: &Gguf| {
            let tensors = file.tensors().iter();
            tensors.map(|t| (t.name.clone(), t.dtype, t.shape)).collect::<Vec<_>>()
        };
        assert_eq!(tensors(&random), tensors(&wanted), "{name}");
        // All but what is made of the weights.
        let weights = ["checksum", "openvla.source"];
        let described = |file: &Gguf| {
            let mut metadata = file.metadata().clone();
            metadata.retain(|key, _| !weights.iter().any(|of| key.contains(of)));
            metadata
        };
        assert_eq!(described(&random), described(&wanted), "{name}");
        assert_ne!(random.metadata(), wanted.metadata(), "{name}: there are checksums");

        let mut options = Options::default();
        options.n_threads = 1;
        let mut policy = OpenVla::open(&path, &options).unwrap();
        let table = table_image();
        let pictures = [imageops::rotate180(&table), imageops::huerotate(&table, 120), table];
        let act = |picture| policy.act(picture, "put eggplant into pot", None).unwrap().tokens;
        let tokens = pictures.each_ref().map(act);
        assert!(tokens.iter().any(|t| *t != tokens[0]), "{name}: blind, always {:?}", tokens[0]);
        let mut ids = tokens.concat();
        ids.sort_unstable();
        ids.dedup();
        assert!(ids.len() > 2, "{name}: hardly any token but {ids:?}");
    }
}

#[test]
fn it_is_what_converting_a_checkpoint_writes_but_for_the_weights() {
    assert_like_converted(Size::Tiny);
}

/// Rows of 256, as blocks of K-quants are.
#[test]
fn so_it_is_at_the_wide_size() {
    assert_like_converted(Size::Wide);
}

#[test]
fn a_seed_is_a_file_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |seed, n_threads| {
        let spec = Spec { size: Size::Wide, seed, ..COMMITTED };
        let conversion = Conversion::random(&spec, Encoding::default(), n_threads).unwrap();
        write(&conversion, &dir.path().join("random.gguf")).bytes().to_vec()
    };
    let one = bytes(1, 1);
    assert!(one == bytes(1, 3));
    assert!(one != bytes(2, 1));
}

/// Weights are as loud as the checkpoint's, so the same activations come out of them.
#[test]
fn every_tensor_is_as_loud_as_the_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { size: Size::Wide, ..COMMITTED };
    let checkpoint = dir.path().join(spec.folder());
    openvla_example::write(&checkpoint, &spec).unwrap();
    let encoding: Encoding = "Q8_0".parse().unwrap();
    let wanted = Conversion::new(&checkpoint, &encoding.into()).unwrap();
    let wanted = write(&wanted, &dir.path().join("converted.gguf"));
    let random = Conversion::random(&spec, encoding, 1).unwrap();
    let random = write(&random, &dir.path().join("random.gguf"));
    for tensor in random.tensors() {
        let moments = |file: &Gguf| {
            let range = file.tensor(&tensor.name).unwrap().range.clone();
            let numbers = tensor.dtype.decode(&file.bytes()[range]);
            let n = numbers.len() as f64;
            let mean = numbers.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
            let square = numbers.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
            (mean, square.sqrt())
        };
        let ((mean, std), (want_mean, want_std)) = (moments(&random), moments(&wanted));
        let n = tensor.shape.iter().product::<usize>() as f64;
        // Five times how far two samples of that many numbers differ by chance, and what the pool
        // itself is off by.
        let slack = want_std * (5.0 * (2.0 / n).sqrt() + 0.01);
        let near = (mean - want_mean).abs() <= slack && (std - want_std).abs() <= slack;
        assert!(near, "{}: {mean} ± {std}, {want_mean} ± {want_std}", tensor.name);
    }
}

/// Of every type, and with one camera and two: all that it is given counts.
#[test]
fn an_oft_sees_every_camera_and_reads_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("random.gguf");
    let types = Encoding::ALL.into_iter().map(|encoding| (encoding, 2));
    for (encoding, n_camera) in types.chain([(Encoding::default(), 1)]) {
        let name = encoding.name;
        let spec = Spec { variant: Variant::Oft { n_camera }, size: Size::Wide, ..COMMITTED };
        write(&Conversion::random(&spec, encoding, 1).unwrap(), &path);
        let mut options = Options::default();
        options.n_threads = 1;
        let mut policy = OpenVlaOft::open(&path, &options).unwrap();
        assert_eq!(policy.oft().cameras.len(), n_camera);
        let table = table_image();
        let turned = imageops::rotate180(&table);
        let mut act = |images: &[&RgbImage], state: [f64; 8]| {
            let observation = Observation { images, state: Some(&state) };
            policy.act(&observation, "put eggplant into pot", None).unwrap().normalized
        };
        let views = vec![&table; n_camera];
        let wanted = act(&views, [0.0; 8]);
        assert_eq!((wanted.len(), wanted[0].len()), (8, 7), "{name}");
        assert!(wanted.concat().iter().all(|x| x.abs() < 8.0), "{name}: {wanted:?}");
        assert!(wanted.iter().any(|action| *action != wanted[0]), "{name}: all actions are one");
        for i in 0..n_camera {
            let mut views = views.clone();
            views[i] = &turned;
            assert_ne!(act(&views, [0.0; 8]), wanted, "{name}: blind of camera {i}");
        }
        let state = std::array::from_fn(|i| if i == 2 { 1.0 } else { 0.0 });
        assert_ne!(act(&views, state), wanted, "{name}: the state does not count");
    }
}

/// The numbers of published runs for LIBERO: their head's 150.9 M weights, their state projector's 16.8 M.
#[test]
fn an_oft_of_full_size_has_the_published_shapes() {
    let spec = Spec { variant: Variant::Oft { n_camera: 2 }, size: Size::Full, ..COMMITTED };
    let plan = Conversion::random(&spec, Encoding::default(), 1).unwrap().plan;
    let found = plan.iter().filter(|planned| planned.tensor.name.starts_with("oft."));
    let matrices = found.filter(|planned| planned.tensor.shape[1] > 1);
    let shapes: Vec<_> = matrices
        .map(|planned| {
            let [n_in, n_out, ..] = planned.tensor.shape;
            (planned.tensor.name.as_str(), n_in, n_out, planned.dtype.to_string())
        })
        .collect();
    let wanted = [
        ("oft.head.fc1.weight", 28_672, 4096, "Q8_0"),
        ("oft.head.blk.0.fc.weight", 4096, 4096, "Q8_0"),
        ("oft.head.blk.1.fc.weight", 4096, 4096, "Q8_0"),
        ("oft.head.fc2.weight", 4096, 7, "Q8_0"),
        ("oft.state.fc1.weight", 8, 4096, "BF16"),
        ("oft.state.fc2.weight", 4096, 4096, "BF16"),
    ];
    assert_eq!(shapes, wanted.map(|(name, n_in, n_out, kind)| (name, n_in, n_out, kind.into())));
    let of_openvla = ["output.weight", "action_head.weight"];
    assert!(plan.iter().all(|planned| !of_openvla.contains(&planned.tensor.name.as_str())));
}

#[test]
fn it_is_written_as_a_process() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| openvla_convert(args, dir.path());
    let output = run(&["random", "--size", "tiny", "--q8", "-t", "1", "-o", "random.gguf"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    assert!(stderr(&output).contains("wrote random.gguf"), "{}", stderr(&output));
    let verified = run(&["verify", "-t", "1", "random.gguf"]);
    assert!(stdout(&verified).contains("61 of 61 tensors are as written"), "{verified:?}");
    let oft = ["random", "--oft", "--cameras", "3", "--size", "tiny", "-o", "random.gguf"];
    let said = stderr(&run(&oft));
    assert!(said.contains("8 actions of 7 numbers (l1 head) from 3 cameras"), "{said}");
    assert!(!said.contains("KV cache"), "its one pass has none: {said}");
    let cameras = |more: &[&str]| run(&[&["random", "-o", "x.gguf", "--cameras"], more].concat());
    assert_eq!(cameras(&["2"]).status.code(), Some(2), "only an OpenVLA-OFT has several");
    assert_eq!(cameras(&["9", "--oft"]).status.code(), Some(2));
    assert_eq!(run(&["random", "--size", "tiny"]).status.code(), Some(2), "-o is asked for");
    assert_fails(&run(&["random", "--size", "tiny", "-o", "no/x.gguf"]), &["no", "No such file"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
}
