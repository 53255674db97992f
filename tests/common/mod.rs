//! What the golden tests share: where the goldens are, fixtures, the tolerance table.

#![allow(dead_code)] // each test binary uses its own part

pub mod process;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::RgbImage;
use openvla::{Decoding, Devices, Draft, OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// How far a stage may be from the reference, by the file's type: features, soft tokens, logits.
///
/// The accuracy promise: a number is raised only with a measurement beside it. F32 is held by the
/// largest absolute difference of any element. The other types are held by the relative error, the
/// root mean square of the difference over that of the reference, worst case and step; logits are
/// the 320 around the actions, each token forced to the reference's. The goldens are random
/// networks of 32 to 256 channels, far harder to quantize than a trained one of 4096.
///
/// On a GPU ([`devices`]), F32 is held as F16 is: ggml's attention there has keys and values in F16.
/// The other types keep their rows. No GPU has seen this table yet.
pub const TOLERANCE: [(&str, [f64; 3]); 11] = [
    ("F32", [FEATURES_F32, 5e-6, 1e-3]),
    ("F16", [1e-3, 1e-3, 2e-2]),
    ("BF16", [1e-2, 1e-2, 5e-2]),
    ("Q8_0", [4e-2, 5e-2, 3e-1]),
    ("Q6_K", [4e-2, 5e-2, 3e-1]),
    ("Q5_K_M", [4e-2, 5e-2, 6e-1]),
    ("Q4_K_M", [4e-2, 5e-2, 1.0]),
    ("Q4_K_S", [4e-2, 5e-2, 1.0]),
    ("Q4_0", [4e-2, 5e-2, 1.0]),
    ("IQ4_NL", [4e-2, 5e-2, 1.0]),
    ("IQ4_XS", [4e-2, 5e-2, 1.0]),
];

/// On aarch64 5.1e-6 was measured with our own kernels and 5.6e-6 with ggml's.
const FEATURES_F32: f64 = if cfg!(target_arch = "aarch64") { 8e-6 } else { 5e-6 };

/// What a golden holds; its place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Features,
    Soft,
    Logits,
}

/// The goldens in the repository: what the reference computed of the example's checkpoints.
pub fn committed() -> PathBuf {
    // A copy of this program may be elsewhere.
    let named = std::env::var_os("OPENVLA_GOLDENS").map(PathBuf::from);
    named.unwrap_or_else(|| found("tests/reference"))
}

/// The goldens beside the repository, of checkpoints with Llama-2's own vocabulary.
///
/// Tests that need them are in a `mod shared` and ignored; `tests/run` runs them where it can.
pub fn shared() -> PathBuf {
    found("shared/golden")
}

/// The published files around openvla-7b, beside the repository.
pub fn real_configs() -> PathBuf {
    found("shared/real_configs")
}

/// In or beside the repository; this file belongs to tests of several packages in it.
fn found(folder: &str) -> PathBuf {
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|up| up.join(folder));
    above.find(|path| path.is_dir()).unwrap_or_else(|| panic!("{folder} is not here"))
}

pub fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

pub fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

pub fn picture(path: &Path) -> RgbImage {
    openvla::decode(&std::fs::read(path).unwrap()).unwrap()
}

/// What a file of that type is made of: nothing but the checkpoint.
pub fn of(encoding: &str) -> openvla_convert::Options {
    encoding.parse::<Encoding>().unwrap().into()
}

/// Converts a checkpoint folder into `out`.
pub fn convert(checkpoint: &Path, encoding: &str, out: &Path) {
    let conversion = Conversion::new(checkpoint, &of(encoding)).unwrap();
    conversion.write(out, &indicatif::ProgressBar::hidden()).unwrap();
}

/// Where models are opened: `OPENVLA_DEVICE=cuda` or `vulkan` runs the goldens on a GPU.
pub fn devices() -> Devices {
    let named = std::env::var("OPENVLA_DEVICE").ok();
    named.map_or(Devices::Cpu, |name| name.parse().expect("OPENVLA_DEVICE"))
}

/// A converted checkpoint, opened; the folder goes with it.
pub fn open(checkpoint: &Path, encoding: &str, decoding: Decoding) -> OpenVla {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    convert(checkpoint, encoding, &path);
    let mut options = Options::default();
    options.decoding = decoding;
    options.devices = devices();
    options.draft = Draft::Auto; // where there is a session
    options.n_threads = 1; // tests run side by side; ggml's threads wait by spinning
    OpenVla::open(&path, &options).unwrap() // stays mapped after the folder is gone
}

/// A safetensors file of f32 tensors (other types are left out).
pub fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let of_f32 = file.iter().filter(|(_, view)| view.dtype() == Dtype::F32);
    of_f32.map(|(name, view)| (name.to_owned(), floats_of(view.data()))).collect()
}

fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The error of a stage in the table's measure, which must not exceed the table's number.
pub fn assert_close(what: &str, encoding: &str, stage: Stage, got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "{what}: numbers of elements");
    let encoding = match encoding {
        "F32" if devices() != Devices::Cpu => "F16",
        encoding => encoding,
    };
    let row = TOLERANCE.iter().find(|(name, _)| *name == encoding).expect("a row of the table");
    let limit = row.1[stage as usize];
    let difference = |i: usize| f64::from((got[i] - want[i]).abs());
    let worst = (0..got.len()).max_by(|a, b| difference(*a).total_cmp(&difference(*b))).unwrap();
    let square = |x: f64| x * x;
    let error = match encoding {
        "F32" => difference(worst),
        _ => {
            let wrong: f64 = (0..got.len()).map(|i| square(difference(i))).sum();
            (wrong / want.iter().map(|x| square(f64::from(*x))).sum::<f64>()).sqrt()
        }
    };
    assert!(
        error <= limit,
        "{what} {encoding} {stage:?}: error {error:.2e} > {limit:.0e}; worst at {worst}: got {}, \
         want {}",
        got[worst],
        want[worst]
    );
    error
}
