//! LoRA adapters: merged as the reference merges them, and refused where they do not fit.

mod common;
#[path = "common/suite.rs"]
mod suite;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{Stage, assert_close, floats, ids, picture};
use half::bf16;
use openvla::{Decoding, OpenVla};
use openvla_convert::{Conversion, Options};
use openvla_kernels::Gguf;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use suite::Suite;

/// F32, with an adapter.
fn merging(adapter: &Path) -> Options {
    Options { adapter: Some(adapter.to_owned()), ..common::of("F32") }
}

/// A checkpoint with an adapter, converted to F32.
fn merge(checkpoint: &Path, adapter: &Path, out: &Path) -> anyhow::Result<()> {
    let conversion = Conversion::new(checkpoint, &merging(adapter))?;
    conversion.write(out, &indicatif::ProgressBar::hidden())
}

/// Every stage and every token of the reference, for an adapter as peft saves it.
#[test]
fn merged_models_are_the_references() {
    let suite = Suite::committed("lora");
    merged_as_the_reference(&suite, &suite.dir.join("adapter"));
}

fn merged_as_the_reference(suite: &Suite, adapter: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    merge(&suite.checkpoint, adapter, &path).unwrap();
    let mut options = openvla::Options::default();
    options.decoding = Decoding::Reference;
    let mut policy = OpenVla::open(&path, &options).unwrap();
    for case in &suite.cases {
        holds(&mut policy, case, suite);
    }
}

fn holds(policy: &mut OpenVla, case: &Value, suite: &Suite) {
    let (want, image) = (suite.want(case), picture(&suite.file(case, "image")));
    let planes = policy.config().preprocess.planes(&image).unwrap();
    let prompt = policy.prompt_ids(case["instruction"].as_str().unwrap()).unwrap();
    let network = policy.network();
    let features = network.encode(&planes).unwrap();
    let projected = network.project(&features).unwrap();
    let soft = network.soft_tokens();
    let logits = network.prefill(&prompt, &projected).unwrap().logits().to_vec();
    assert_close("merged", "F32", Stage::Soft, &soft, &want.soft);
    assert_close("merged", "F32", Stage::Logits, &logits, &want.first_logits);
    let instruction = case["instruction"].as_str().unwrap();
    let got = policy.act(&image, instruction, case["unnorm_key"].as_str()).unwrap();
    assert_eq!(got.tokens, ids(&case["last_n_ids_used_by_reference"]));
    assert_eq!(got.action, floats(&case["action"]));
}

mod shared {
    use super::*;

    /// With and without the copy of the head that peft saves beside its own tensors.
    #[test]
    #[ignore = "needs ../shared/golden"]
    fn merged_models_are_the_references() {
        let suite = Suite::shared("public/lora");
        for adapter in ["public/lora_adapter", "extra/lora_adapter_as_saved"] {
            merged_as_the_reference(&suite, &common::shared().join(adapter));
        }
    }
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
    let conversion = || Conversion::new(&checkpoint(), &merging(dir.path())).unwrap();
    let bare = conversion();
    let warning = bare.warnings.join("");
    for word in ["base model's", "finetune.py", "dataset_statistics.json", "--statistics"] {
        assert!(warning.contains(word), "{warning}");
    }
    let path = dir.path().join("dataset_statistics.json");
    std::fs::write(&path, r#"{"my_robot": {"action": {"q01": [0, 0], "q99": [1, 2]}}}"#).unwrap();
    let tuned = conversion();
    assert_eq!(tuned.config.statistics.select(None).unwrap().0, "my_robot");
    assert_eq!((tuned.statistics, tuned.warnings.len()), (path.display().to_string(), 0));
    // Named outright, they win over those beside the adapter.
    let statistics = Some(checkpoint().join("dataset_statistics.json"));
    let named = Options { statistics, ..merging(dir.path()) };
    let named = Conversion::new(&checkpoint(), &named).unwrap();
    assert_eq!(named.config.statistics, bare.config.statistics);
    assert_eq!(named.warnings, [""; 0]);
}

/// All tensors of the model that an adapter of these settings makes.
fn merged(config: &Value, tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let (dir, out) = (folder(config, tensors), tempfile::tempdir().unwrap());
    let out = out.path().join("model.gguf");
    merge(&checkpoint(), dir.path(), &out).unwrap();
    let file = Gguf::open(&out).unwrap();
    file.bytes()[file.tensors()[0].range.start..].to_vec()
}

/// As peft 0.21 writes them, and as peft computes them.
#[test]
fn settings_mean_what_they_mean_to_peft() {
    let adapter = adapter();
    let plain = merged(&config(), &adapter);
    let with = |change: Value| {
        let mut config = config();
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        config
    };
    let off = json!({
        "alora_invocation_tokens": null, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": "x", "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": ["lm_head"], "inference_mode": true,
        "layer_replication": null, "layers_pattern": null, "layers_to_transform": [],
        "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.1, "megatron_config": null,
        "megatron_core": "megatron.core", "peft_version": "0.21.2", "qalora_group_size": 16,
        "revision": null, "target_modules": ["q_proj", "fc2", "proj", "q"], "target_parameters": [],
        "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null,
        "use_qalora": false, "use_rslora": false, "what_comes_next": null,
    });
    assert!(merged(&with(off), &adapter) == plain);
    for start in [json!(true), json!(false), json!("gaussian"), json!("Gaussian"), Value::Null] {
        assert!(merged(&with(json!({"init_lora_weights": start})), &adapter) == plain);
    }
    // alpha/√r with a rank of 4.
    let by_root = with(json!({"use_rslora": true}));
    assert!(merged(&by_root, &adapter) == merged(&with(json!({"lora_alpha": 4})), &adapter));
    assert!(merged(&by_root, &adapter) != plain);
}

#[test]
fn adapters_that_change_nothing_or_not_all_they_should_are_warned_of() {
    let warnings = |config: &Value, tensors: &BTreeMap<String, Tensor>| {
        let dir = folder(config, tensors);
        let conversion = Conversion::new(&checkpoint(), &merging(dir.path())).unwrap();
        conversion.warnings.join("\n")
    };
    let with = |key: &str, value: Value| {
        let mut config = config();
        config[key] = value;
        config
    };
    let (trained, mut untrained) = (adapter(), adapter());
    let halves = untrained.iter_mut().filter(|(name, _)| name.contains("lora_B"));
    halves.for_each(|(_, (_, numbers))| numbers.fill(0.0));
    assert!(!warnings(&config(), &trained).contains("adapter in"));
    assert!(warnings(&config(), &untrained).contains("changes nothing"));
    assert!(warnings(&with("lora_alpha", json!(0)), &trained).contains("changes nothing"));
    let names = json!(["q_proj", "0.mlp.fc2", "patch_embed.proj", "attn_pool.q"]);
    let said = warnings(&with("target_modules", names), &trained);
    assert!(said.contains("3 of 7 layers") && said.contains("complete?"), "{said}");
    let listed = with("target_modules", json!(MODULES));
    assert!(!warnings(&listed, &trained).contains("complete?"));
}

/// Peft saves the frozen weights of some layers too, and loads them over the checkpoint's.
#[test]
fn copies_of_the_base_models_weights_must_be_the_checkpoints() {
    let base = of_bf16(&checkpoint().join("model.safetensors"));
    let head = "language_model.lm_head";
    let mut adapter = adapter();
    let plain = merged(&config(), &adapter);
    for copy in [format!("{head}.base_layer.weight"), format!("{head}.weight")] {
        let copy = format!("base_model.model.{copy}");
        let (shape, numbers) = base[&format!("{head}.weight")].clone();
        adapter.insert(copy.clone(), (shape.clone(), numbers.clone()));
        assert!(merged(&config(), &adapter) == plain, "equal in another type of float");
        let mut other = numbers;
        *other.last_mut().unwrap() += 0.5;
        adapter.insert(copy.clone(), (shape, other));
        refused(&config(), &adapter, &[&copy, "trained on another base model"]);
        adapter.remove(&copy);
    }
}

#[test]
fn an_adapters_number_that_is_none_is_named() {
    let name = format!("base_model.model.{}.lora_B.weight", MODULES[1]);
    let mut adapter = adapter();
    adapter.get_mut(&name).unwrap().1[5] = f32::NAN;
    let (dir, out) = (folder(&config(), &adapter), tempfile::tempdir().unwrap());
    let error = merge(&checkpoint(), dir.path(), &out.path().join("model.gguf")).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains(&format!("{name} holds NaN, its number 5")), "{error}");
}

/// OpenVLA-OFT's trainer leaves its adapter in a folder of the run, beside the head's file.
#[test]
fn adapters_of_openvla_oft_are_refused() {
    let adapter = folder(&config(), &adapter());
    let run = tempfile::tempdir().unwrap();
    let inside = run.path().join("lora_adapter");
    std::fs::rename(adapter.keep(), &inside).unwrap();
    let conversion = || Conversion::new(&checkpoint(), &merging(&inside)).map(drop);
    conversion().unwrap();
    for place in [run.path(), &inside] {
        let head = place.join("action_head--10000_checkpoint.pt");
        std::fs::write(&head, "").unwrap();
        let error = format!("{:#}", conversion().unwrap_err());
        assert!(error.contains("OpenVLA-OFT run") && error.contains("--base"), "{error}");
        std::fs::remove_file(head).unwrap();
    }
}

/// The adapter must be refused, for a reason with these words.
#[track_caller]
fn refused(config: &Value, tensors: &BTreeMap<String, Tensor>, words: &[&str]) {
    let dir = folder(config, tensors);
    let error = Conversion::new(&checkpoint(), &merging(dir.path()));
    let error = format!("{:#}", error.err().expect("refused"));
    assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let with = |key: &str, value: Value| {
        let mut config = config();
        config[key] = value;
        config
    };
    let adapter = adapter();
    for (key, value) in [
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("rank_pattern", json!({"fc1": 8})),
        ("alpha_pattern", json!({"fc1": 8})),
        ("modules_to_save", json!(["lm_head"])),
        ("layer_replication", json!([[0, 1]])),
        ("lora_bias", json!(true)),
        ("trainable_token_indices", json!([1])),
        ("alora_invocation_tokens", json!([1])),
        ("use_qalora", json!(true)),
        ("exclude_modules", json!(".*fc1")),
        ("what_comes_next", json!("on")),
    ] {
        refused(&with(key, value), &adapter, &[key, "merge_and_unload"]);
    }
    let starts = [
        "pissa",
        "pissa_niter_16",
        "olora",
        "loftq",
        "corda",
        "eva",
        "lora_ga",
        "orthogonal",
        "new",
    ];
    for start in starts {
        let start = json!(start);
        refused(
            &with("init_lora_weights", start.clone()),
            &adapter,
            &["init_lora_weights", &start.to_string(), "merge_and_unload"],
        );
    }
    for (key, value) in
        [("target_modules", json!(["fc2", "proj", "q"])), ("exclude_modules", json!(["q_proj"]))]
    {
        refused(&with(key, value), &adapter, &["does not target", "self_attn.q_proj"]);
    }
    refused(&with("layers_to_transform", json!([7])), &adapter, &["does not target"]);
    refused(&with("layers_to_transform", json!(7)), &adapter, &["does not target"]);
    refused(&with("lora_alpha", json!("NaN")), &adapter, &["adapter_config.json"]);
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
    refused(&config(), &BTreeMap::new(), &["holds no LoRA tensor", "zero_to_fp32.py"]);
    let mut emptied = adapter.clone();
    emptied.values_mut().for_each(|tensor| *tensor = (vec![0], vec![]));
    refused(&config(), &emptied, &["of shape [0]", "zero_to_fp32.py"]);
    let empty = tempfile::tempdir().unwrap();
    let error = Conversion::new(&checkpoint(), &merging(empty.path()));
    let error = format!("{:#}", error.err().unwrap());
    assert!(error.contains("not a folder with a LoRA adapter"), "{error}");
}
