//! The published files around openvla-7b, which are beside the repository, without their weights: they
//! give the plan that the reference's module tree expects.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use openvla::tokenizer::Tokenizer;
use openvla::{ActionSpace, Config, Error, Resize, Statistics, prompt};
use openvla_convert::checkpoint::{Checkpoint, CheckpointInfo, StatisticsText};
use openvla_convert::describe::{Pictures, describe};
use openvla_convert::mapping::mapping;
use openvla_kernels::{Gguf, Header};
use serde_json::Value;

use crate::common::{ids, json, real_configs, shared};
use crate::model;

fn config_of(dir: &Path, encoding: &str) -> Config {
    let (info, (shapes, _)) = (CheckpointInfo::open(dir).unwrap(), model("openvla"));
    let mapping = mapping(&info.config, &shapes, false).unwrap();
    let statistics = StatisticsText::of(&info).unwrap().parse().unwrap();
    describe(
        &info,
        statistics,
        &shapes,
        &mapping,
        None,
        Pictures::default(),
        encoding.parse().unwrap(),
    )
    .unwrap()
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
#[ignore = "needs ../shared"]
fn the_indices_list_the_references_tensors() {
    let (shapes, _) = model("openvla");
    for folder in ["openvla-7b", "openvla-7b-oft-libero-10", "lora-merged-libero"] {
        let index = json(&real_configs().join(folder).join("model.safetensors.index.json"));
        let names: BTreeSet<&String> = index["weight_map"].as_object().unwrap().keys().collect();
        assert_eq!(names, shapes.keys().collect(), "{folder}");
        let n_param: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(index["metadata"]["total_size"], 2 * n_param, "{folder}");
    }
}

#[test]
#[ignore = "needs ../shared"]
fn the_settings_give_the_layout_that_the_examples_give() {
    let dir = real_configs().join("openvla-7b");
    let (shapes, ours) = model("openvla");
    let theirs = mapping(&CheckpointInfo::open(&dir).unwrap().config, &shapes, false).unwrap();
    assert_eq!(theirs.llama, ours.llama);
    assert_eq!((theirs.towers, theirs.projector), (ours.towers, ours.projector));
    let stated = json(&dir.join("config.json"))["text_config"].clone();
    let stated: Vec<&String> = stated.as_object().unwrap().keys().collect();
    assert_eq!(stated, ["model_type", "pad_token_id", "torch_dtype", "vocab_size"]);
}

#[test]
#[ignore = "needs ../shared"]
fn the_published_files_are_read_as_they_are() {
    let dir = real_configs().join("openvla-7b");
    let config = config_of(&dir, "Q8_0");
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
            .all(|d| d.action.mask == [[true; 6].as_slice(), &[false]].concat())
    );
    // Without its shards the folder is incomplete, which the index tells.
    let error = Checkpoint::open(&dir, None).err().unwrap().to_string();
    assert!(
        error.contains("model-00001-of-00003.safetensors; is the checkpoint complete?"),
        "{error}"
    );
}

#[test]
#[ignore = "needs ../shared"]
fn the_published_tokenizer_gives_the_references_ids() {
    let config = config_of(&real_configs().join("openvla-7b"), "Q8_0");
    let vocabulary = &config.vocabulary;
    assert_eq!((vocabulary.tokens.len(), vocabulary.merges.len()), (32_064, 61_249));
    assert_eq!(
        (vocabulary.unknown, vocabulary.bos, vocabulary.eos, vocabulary.padding),
        (0, 1, 2, 32_000)
    );
    let tokenizer = Tokenizer::new(vocabulary).unwrap();
    for case in json(&shared().join("public/cases.json"))["cases"].as_array().unwrap() {
        let got = config.prompt.ids(&tokenizer, case["instruction"].as_str().unwrap()).unwrap();
        assert_eq!(got, ids(&case["prompt_ids"]), "{}", case["id"]);
    }
    let mut header = Header::default();
    config.write(&mut header);
    let file = Gguf::built_in("published", header.encode().leak()).unwrap();
    assert!(Config::read(&file).unwrap() == config, "the file's keys hold all of it");
}

#[test]
#[ignore = "needs ../shared"]
fn a_merged_fine_tune_has_its_own_statistics() {
    let (merged, base) =
        (real_configs().join("lora-merged-libero"), real_configs().join("openvla-7b"));
    let (_root, dir) = completed(&merged, &base, "openvla-7b-finetuned-libero");
    let config = config_of(&dir, "Q8_0");
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
    let alone =
        std::fs::read_to_string(real_configs().join("libero_10_dataset_statistics.json")).unwrap();
    assert!(Statistics::parse(alone).unwrap().select(Some("libero_10")).is_ok());
}

/// Nothing but its head's file tells an OpenVLA-OFT checkpoint from OpenVLA's.
#[test]
#[ignore = "needs ../shared"]
fn an_oft_checkpoint_is_known_by_its_action_head() {
    let (oft, base) =
        (real_configs().join("openvla-7b-oft-libero-10"), real_configs().join("openvla-7b"));
    let config = |dir: &Path| std::fs::read(dir.join("config.json")).unwrap();
    assert!(config(&oft) == config(&base));
    let (_root, dir) = completed(&oft, &base, "openvla-7b-oft");
    let statistics =
        StatisticsText::of(&CheckpointInfo::open(&dir).unwrap()).unwrap().parse().unwrap();
    assert_eq!(statistics.datasets().keys().collect::<Vec<_>>(), ["libero_10_no_noops"]);
    assert!(CheckpointInfo::open(&dir).unwrap().run.is_none());
    std::fs::write(dir.join("action_head--150000_checkpoint.pt"), "").unwrap();
    let run = CheckpointInfo::open(&dir).unwrap().run.expect("an OpenVLA-OFT run");
    assert_eq!(run.names().collect::<Vec<_>>(), ["action_head--150000_checkpoint.pt"]);
}
