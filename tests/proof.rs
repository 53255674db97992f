//! Reference cases and checksums: computed by streaming, found again by running the file, and
//! wrong where the file is.

mod common;

use std::path::{Path, PathBuf};

use common::of;
use openvla::{Config, Options, Proof};
use openvla_convert::Conversion;
use openvla_convert::verify::{Verification, verify};
use openvla_example::{COMMITTED, Size, Spec, Variant};
use openvla_kernels::Gguf;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/example/openvla-example");

/// Converts with reference cases.
fn proven(checkpoint: &Path, encoding: &str, dir: &Path) -> PathBuf {
    let out = dir.join(format!("{encoding}.gguf"));
    let options = openvla_convert::Options { proof: true, n_threads: 1, ..of(encoding) };
    let conversion = Conversion::new(checkpoint, &options).unwrap();
    conversion.write(&out, &indicatif::ProgressBar::hidden()).unwrap();
    out
}

fn report(path: &Path) -> anyhow::Result<Verification> {
    let mut options = Options::default();
    options.n_threads = 1;
    verify(path, &options, &indicatif::ProgressBar::hidden())
}

/// The same graphs over the same numbers, a layer at a time or all at once.
#[test]
fn streaming_computes_what_the_whole_network_does() {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { variant: Variant::V01, ..COMMITTED };
    openvla_example::write(&dir.path().join("v01"), &spec).unwrap();
    for checkpoint in [PathBuf::from(EXAMPLE), dir.path().join("v01")] {
        streamed_as_whole(&checkpoint);
    }
}

fn streamed_as_whole(checkpoint: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let report = report(&proven(checkpoint, "F32", dir.path())).unwrap();
    assert_eq!(report.cases.len(), 2);
    for case in &report.cases {
        assert_eq!(case.tokens, case.expected_tokens, "{}", checkpoint.display());
        assert!(case.logits_error < 1e-5, "{}: {case:?}", checkpoint.display());
    }
}

mod shared {
    use super::*;

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn streaming_computes_what_the_whole_network_does() {
        for checkpoint in ["public/ckpt", "extra/ckpt_v01"] {
            streamed_as_whole(&common::shared().join(checkpoint));
        }
    }
}

#[test]
fn narrower_files_are_measured_against_f32() {
    let dir = tempfile::tempdir().unwrap();
    let wide = dir.path().join("wide");
    openvla_example::write(&wide, &Spec { size: Size::Wide, ..COMMITTED }).unwrap();
    let error = |encoding: &str| {
        let report = report(&proven(&wide, encoding, dir.path())).unwrap();
        assert!(report.sound && report.damaged.is_empty(), "{report:?}");
        let errors = report.cases.iter().map(|case| case.logits_error);
        let worst = errors.fold(0.0, f64::max);
        eprintln!("{encoding}: {worst:.1e}");
        worst
    };
    let [bf16, q8_0, q4_k_m] = ["BF16", "Q8_0", "Q4_K_M"].map(error);
    assert!(0.0 < bf16 && bf16 < q8_0 && q8_0 < q4_k_m && q4_k_m < 1.0);
}

/// Writes `change`d bytes of a file beside it.
fn changed(path: &Path, change: impl FnOnce(&mut [u8])) -> PathBuf {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    let other = path.with_extension("changed");
    std::fs::write(&other, bytes).unwrap();
    other
}

#[test]
fn a_damaged_tensor_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = proven(Path::new(EXAMPLE), "Q4_K_M", dir.path());
    let file = Gguf::open(&path).unwrap();
    for tensor in [&file.tensors()[0], file.tensors().last().unwrap()] {
        let flipped = changed(&path, |bytes| bytes[tensor.range.end - 1] ^= 1);
        let report = report(&flipped).unwrap();
        assert_eq!(report.damaged, [tensor.name.as_str()]);
        assert!(!report.sound && report.cases.is_empty(), "what is damaged is not run");
    }
}

/// A number of the header that no checksum covers.
#[test]
fn a_file_that_acts_differently_is_not_sound() {
    let dir = tempfile::tempdir().unwrap();
    let path = proven(Path::new(EXAMPLE), "F32", dir.path());
    let key = b"openvla.rope.freq_base";
    let turned = changed(&path, |bytes| {
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
        bytes[at + key.len() + 4..][..4].copy_from_slice(&500.0_f32.to_le_bytes());
    });
    let report = report(&turned).unwrap();
    assert!(report.damaged.is_empty() && !report.sound, "{report:?}");
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = proven(Path::new(EXAMPLE), "Q8_0", dir.path());
    let broken = |key: &str, change: &dyn Fn(&mut [u8])| {
        let other = changed(&path, |bytes| {
            let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap();
            change(&mut bytes[at + key.len()..]);
        });
        format!("{:#}", report(&other).unwrap_err())
    };
    // After a key: its kind, the elements' kind, their number (u64), the elements.
    let said = broken("openvla.proof.tokens", &|b| b[16..20].copy_from_slice(&1_i32.to_le_bytes()));
    assert!(said.contains("ids that are no actions"), "{said}");
    let said =
        broken("openvla.proof.logits", &|b| b[16..20].copy_from_slice(&f32::NAN.to_le_bytes()));
    assert!(said.contains("openvla.proof.logits"), "{said}");
    let said = broken("openvla.checksum.xxh64", &|b| b[24] = b'x');
    assert!(said.contains("not a checksum for each of its tensors"), "{said}");
    let said = broken("openvla.proof.images", &|b| b[24] = b'T');
    assert!(said.contains("no image \"Table\""), "{said}");
}

/// The example that is built into `openvla-run` came from the program, with its proof.
#[test]
fn the_built_in_example_carries_its_proof() {
    let file =
        Gguf::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("example/example.gguf").as_path());
    let file = file.unwrap();
    let proof = Proof::read(&file, &Config::read(&file).unwrap()).unwrap();
    assert_eq!((proof.cases.len(), proof.checksums.len()), (2, file.tensors().len()));
}
