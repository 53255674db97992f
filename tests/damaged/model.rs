//! A sound model file taken apart, to be put together wrongly.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use openvla::image::RgbImage;
use openvla::{Decoding, Error, OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, Spec, Variant};
use openvla_kernels::{DType, Gguf, Header, Shape, Value};
use tempfile::NamedTempFile;

#[derive(Clone)]
pub struct Model {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Shape,
    pub data: Vec<u8>,
}

/// What became of a file.
#[derive(Debug)]
pub enum Outcome {
    /// `OpenVla::open` says no, for this reason.
    Refused(String),
    /// It opens, but a step says no.
    Failed(Error),
    /// It opens, and acts.
    Acted,
}

/// The example model with one tower or two, at 4 bits.
pub fn sound(variant: Variant) -> &'static Model {
    static MODELS: [OnceLock<Model>; 2] = [const { OnceLock::new() }; 2];
    MODELS[usize::from(variant == Variant::V01)].get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint, out) = (dir.path().join("checkpoint"), dir.path().join("model.gguf"));
        openvla_example::write(&checkpoint, &Spec { variant, ..COMMITTED }).unwrap();
        let conversion = Conversion::new(&checkpoint, &Encoding::default().into()).unwrap();
        conversion.write(&out, &indicatif::ProgressBar::hidden()).unwrap();
        Model::read(&Gguf::open(&out).unwrap())
    })
}

impl Model {
    fn read(file: &Gguf) -> Self {
        let tensor = |t: &openvla_kernels::TensorInfo| Tensor {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape,
            data: file.bytes()[t.range.clone()].to_vec(),
        };
        let tensors = file.tensors().iter().map(tensor).collect();
        Self { metadata: file.metadata().clone(), tensors }
    }

    pub fn with(&self, key: &str, value: impl Into<Value>) -> Self {
        let mut model = self.clone();
        model.metadata.insert(key.to_owned(), value.into());
        model
    }

    pub fn without(&self, key: &str) -> Self {
        let mut model = self.clone();
        model.metadata.remove(key).expect(key);
        model
    }

    /// The same with one tensor changed.
    pub fn with_tensor(&self, name: &str, change: impl FnOnce(&mut Tensor)) -> Self {
        let mut model = self.clone();
        change(model.tensors.iter_mut().find(|t| t.name == name).expect(name));
        model
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = Header::default();
        self.metadata.iter().for_each(|(key, value)| header.set(key, value.clone()));
        self.tensors.iter().for_each(|t| header.tensor(&t.name, t.dtype, t.shape));
        let mut bytes = header.encode();
        for tensor in &self.tensors {
            bytes.extend(&tensor.data);
            bytes.resize(bytes.len().next_multiple_of(openvla_kernels::ALIGNMENT), 0);
        }
        bytes
    }

    pub fn outcome(&self) -> Outcome {
        outcome(&self.bytes(), Decoding::Actions)
    }
}

/// Opens a file and, if it opens, acts once for each data set.
pub fn outcome(bytes: &[u8], decoding: Decoding) -> Outcome {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(&file, bytes).unwrap();
    let mut options = Options::default();
    (options.n_threads, options.decoding) = (1, decoding);
    let mut policy = match OpenVla::open(&file, &options) {
        Ok(policy) => policy,
        Err(error) => return Outcome::Refused(error.to_string()),
    };
    let image = RgbImage::from_fn(20, 14, |x, y| [x as u8 * 9, y as u8 * 17, 99].into());
    let datasets: Vec<_> = policy.config().statistics.datasets().keys().take(3).cloned().collect();
    for dataset in &datasets {
        match policy.act(&image, "pick up the cup", Some(dataset)) {
            Ok(action) => assert!(action.action.iter().all(|x| x.is_finite()), "{action:?}"),
            Err(error) => return Outcome::Failed(error),
        }
    }
    Outcome::Acted
}

/// The file must be refused for a reason that says `wanted`.
pub fn refused(model: &Model, wanted: &str) {
    match model.outcome() {
        Outcome::Refused(why) => assert!(why.contains(wanted), "{why}\nwanted: {wanted}"),
        other => panic!("{other:?}\nwanted: {wanted}"),
    }
}

/// No case may make the process hold much more than the models themselves need.
pub fn memory_stayed_small() {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kilobytes < 1 << 20, "the process held {kilobytes} kB at one time");
}
