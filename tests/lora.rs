//! LoRA adapters: merged as the reference merges them, and refused where they do not fit.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{Stage, assert_close, floats, goldens, ids, json, picture, tensors};
use half::bf16;
use openvla::{Decoding, OpenVla};
use openvla_convert::{Conversion, Options};
use openvla_kernels::Gguf;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// F32, with an adapter.
fn merging(adapter: &Path) -> Options {
    Options { adapter: Some(adapter.to_owned()), ..common::of("F32") }
}

/// A checkpoint with an adapter, converted to F32.
fn merge(checkpoint: &Path, adapter: &Path, out: &Path) -> anyhow::Result<()> {
    let conversion = Conversion::new(checkpoint, &merging(adapter))?;
    conversion.write(out, &indicatif::ProgressBar::hidden())
}

/// Every stage and every token of the reference, for adapters with and without the copy of the
/// head that peft saves beside its own tensors.
#[test]
fn merged_models_are_the_references() {
    let Some(golden) = goldens() else { return };
    let index = json(&golden.join("public/lora/cases.json"));
    let dir = tempfile::tempdir().unwrap();
    for adapter in ["public/lora_adapter", "extra/lora_adapter_as_saved"] {
        let path = dir.path().join("model.gguf");
        merge(&golden.join("public/ckpt"), &golden.join(adapter), &path).unwrap();
        let mut options = openvla::Options::default();
        options.decoding = Decoding::Reference;
        let mut policy = OpenVla::open(&path, &options).unwrap();
        for case in index["cases"].as_array().unwrap() {
            holds(&mut policy, case, &golden.join("public/lora"));
        }
    }
}

fn holds(policy: &mut OpenVla, case: &Value, dir: &Path) {
    let file = |key: &str| dir.join(case[key].as_str().unwrap());
    let (want, image) = (tensors(&file("tensors")), picture(&file("image")));
    let planes = policy.config().preprocess.planes(&image).unwrap();
    let prompt = policy.prompt_ids(case["instruction"].as_str().unwrap()).unwrap();
    let network = policy.network();
    network.see(&planes).unwrap();
    network.project().unwrap();
    let (soft, logits) = (network.soft_tokens(), network.prefill(&prompt).unwrap());
    assert_close("merged", "F32", Stage::Soft, &soft, &want["projector_output"]);
    assert_close("merged", "F32", Stage::Logits, &logits, &want["logits_first"]);
    let instruction = case["instruction"].as_str().unwrap();
    let got = policy.act(&image, instruction, case["unnorm_key"].as_str()).unwrap();
    assert_eq!(got.tokens, ids(&case["last_n_ids_used_by_reference"]));
    assert_eq!(got.action, floats(&case["action"]));
}

/// Modules of the example that an adapter here changes: a permuted matrix, a padded one, a
/// convolution, and one that the model never reads.
const MODULES: [&str; 4] = [
    "language_model.model.layers.1.self_attn.q_proj",
    "vision_backbone.fused_featurizer.blocks.0.mlp.fc2",
    "vision_backbone.featurizer.patch_embed.proj",
    "vision_backbone.fused_featurizer.attn_pool.q",
];
const RANK: usize = 4;

type Tensor = (Vec<usize>, Vec<f32>);

fn checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("example/openvla-example")
}

fn of_bf16(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let number = |b: &[u8; 2]| bf16::from_le_bytes(*b).to_f32();
    let numbers = |view: &TensorView<'_>| view.data().as_chunks().0.iter().map(number).collect();
    file.iter().map(|(n, view)| (n.to_owned(), (view.shape().to_vec(), numbers(&view)))).collect()
}

fn save(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let bytes: BTreeMap<_, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, x))| (name, x.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let view = |(name, (shape, _)): (&String, &Tensor)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).unwrap())
    };
    std::fs::write(path, safetensors::serialize(tensors.iter().map(view), None).unwrap()).unwrap();
}

/// Both halves for each module, in shapes as peft saves them.
fn adapter() -> BTreeMap<String, Tensor> {
    let base = of_bf16(&checkpoint().join("model.safetensors"));
    let wave = |shape: &[usize], k: f32| {
        let n: usize = shape.iter().product();
        (shape.to_vec(), (0..n).map(|i| (i as f32 * k).sin() * 0.1).collect())
    };
    let mut halves = BTreeMap::new();
    for module in MODULES {
        let shape = &base[&format!("{module}.weight")].0;
        let (mut a, mut b) = (shape.clone(), vec![1; shape.len()]);
        (a[0], b[0], b[1]) = (RANK, shape[0], RANK);
        let name = |half: &str| format!("base_model.model.{module}.{half}.weight");
        halves.insert(name("lora_A"), wave(&a, 0.37));
        halves.insert(name("lora_B"), wave(&b, 0.73));
    }
    halves
}

fn config() -> Value {
    json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "bias": "none", "use_dora": false,
           "rank_pattern": {}, "modules_to_save": null})
}

/// An adapter's folder.
fn folder(config: &Value, tensors: &BTreeMap<String, Tensor>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    save(&dir.path().join("adapter_model.safetensors"), tensors);
    dir
}

#[test]
fn merging_is_adding_the_scaled_product() {
    let adapter = adapter();
    let mut merged = of_bf16(&checkpoint().join("model.safetensors"));
    for module in MODULES {
        let half = |half: &str| &adapter[&format!("base_model.model.{module}.{half}.weight")].1;
        let (a, b) = (half("lora_A"), half("lora_B"));
        let weight = &mut merged.get_mut(&format!("{module}.weight")).unwrap().1;
        let n_in = a.len() / RANK;
        for (i, weight) in weight.iter_mut().enumerate() {
            let (row, column) = (i / n_in, i % n_in);
            let dot: f32 = (0..RANK).map(|r| b[row * RANK + r] * a[r * n_in + column]).sum();
            *weight += 2.0 / RANK as f32 * dot;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(checkpoint()).unwrap().map(|file| file.unwrap()) {
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    save(&dir.path().join("model.safetensors"), &merged);
    let [by_hand, by_us, base] =
        ["by-hand", "by-us", "base"].map(|name| dir.path().join(name).with_extension("gguf"));
    common::convert(dir.path(), "F32", &by_hand);
    common::convert(&checkpoint(), "F32", &base);
    merge(&checkpoint(), folder(&config(), &adapter).path(), &by_us).unwrap();
    let [by_hand, by_us, base] = [by_hand, by_us, base].map(|path| Gguf::open(&path).unwrap());
    let mut changed = 0;
    for i in 0..by_us.tensors().len() {
        let [want, got, base] = [&by_hand, &by_us, &base].map(|file| {
            let tensor = &file.tensors()[i];
            tensor.dtype.decode(&file.bytes()[tensor.range.clone()])
        });
        let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-6, "{}: {off}", by_us.tensors()[i].name);
        changed += usize::from(got != base);
    }
    assert_eq!(changed, 3, "three of the four modules are in the file");
}

#[test]
fn the_statistics_beside_an_adapter_are_the_models() {
    let dir = folder(&config(), &adapter());
    let statistics = r#"{"my_robot": {"action": {"q01": [0, 0], "q99": [1, 2]}}}"#;
    std::fs::write(dir.path().join("dataset_statistics.json"), statistics).unwrap();
    let conversion = Conversion::new(&checkpoint(), &merging(dir.path())).unwrap();
    assert_eq!(conversion.config.statistics.select(None).unwrap().0, "my_robot");
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let refused = |config: &Value, tensors: &BTreeMap<String, Tensor>, words: &[&str]| {
        let dir = folder(config, tensors);
        let error = Conversion::new(&checkpoint(), &merging(dir.path()));
        let error = format!("{:#}", error.err().expect("refused"));
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    };
    let with = |key: &str, value: Value| {
        let mut config = config();
        config[key] = value;
        config
    };
    let adapter = adapter();
    refused(&with("use_dora", json!(true)), &adapter, &["use_dora"]);
    refused(&with("use_rslora", json!(true)), &adapter, &["use_rslora"]);
    refused(&with("rank_pattern", json!({"fc1": 8})), &adapter, &["rank_pattern"]);
    refused(&with("bias", json!("all")), &adapter, &["bias"]);
    refused(&with("peft_type", json!("IA3")), &adapter, &["IA3", "LORA"]);
    refused(&with("r", json!(0)), &adapter, &["r is 0"]);
    refused(&with("r", json!(8)), &adapter, &["rank 8", "shape"]);
    let renamed = |from: &str, to: &str| {
        let name = |name: &String| name.replace(from, to);
        adapter.iter().map(|(n, tensor)| (name(n), tensor.clone())).collect::<BTreeMap<_, _>>()
    };
    refused(&config(), &renamed("layers.1", "layers.40"), &["layers.40", "another model"]);
    let mut more = adapter.clone();
    more.insert("base_model.model.x.lora_magnitude_vector".into(), (vec![1], vec![1.0]));
    refused(&config(), &more, &["lora_magnitude_vector", "neither lora_A"]);
    let mut half = adapter.clone();
    half.retain(|name, _| !name.contains("q_proj.lora_B"));
    refused(&config(), &half, &["it lacks", "q_proj.lora_B"]);
    let mut scalar = adapter.clone();
    scalar.values_mut().for_each(|tensor| *tensor = (vec![], vec![1.0]));
    refused(&config(), &scalar, &["shape []"]);
    let empty = tempfile::tempdir().unwrap();
    let error = Conversion::new(&checkpoint(), &merging(empty.path()));
    let error = format!("{:#}", error.err().unwrap());
    assert!(error.contains("not a folder with a LoRA adapter"), "{error}");
}
