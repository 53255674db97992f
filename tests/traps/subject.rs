//! Models to break, and how far from the reference they are then.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use openvla::image::RgbImage;
use openvla::{Config, Network};
use openvla_convert::Conversion;
use openvla_convert::mapper::MappedTensor;
use openvla_convert::plan::PlannedTensor;
use openvla_example::{COMMITTED, table_image};
use openvla_kernels::{ALIGNMENT, Backend, DType, Gguf, Header, Shape, TensorInfo};
use serde_json::Value;

use crate::by_hand::worst;
use crate::common::{Stage, TOLERANCE, floats, ids, json, of, picture};
use crate::suite::{Suite, Want};

/// A broken fact is off by this many times what the engine may be.
pub const FAR: f64 = 10.0;

/// Features, soft tokens and first logits.
pub type Stages<T> = [T; 3];

/// A model and what it is given.
#[derive(Clone)]
pub struct Case {
    pub config: Config,
    pub tensors: BTreeMap<String, (Shape, Vec<f32>)>,
    pub planes: Vec<f32>,
    pub ids: Vec<u32>,
}

/// A checkpoint's case as it should be, and what the reference computes of it.
pub struct Subject {
    pub name: &'static str,
    pub dir: PathBuf,
    /// Tensors of the checkpoint that were left out.
    pub unused: Vec<String>,
    /// Tensors of the file.
    pub plan: Vec<PlannedTensor>,
    pub instruction: String,
    pub case: Case,
    /// Some or all elements, by their place.
    pub want: Stages<Vec<(usize, f32)>>,
    pub got: Stages<Vec<f32>>,
}

pub static SUBJECTS: LazyLock<[Subject; 2]> = LazyLock::new(|| [example(), of_reference()]);

pub fn example() -> Subject {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let expected = &json(&here.join("example/expected.json"))["openvla"];
    let case = &expected["cases"][0];
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("traps");
    openvla_example::write(&dir, &COMMITTED).unwrap();
    let pairs = |at: &Value, values: &Value| -> Vec<(usize, f32)> {
        let values = floats(values).into_iter().map(|x| x as f32);
        ids(at).iter().map(|i| *i as usize).zip(values).collect()
    };
    let probe = |name: &str| pairs(&expected[name]["at"], &expected[name]["values"]);
    let joined = |(name, dim, before): (&str, usize, usize)| {
        probe(name).into_iter().map(move |(i, x)| (i / dim * 96 + before + i % dim, x))
    };
    let logits = &case["logits_first"];
    let top = pairs(&logits["top"], &logits["top_values"]);
    let want = [
        [("vit0", 32, 0), ("vit1", 64, 32)].into_iter().flat_map(joined).collect(),
        probe("projector"),
        [top, pairs(&logits["at"], &logits["values"])].concat(),
    ];
    Subject::new("example", dir, &table_image(), case, want)
}

pub fn of_reference() -> Subject {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("traps_reference");
    let suite = Suite::written_to(&dir, "openvla");
    let case = &suite.cases[0];
    let Want { features, soft, first_logits, .. } = suite.want(case);
    let want = [features, soft, first_logits].map(|all| all.into_iter().enumerate().collect());
    let image = picture(&suite.file(case, "image"));
    Subject::new("reference", dir, &image, case, want)
}

impl Subject {
    pub fn new(
        name: &'static str,
        dir: PathBuf,
        image: &RgbImage,
        case: &Value,
        want: Stages<Vec<(usize, f32)>>,
    ) -> Self {
        let conversion = Conversion::new(&dir, &of("F32")).unwrap();
        let planes = conversion.config.preprocess.planes(image).unwrap();
        let instruction = &case["instruction"];
        let case = Case::of(&conversion, planes, ids(&case["prompt_ids"]));
        let got = case.run();
        let Conversion { mapping, plan, .. } = conversion;
        let instruction = instruction.as_str().unwrap().to_owned();
        Self { name, dir, unused: mapping.unused, plan, instruction, case, want, got }
    }

    /// Checks that a stage of the unbroken model is the reference's.
    pub fn holds(&self, stage: Stage) {
        let (error, limit) = (self.error(stage, &self.got), TOLERANCE[0].1[stage as usize]);
        eprintln!("{:9} {stage:?} off by {error:.1e}", self.name);
        assert!(error <= limit, "{}: {stage:?} is off by {error:.1e}", self.name);
    }

    /// How far a stage is from the reference, at its worst element.
    pub fn error(&self, stage: Stage, got: &Stages<Vec<f32>>) -> f64 {
        let (want, got) = (&self.want[stage as usize], &got[stage as usize]);
        let differences = want.iter().map(|(i, want)| f64::from(got[*i] - want));
        worst(differences)
    }

    /// What a tensor of the file is made of.
    pub fn part(&self, name: &str) -> &MappedTensor {
        let parts = self.plan.iter().map(|planned| &planned.tensor);
        parts.into_iter().find(|part| part.name == name).unwrap_or_else(|| panic!("no {name}"))
    }
}

impl Case {
    pub fn of(conversion: &Conversion, planes: Vec<f32>, ids: Vec<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        conversion.write(&path, &indicatif::ProgressBar::hidden()).unwrap();
        let file = Gguf::open(&path).unwrap();
        let tensor = |info: &TensorInfo| {
            (info.name.clone(), (info.shape, info.dtype.decode(&file.bytes()[info.range.clone()])))
        };
        let tensors = file.tensors().iter().map(tensor).collect();
        Self { config: Config::read(&file).unwrap(), tensors, planes, ids }
    }

    pub fn write(&self, path: &Path) {
        let mut header = Header::default();
        self.config.write(&mut header);
        self.tensors.iter().for_each(|(name, (shape, _))| header.tensor(name, DType::F32, *shape));
        let mut bytes = header.encode();
        for (_, data) in self.tensors.values() {
            bytes.extend(data.iter().flat_map(|x| x.to_le_bytes()));
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        }
        std::fs::write(path, bytes).unwrap();
    }

    pub fn run(&self) -> Stages<Vec<f32>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        self.write(&path);
        let (file, backend) = (Gguf::open(&path).unwrap(), Backend::cpu(1).unwrap());
        let mut network = Network::load(&file, &self.config, &backend, &|_| 0, false).unwrap();
        let features = network.encode(&self.planes).unwrap();
        let soft = network.project(&features).unwrap();
        let logits = network.prefill(&self.ids, &soft).unwrap().logits().to_vec();
        [network.features(), network.soft_tokens(), logits]
    }

    pub fn data(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }

    pub fn data_mut(&mut self, name: &str) -> &mut [f32] {
        &mut self.tensors.get_mut(name).unwrap_or_else(|| panic!("no {name}")).1
    }
}

/// Checks that `stage` is the reference's, and with the change no longer is.
pub fn broken(what: &str, stage: Stage, change: impl Fn(&mut Case)) {
    for subject in &*SUBJECTS {
        subject.holds(stage);
        let mut case = subject.case.clone();
        change(&mut case);
        let error = subject.error(stage, &case.run());
        let far = FAR * TOLERANCE[0].1[stage as usize];
        eprintln!("{:9} {what}: {stage:?} off by {error:.1e}", subject.name);
        assert!(error > far, "{}, {what}: {stage:?} is off by {error:.1e} only", subject.name);
    }
}
