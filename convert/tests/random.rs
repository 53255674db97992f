//! Files of random weights, against those that converting such a checkpoint writes.

mod common;

use std::path::Path;

use common::{assert_fails, openvla_convert, stderr, stdout};
use openvla::image::imageops;
use openvla::{OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, Size, Spec, table_image};
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
        assert_eq!(random.tensors(), wanted.tensors(), "{name}");
        // All but what is made of the weights.
        let described = |file: &Gguf| {
            let mut metadata = file.metadata().clone();
            metadata
                .retain(|key, _| !["checksum", "fingerprint"].iter().any(|of| key.contains(of)));
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
            let numbers = tensor.dtype.decode(&file.bytes()[tensor.range.clone()]);
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
    assert_eq!(run(&["random", "--size", "tiny"]).status.code(), Some(2), "-o is asked for");
    assert_fails(&run(&["random", "--size", "tiny", "-o", "no/x.gguf"]), &["no", "No such file"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
}
