//! Reference cases and checksums: computed by streaming, found again by running the file, and
//! wrong where the file is.

mod common;
#[path = "common/oft_runs.rs"]
mod oft_runs;

use std::path::{Path, PathBuf};

use common::of;
use openvla::{Config, Options, Proof};
use openvla_convert::Conversion;
use openvla_convert::verify::{Verification, verify};
use openvla_example::{COMMITTED, Size, Spec, Variant};
use openvla_kernels::Gguf;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/example/openvla-example");
const OFT_EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/example/openvla-tabletop-oft");

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
        let choice = case.choice.as_ref().unwrap();
        assert_eq!(choice.tokens, choice.expected_tokens, "{}", checkpoint.display());
        assert!(case.error < 1e-5, "{}: {case:?}", checkpoint.display());
    }
}

/// Of an OpenVLA-OFT run: two cameras and a state, or three cameras and the Llama's own head.
#[test]
fn streaming_computes_what_a_pass_of_all_cameras_does() {
    let dir = tempfile::tempdir().unwrap();
    let trained = report(&proven(Path::new(OFT_EXAMPLE), "F32", dir.path())).unwrap();
    let tokens = dir.path().join("tokens.gguf");
    let mut options = openvla_convert::Options { proof: true, n_threads: 1, ..of("F32") };
    options.run.chunk = Some(2);
    options.run.n_camera = Some(3);
    let conversion = Conversion::new(Path::new(EXAMPLE), &options).unwrap();
    conversion.write(&tokens, &indicatif::ProgressBar::hidden()).unwrap();
    let tokens = report(&tokens).unwrap();
    assert_chunks(&trained, &["table", "table mirrored"], 8);
    assert_chunks(&tokens, &["table", "table mirrored", "table turned"], 0);
    let choice = tokens.cases[0].choice.as_ref().unwrap();
    assert_eq!((choice.tokens.len(), choice.agreement), (14, 1.0), "{choice:?}");
}

/// What is reported of a file in f32 whose first case has these pictures and a state of `n_state` numbers.
fn assert_chunks(report: &Verification, images: &[&str], n_state: usize) {
    assert_eq!(report.cases.len(), 2);
    let [first, second] = [&report.cases[0], &report.cases[1]];
    assert_eq!(first.images, images);
    assert!(first.state.len() == n_state && (n_state == 0 || first.state != second.state));
    for case in &report.cases {
        assert_eq!(case.action_off.len(), 7);
        assert!(case.error < 1e-5, "{case:?}");
    }
}

/// Numbers of the header that no checksum covers.
#[test]
fn a_chunk_that_depends_on_other_pictures_or_another_state_is_not_sound() {
    let dir = tempfile::tempdir().unwrap();
    let path = proven(Path::new(OFT_EXAMPLE), "F32", dir.path());
    let elements = |bytes: &[u8], key: &str| {
        // After a key: its kind, the elements' kind, their number (u64), the elements.
        bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len() + 16
    };
    for key in ["openvla.proof.states", "openvla.proof.actions"] {
        let other = changed(&path, |bytes| {
            let at = elements(bytes, key);
            bytes[at..at + 4].copy_from_slice(&0.14_f32.to_le_bytes());
        });
        let report = report(&other).unwrap();
        assert!(report.damaged.is_empty() && !report.sound, "{key}: {report:?}");
    }
    let other = changed(&path, |bytes| {
        let at = elements(bytes, "openvla.proof.actions");
        bytes[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    let said = format!("{:#}", report(&other).unwrap_err());
    assert!(said.contains("openvla.proof.actions"), "{said}");
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

    /// With FiLM, one camera and three, a chunk of 25, the Llama's own head, and an adapter that is merged.
    #[test]
    #[ignore = "needs ../shared/golden"]
    fn streaming_computes_what_a_pass_of_the_references_runs_does() {
        let runs = oft_runs::Runs::open();
        let dir = tempfile::tempdir().unwrap();
        for name in ["A", "B", "C", "D", "E", "G", "H"] {
            let path = dir.path().join(format!("{name}.gguf"));
            let options = openvla_convert::Options { proof: true, n_threads: 1, ..of("F32") };
            runs.convert_with(name, options, &path);
            let report = report(&path).unwrap();
            for case in &report.cases {
                assert!(case.error < 1e-5, "{name}: {case:?}");
                eprintln!("{name}: {:.1e}", case.error);
            }
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
        let errors = report.cases.iter().map(|case| case.error);
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
    assert!(said.contains("ids that are not actions"), "{said}");
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
