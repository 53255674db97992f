//! The published files around openvla-7b give the plan that the reference's module tree expects.
//!
//! Needs `../shared` (the files without their weights, and `golden/facts.json`, counted on the
//! reference's modules); says so and passes where it is not.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use common::{goldens, ids, json, real_configs};
use openvla::tokenizer::Tokenizer;
use openvla::{ActionSpace, Config, Error, LlamaConfig, Resize, Statistics, TowerConfig, prompt};
use openvla_convert::describe::describe;
use openvla_convert::names::{Layout, Role, Shapes, layout};
use openvla_convert::plan::{Encoding, Planned, plan, summary};
use openvla_convert::settings::HfConfig;
use openvla_convert::source::{Files, Source, StatisticsText};
use openvla_kernels::{DType, Gguf, Header};
use serde_json::{Value, json};

const DINOV2: &str = "vision_backbone.featurizer";
const SIGLIP: &str = "vision_backbone.fused_featurizer";
/// SigLIP's blocks that run, their channels, and the columns of zeros that each MLP gets.
const PADDED: [u64; 3] = [26, 1152, 16];

/// What the reference counts: `dinosiglip` is openvla-7b, `v01` openvla-v01-7b.
fn facts(model: &str) -> Option<Value> {
    goldens().map(|golden| json(&golden.join("facts.json"))[model].take())
}

fn shapes(facts: &Value) -> Shapes {
    serde_json::from_value::<Vec<(String, Vec<usize>)>>(facts["tensors"].clone())
        .unwrap()
        .into_iter()
        .collect()
}

/// openvla-7b's shapes and layout.
fn published(dir: &Path, facts: &Value) -> (Shapes, Layout) {
    let (files, shapes) = (Files::open(dir).unwrap(), shapes(facts));
    let layout = layout(&files.config, &shapes).unwrap();
    (shapes, layout)
}

/// openvla-v01-7b's layout. Its `config.json` differs from openvla-7b's in these keys.
fn v01(facts: &Value) -> Option<Layout> {
    let mut config = json(&real_configs()?.join("openvla-7b/config.json"));
    config["timm_model_ids"] = json!(["vit_so400m_patch14_siglip_224"]);
    config["timm_override_act_layers"] = json!([null]);
    config["use_fused_vision_backbone"] = json!(false);
    config["llm_backbone_id"] = json!("vicuna-v15-7b");
    let config: HfConfig = serde_json::from_value(config).unwrap();
    Some(layout(&config, &shapes(facts)).unwrap())
}

fn config_of(dir: &Path, facts: &Value, encoding: &str) -> Config {
    let (shapes, layout) = published(dir, facts);
    let files = Files::open(dir).unwrap();
    let statistics = StatisticsText::of(&files).unwrap().parse().unwrap();
    describe(&files, statistics, &shapes, &layout, encoding.parse().unwrap()).unwrap()
}

/// `dir` under another name, with what `base` holds beside it.
fn completed(dir: &Path, base: &Path, name: &str) -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join(name);
    std::fs::create_dir(&folder).unwrap();
    for entry in [dir, base].iter().flat_map(|from| std::fs::read_dir(from).unwrap()) {
        let entry = entry.unwrap();
        let _there_already =
            std::os::unix::fs::symlink(entry.path(), folder.join(entry.file_name()));
    }
    (root, folder)
}

#[test]
fn every_tensor_of_the_index_is_accounted_for() {
    let (Some(real), Some(facts)) = (real_configs(), facts("dinosiglip")) else { return };
    let (shapes, layout) = published(&real.join("openvla-7b"), &facts);
    for folder in ["openvla-7b", "openvla-7b-oft-libero-10", "lora-merged-libero"] {
        let index = json(&real.join(folder).join("model.safetensors.index.json"));
        let names: BTreeSet<&String> = index["weight_map"].as_object().unwrap().keys().collect();
        assert_eq!(names.len(), 982);
        assert_eq!(names, shapes.keys().collect(), "{folder}");
        let n_param: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(index["metadata"]["total_size"], 2 * n_param, "{folder}");
    }
    let accounted: Vec<&String> = sources(&layout).chain(&layout.unused).collect();
    assert_eq!(accounted.len(), 982, "each once");
    assert_eq!(accounted.into_iter().collect::<BTreeSet<_>>(), shapes.keys().collect());
}

/// The checkpoint's tensors that are in the file. Of the head some rows are there twice.
fn sources(layout: &Layout) -> impl Iterator<Item = &String> {
    let once = layout.parts.iter().filter(|part| part.role != Role::ActionHead);
    once.flat_map(|part| &part.sources)
}

/// Parameters by the names that `facts.json` has for the model's parts.
fn components(layout: &Layout, shapes: &Shapes) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    let used = sources(layout).map(|name| (name, "used"));
    for (name, how) in used.chain(layout.unused.iter().map(|name| (name, "unused"))) {
        let parts: Vec<&str> = name.split('.').collect();
        let component = match parts[..] {
            ["vision_backbone", tower, ..] => format!("vision.{tower}.{how}"),
            ["projector", ..] => "projector".into(),
            ["language_model", "model", "embed_tokens", ..] => "llama.embed_tokens".into(),
            ["language_model", "lm_head", ..] => "llama.lm_head".into(),
            _ => "llama.layers+norm".into(),
        };
        *count.entry(component).or_default() += shapes[name].iter().product::<usize>();
    }
    count
}

#[test]
fn used_and_unused_parameters_are_the_references() {
    let (Some(real), Some(facts)) = (real_configs(), facts("dinosiglip")) else { return };
    let (shapes, layout) = published(&real.join("openvla-7b"), &facts);
    assert_eq!(json!(components(&layout, &shapes)), facts["components"]);
    let unused = [
        (format!("{DINOV2}.blocks.23."), 14),
        (format!("{DINOV2}.norm."), 2),
        (format!("{SIGLIP}.blocks.26."), 12),
        (format!("{SIGLIP}.norm."), 2),
        (format!("{SIGLIP}.attn_pool."), 13),
    ];
    for (part, n) in &unused {
        assert_eq!(
            layout.unused.iter().filter(|name| name.starts_with(part)).count(),
            *n,
            "{part}"
        );
    }
    assert_eq!(layout.unused.len(), unused.iter().map(|(_, n)| n).sum::<usize>());
}

#[test]
fn sizes_are_the_references() {
    let (Some(real), Some(facts)) = (real_configs(), facts("dinosiglip")) else { return };
    let (_, layout) = published(&real.join("openvla-7b"), &facts);
    let tower = |name: &str, dim, n_layer, n_ff, n_prefix| TowerConfig {
        name: name.into(),
        dim,
        n_layer,
        n_head: 16,
        n_ff,
        eps: 1e-6,
        n_prefix,
        layer_scale: n_prefix > 0,
    };
    assert_eq!(facts["depth"], json!({"featurizer": 24, "fused_featurizer": 27}));
    let dinov2 = tower("dinov2", 1024, 23, 4096, 5);
    let siglip = tower("siglip", 1152, 26, 4304 + 16, 0);
    assert_eq!(layout.towers, [dinov2, siglip.clone()]);
    assert_eq!(layout.projector, [2176, 8704, 4096, 4096]);
    assert_eq!((layout.patch_size, layout.n_patch), (14, 256));
    // All but `n_vocab` are LlamaConfig's defaults, which the file leaves out.
    let llama = LlamaConfig {
        dim: 4096,
        n_layer: 32,
        n_head: 32,
        n_head_kv: 32,
        n_ff: 11_008,
        n_vocab: 32_064,
        n_ctx: 2048,
        eps: 1e-6,
        rope_base: 10_000.0,
    };
    assert_eq!(layout.llama, llama);
    let stated = json(&real.join("openvla-7b/config.json"))["text_config"].clone();
    let stated: Vec<&String> = stated.as_object().unwrap().keys().collect();
    assert_eq!(stated, ["model_type", "pad_token_id", "torch_dtype", "vocab_size"]);
    assert_eq!((llama.head_dim(), siglip.dim / siglip.n_head), (128, 72));
}

#[test]
fn v01_is_accounted_for_too() {
    let Some(facts) = facts("v01") else { return };
    let Some(layout) = v01(&facts) else { return };
    let shapes = shapes(&facts);
    assert_eq!(json!(shapes.len()), facts["n_tensors"]);
    let towers: Vec<_> = layout.towers.iter().map(|t| (t.name.as_str(), t.n_layer)).collect();
    assert_eq!(towers, [("siglip", 26)]);
    assert_eq!(layout.projector, [1152, 4096, 4096]);
    assert_eq!(json!(components(&layout, &shapes)), facts["components"]);
}

/// `facts.json` estimates files with patch embeddings and SigLIP's `fc2` in f16, and everything
/// but the towers in one type. Ours hold the patches in f32, `fc2` padded and in blocks, projector
/// and head in better types, and the action head twice. The rest is equal to the byte.
#[test]
fn file_sizes_are_the_estimated_ones() {
    let (Some(real), Some(fused), Some(single)) =
        (real_configs(), facts("dinosiglip"), facts("v01"))
    else {
        return;
    };
    let [blocks, dim, zeros] = PADDED;
    let models = [
        (published(&real.join("openvla-7b"), &fused).1, 1024 + 1152, fused),
        (v01(&single).unwrap(), 1152, single),
    ];
    for (layout, channels, facts) in models {
        let (q8_0, q4_0) = (|n: u64| n / 32 * 34, |n: u64| n / 32 * 18);
        let patches = 3 * 14 * 14 * channels * (4 - 2);
        let fc1 = blocks * (q8_0(zeros * dim) + 4 * zeros);
        let [fc2, f16] = [q8_0((4304 + zeros) * dim), 2 * 4304 * dim].map(|bytes| blocks * bytes);
        let head = 32_064 * 4096;
        let projector: u64 = layout.projector.windows(2).map(|w| (w[0] * w[1]) as u64).sum();
        let raised = head / 256 * 210 - q4_0(head) + q8_0(projector) - q4_0(projector);
        for (encoding, estimate, better) in
            [("Q8_0", "q8_0_everything", 0), ("Q4_0", "q4_0_llm_q8_0_vision", raised)]
        {
            let plan = plan(&layout, encoding.parse().unwrap(), &[]).unwrap();
            let bytes: usize = plan.iter().map(Planned::bytes).sum();
            let estimate = &facts["gguf_size_estimates_unused_dropped"][estimate]["bytes"];
            let action_head = 256 * 4096 * 2;
            let wanted =
                estimate.as_u64().unwrap() + patches + fc1 + fc2 - f16 + better + action_head;
            assert_eq!(bytes as u64, wanted, "{encoding}");
        }
    }
}

/// What the README's table says: no row of the published model has to fall back but those of
/// the projector's first layer, which are 8 bits anyway.
#[test]
fn every_type_is_possible_for_the_published_model() {
    let (Some(real), Some(facts)) = (real_configs(), facts("dinosiglip")) else { return };
    let (_, layout) = published(&real.join("openvla-7b"), &facts);
    for encoding in Encoding::ALL {
        let plan = plan(&layout, encoding, &[]).unwrap();
        eprint!("{}\n{}", encoding.name, summary(&plan));
        let bits = 8.0 * plan.iter().map(Planned::bytes).sum::<usize>() as f64;
        let elements: usize = plan.iter().map(|p| p.part.shape.iter().product::<usize>()).sum();
        let matrices = plan.iter().filter(|p| p.part.role != Role::Plain);
        let full = matrices.filter(|p| p.dtype == DType::F16 || p.dtype == DType::F32).count();
        assert_eq!(full > 0, ["F16", "F32"].contains(&encoding.name), "{}", encoding.name);
        eprintln!("{:.2} bits per weight", bits / elements as f64);
    }
}

#[test]
fn the_published_files_are_read_as_they_are() {
    let (Some(real), Some(facts)) = (real_configs(), facts("dinosiglip")) else { return };
    let dir = real.join("openvla-7b");
    let config = config_of(&dir, &facts, "Q8_0");
    let general = &config.general;
    assert_eq!((general.name.as_str(), general.finetune.as_deref()), ("OpenVLA 7B v1.0", None));
    assert_eq!(general.license.as_deref(), Some("llama2"));
    assert_eq!(config.prompt.template, prompt::OPENVLA);
    assert_eq!(config.prompt.suffix, 29_871);
    assert_eq!(config.actions, ActionSpace { end: 32_000, n_bin: 256 });
    assert_eq!(config.actions.ids(), 31_744..32_000);
    // Rounded to bf16, unlike the `means` and `stds` beside them.
    assert_eq!((config.preprocess.size, config.preprocess.resize), (224, Resize::Naive));
    let [dinov2, siglip] = config.preprocess.towers[..] else { panic!("two towers") };
    assert_eq!(dinov2.mean, [0.484_375, 0.455_078_13, 0.406_25]);
    assert_eq!(dinov2.std, [0.228_515_63, 0.223_632_81, 0.224_609_38]);
    assert_eq!((siglip.mean, siglip.std), ([0.5; 3], [0.5; 3]));
    let stated = json(&dir.join("config.json"))["norm_stats"].clone();
    let kept: Value = serde_json::from_str(config.statistics.json()).unwrap();
    assert_eq!((config.statistics.datasets().len(), kept), (25, stated));
    assert!(
        config
            .statistics
            .datasets()
            .values()
            .all(|d| d.mask == [[true; 6].as_slice(), &[false]].concat())
    );
    // Without its shards the folder is incomplete, which the index tells.
    let error = Source::open(&dir).err().unwrap().to_string();
    assert!(
        error.contains("model-00001-of-00003.safetensors; is the checkpoint complete?"),
        "{error}"
    );
}

#[test]
fn the_published_tokenizer_gives_the_references_ids() {
    let (Some(real), Some(golden), Some(facts)) = (real_configs(), goldens(), facts("dinosiglip"))
    else {
        return;
    };
    let config = config_of(&real.join("openvla-7b"), &facts, "Q8_0");
    let vocabulary = &config.vocabulary;
    assert_eq!((vocabulary.tokens.len(), vocabulary.merges.len()), (32_064, 61_249));
    assert_eq!(
        (vocabulary.unknown, vocabulary.bos, vocabulary.eos, vocabulary.padding),
        (0, 1, 2, 32_000)
    );
    let tokenizer = Tokenizer::new(vocabulary).unwrap();
    for case in json(&golden.join("public/cases.json"))["cases"].as_array().unwrap() {
        let got = config.prompt.ids(&tokenizer, case["instruction"].as_str().unwrap()).unwrap();
        assert_eq!(got, ids(&case["prompt_ids"]), "{}", case["id"]);
    }
    let mut header = Header::default();
    config.write(&mut header);
    let file = Gguf::built_in("published", header.encode().leak()).unwrap();
    assert!(Config::read(&file).unwrap() == config, "the file's keys hold all of it");
}

#[test]
fn a_merged_fine_tune_has_its_own_statistics() {
    let (Some(real), Some(facts)) = (real_configs(), facts("dinosiglip")) else { return };
    let (merged, base) = (real.join("lora-merged-libero"), real.join("openvla-7b"));
    let (_root, dir) = completed(&merged, &base, "openvla-7b-finetuned-libero");
    let config = config_of(&dir, &facts, "Q8_0");
    assert_eq!(config.general.name, "OpenVLA 7B libero v1.0");
    let names: Vec<&String> = config.statistics.datasets().keys().collect();
    assert_eq!(
        names,
        ["10", "goal", "object", "spatial"].map(|s| format!("libero_{s}_no_noops")).each_ref()
    );
    let found = config.statistics.select(Some("libero_goal")).unwrap().0;
    assert_eq!(found, "libero_goal_no_noops");
    let base = config.statistics.select(Some("bridge_orig"));
    assert!(
        matches!(base, Err(Error::UnknownStatistics { .. })),
        "config.json still has the base's"
    );
    let alone = std::fs::read_to_string(real.join("libero_10_dataset_statistics.json")).unwrap();
    assert!(Statistics::parse(alone).unwrap().select(Some("libero_10")).is_ok());
}

/// Nothing but its head's file tells an OpenVLA-OFT checkpoint from OpenVLA's.
#[test]
fn an_oft_checkpoint_is_known_by_its_action_head() {
    let Some(real) = real_configs() else { return };
    let (oft, base) = (real.join("openvla-7b-oft-libero-10"), real.join("openvla-7b"));
    let config = |dir: &Path| std::fs::read(dir.join("config.json")).unwrap();
    assert!(config(&oft) == config(&base));
    let (_root, dir) = completed(&oft, &base, "openvla-7b-oft");
    let statistics = StatisticsText::of(&Files::open(&dir).unwrap()).unwrap().parse().unwrap();
    assert_eq!(statistics.datasets().keys().collect::<Vec<_>>(), ["libero_10_no_noops"]);
    std::fs::write(dir.join("action_head--150000_checkpoint.pt"), "").unwrap();
    let error = Files::open(&dir).err().unwrap().to_string();
    assert!(error.contains("it is an OpenVLA-OFT checkpoint"), "{error}");
}
