//! The ten facts about OpenVLA that are got wrong most often, one test each.
//!
//! Most break their fact on purpose: the model as converted gives the reference's numbers, and the
//! broken one is far off. A fact whose break made no difference would not be tested by the rest.
//!
//! The subject is the example checkpoint, whose numbers an independent implementation computed, and
//! the reference's own tiny one where `../shared/golden` is. All of it runs in F32.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::{Stage, TOLERANCE, floats, goldens, ids, json, picture, tensors};
use openvla::image::imageops::{FilterType, resize};
use openvla::image::{DynamicImage, ImageFormat, Rgba, RgbaImage};
use openvla::{ActionSpace, Config, Dataset, Decoding, Network, OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::names::Layout;
use openvla_convert::plan::Encoding;
use openvla_convert::source::HfLlama;
use openvla_example::{COMMITTED, table_image};
use openvla_kernels::{Backend, DType, Gguf, Header, Shape};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A broken fact is off by this many times what the engine may be.
const FAR: f64 = 10.0;

/// Features, soft tokens and first logits.
type Stages<T> = [T; 3];

/// A model and what it is given.
#[derive(Clone)]
struct Case {
    config: Config,
    tensors: BTreeMap<String, (Shape, Vec<f32>)>,
    planes: Vec<f32>,
    ids: Vec<u32>,
}

/// A checkpoint's case as it should be, and what the reference computes of it.
struct Subject {
    name: &'static str,
    dir: PathBuf,
    layout: Layout,
    case: Case,
    /// Some or all elements, by their place.
    want: Stages<Vec<(usize, f32)>>,
    got: Stages<Vec<f32>>,
}

static SUBJECTS: LazyLock<Vec<Subject>> = LazyLock::new(|| {
    let mut subjects = vec![example()];
    subjects.extend(goldens().map(|golden| of_reference(&golden)));
    subjects
});

fn example() -> Subject {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let expected = &json(&here.join("example/expected.json"))["openvla"];
    let case = &expected["cases"][0];
    let dir = tempfile::tempdir().unwrap().keep();
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

fn of_reference(golden: &Path) -> Subject {
    let dir = golden.join("public");
    let case = &json(&dir.join("cases.json"))["cases"][2];
    let fixture = tensors(&dir.join(case["tensors"].as_str().unwrap()));
    let towers = ["vit0_patch_features", "vit1_patch_features"].map(|name| &fixture[name]);
    let patch = |i: usize| towers.iter().flat_map(move |t| t.chunks(t.len() / 256).nth(i).unwrap());
    let features: Vec<f32> = (0..256).flat_map(patch).copied().collect();
    let want = [&features, &fixture["projector_output"], &fixture["logits_first"]]
        .map(|values| values.iter().copied().enumerate().collect());
    let image = picture(&dir.join(case["image"].as_str().unwrap()));
    Subject::new("reference", dir.join("ckpt"), &image, case, want)
}

impl Subject {
    fn new(
        name: &'static str,
        dir: PathBuf,
        image: &openvla::image::RgbImage,
        case: &Value,
        want: Stages<Vec<(usize, f32)>>,
    ) -> Self {
        let conversion = Conversion::new(&dir, "F32".parse().unwrap()).unwrap();
        let (planes, ids) = (conversion.config.preprocess.planes(image).unwrap(), ids(&case["prompt_ids"]));
        let case = Case::of(&conversion, planes, ids);
        let got = case.run();
        let subject = Self { name, dir, layout: conversion.layout, case, want, got };
        for (stage, limit) in TOLERANCE[0].1.into_iter().enumerate() {
            let error = subject.error(stage, &subject.got);
            assert!(error <= limit, "{name}: stage {stage} is off by {error:.1e}");
        }
        subject
    }

    /// How far a stage is from the reference, at its worst element.
    fn error(&self, stage: usize, got: &Stages<Vec<f32>>) -> f64 {
        let differences = self.want[stage].iter().map(|(i, want)| f64::from(got[stage][*i] - want));
        differences.fold(0.0, |worst, x| worst.max(x.abs()))
    }

    /// Of layer `NAME`: the weight's rows and the bias.
    fn linear(&self, name: &str) -> (impl Iterator<Item = &[f32]> + Clone, &[f32]) {
        let (shape, weight) = &self.case.tensors[&format!("{name}.weight")];
        (weight.chunks(shape[0]), &self.case.tensors[&format!("{name}.bias")].1)
    }
}

impl Case {
    fn of(conversion: &Conversion, planes: Vec<f32>, ids: Vec<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        conversion.write(&path, &indicatif::ProgressBar::hidden()).unwrap();
        let file = Gguf::open(&path).unwrap();
        let tensor = |info: &openvla_kernels::TensorInfo| {
            (info.name.clone(), (info.shape, info.dtype.decode(&file.bytes()[info.range.clone()])))
        };
        let tensors = file.tensors().iter().map(tensor).collect();
        Self { config: Config::read(&file).unwrap(), tensors, planes, ids }
    }

    fn write(&self, path: &Path) {
        let mut header = Header::default();
        self.config.write(&mut header);
        self.tensors.iter().for_each(|(name, (shape, _))| header.tensor(name, DType::F32, *shape));
        let mut bytes = header.encode();
        for (_, data) in self.tensors.values() {
            bytes.extend(data.iter().flat_map(|x| x.to_le_bytes()));
            bytes.resize(bytes.len().next_multiple_of(openvla_kernels::ALIGNMENT), 0);
        }
        std::fs::write(path, bytes).unwrap();
    }

    fn run(&self) -> Stages<Vec<f32>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        self.write(&path);
        let (file, backend) = (Gguf::open(&path).unwrap(), Backend::cpu(1).unwrap());
        let mut network = Network::load(&file, &self.config, &backend).unwrap();
        network.see(&self.planes).unwrap();
        network.project().unwrap();
        let logits = network.prefill(&self.ids).unwrap();
        [network.features(), network.soft_tokens(), logits]
    }

    fn data(&mut self, name: &str) -> &mut Vec<f32> {
        &mut self.tensors.get_mut(name).unwrap_or_else(|| panic!("no {name}")).1
    }
}

/// Holds that with the change, `stage` no longer is the reference's.
fn broken(what: &str, stage: Stage, change: impl Fn(&mut Case)) {
    for subject in &*SUBJECTS {
        let mut case = subject.case.clone();
        change(&mut case);
        let error = subject.error(stage as usize, &case.run());
        let far = FAR * TOLERANCE[0].1[stage as usize];
        eprintln!("{:9} {what}: {stage:?} off by {error:.1e}", subject.name);
        assert!(error > far, "{}, {what}: {stage:?} is off by {error:.1e} only", subject.name);
    }
}

#[test]
fn fact_1_the_epsilon_of_rms_norm_is_1e_6() {
    let eps = |json| serde_json::from_str::<HfLlama>(json).unwrap().rms_norm_eps;
    assert_eq!(eps("{}"), 1e-6, "what the published config.json leaves out");
    assert_eq!(eps(r#"{"rms_norm_eps": 1e-5}"#), 1e-5, "what it says counts");
    assert!(SUBJECTS.iter().all(|subject| subject.case.config.llama.eps == 1e-6));
    broken("Llama-2's own epsilon", Stage::Logits, |case| case.config.llama.eps = 1e-5);
}

#[test]
fn fact_2_features_come_from_the_second_to_last_block_without_norm_and_pooling() {
    for subject in &*SUBJECTS {
        let left_out = |name: &String| {
            let of = |part| name.contains(part);
            let last = subject.case.config.towers.iter().any(|t| of(&format!(".blocks.{}.", t.n_layer)));
            last || of("featurizer.norm.") || of("featurizer.attn_pool.")
        };
        let odd = subject.layout.unused.iter().find(|name| !left_out(name));
        assert_eq!(odd, None, "{}: left out", subject.name);
        let mut conversion = Conversion::new(&subject.dir, "F32".parse().unwrap()).unwrap();
        for tower in &mut conversion.config.towers {
            let (last, next) = (format!("{}.blk.{}.", tower.name, tower.n_layer - 1), tower.n_layer);
            let mut block = conversion.plan.clone();
            block.retain(|planned| planned.part.name.starts_with(&last));
            assert!(!block.is_empty());
            for mut planned in block {
                let part = &mut planned.part;
                part.name = part.name.replace(&last, &format!("{}.blk.{next}.", tower.name));
                let source = |name: &String| name.replace(&format!(".blocks.{}.", next - 1), &format!(".blocks.{next}."));
                part.sources = part.sources.iter().map(source).collect();
                conversion.plan.push(planned);
            }
            tower.n_layer += 1;
        }
        let Case { planes, ids, .. } = subject.case.clone();
        let error = subject.error(0, &Case::of(&conversion, planes, ids).run());
        eprintln!("{:9} all blocks: off by {error:.1e}", subject.name);
        assert!(error > 0.1, "{}: the last block changes nothing", subject.name);
    }
}
