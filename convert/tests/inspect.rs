//! `openvla-convert inspect` as people and programs meet it, and what it makes of other files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use openvla::{ActionCard, Statistics};
use openvla_convert::Conversion;
use openvla_convert::cards::cards;
use openvla_convert::checkpoint::{CheckpointInfo, HubRevision, StatisticsText};
use openvla_convert::describe::{Pictures, describe};
use openvla_convert::mapper::Shapes;
use openvla_convert::mapping::mapping;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, Spec, Variant};
use openvla_kernels::{Gguf, Header};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

/// A converted example checkpoint from a folder of that name.
fn converted(root: &Path, name: &str, variant: Variant, encoding: &str) -> PathBuf {
    let folder = root.join(name);
    openvla_example::write(&folder, &Spec { variant, ..COMMITTED }).unwrap();
    let conversion =
        Conversion::new(&folder, &encoding.parse::<Encoding>().unwrap().into()).unwrap();
    let file = root.join("model.gguf");
    conversion.write(&file, &indicatif::ProgressBar::hidden()).unwrap();
    file
}

fn inspect(file: &Path, flags: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_openvla-convert");
    Command::new(program).arg("inspect").arg(file).args(flags).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty());
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn facts(file: &Path) -> Value {
    serde_json::from_str(&stdout(&inspect(file, &["--json"]))).unwrap()
}

/// A refusal: exit code 1, nothing on stdout, and words that help.
fn assert_refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty());
    assert!(said.starts_with("error: ") && !said.trim_end().contains(char::is_control), "{said:?}");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in:\n{said}");
    }
}

#[test]
fn people_read_what_a_file_is_and_holds() {
    let root = tempfile::tempdir().unwrap();
    let name = "openvla-7b-finetuned-libero-spatial";
    let file = converted(root.path(), name, Variant::OpenVla, "IQ4_NL");
    let said = stdout(&inspect(&file, &[]));
    for line in [
        "OpenVLA 424K libero-spatial v1.0\n".to_owned(),
        "tuned for   libero-spatial\n".to_owned(),
        "license     llama2, Llama 2 Community License".to_owned(),
        format!("converter   openvla-convert {}\n", env!("CARGO_PKG_VERSION")),
        "checksums   in the file\n".to_owned(),
        "  llama           IQ4_NL       14        69,632   38.25 KiB\n".to_owned(),
        "image: 224 x 224 by resize-naive, patches of 14\n".to_owned(),
        r"prompt: In: What action should the robot take to {instruction}?\nOut:, then id"
            .to_owned(),
        "data set example_tabletop: 7 dimensions, rate unknown, gripper unknown\n".to_owned(),
        "  yaw          -0.20340      0.19870  as recorded  yes\n".to_owned(),
    ] {
        assert!(said.contains(&line), "{line:?} is missing in:\n{said}");
    }
    assert!(!said.contains("tuned from"), "no base of 424K is known");
}

#[test]
fn programs_read_the_same() {
    let root = tempfile::tempdir().unwrap();
    let file = converted(root.path(), "openvla-7b", Variant::OpenVla, "IQ4_NL");
    let found = facts(&file);
    let bytes = std::fs::metadata(&file).unwrap().len();
    assert_eq!(found["file_bytes"], bytes);
    assert_eq!(found["type"], "IQ4_NL");
    let general = &found["general"];
    assert_eq!([&general["finetune"], &general["base_models"]], [&Value::Null, &json!([])]);
    assert!(general["organization"].is_null(), "a folder's name does not say who made it");
    assert_eq!(general["source"]["fingerprint"].as_str().unwrap().len(), 16);
    let tensors = found["tensors"].as_array().unwrap();
    let sum = |what: &str| tensors.iter().map(|group| group[what].as_u64().unwrap()).sum::<u64>();
    let gguf = Gguf::open(&file).unwrap();
    assert_eq!(sum("tensors"), gguf.tensors().len() as u64);
    assert_eq!(found["tensor_bytes"], sum("bytes"));
    assert_eq!(sum("bytes"), gguf.tensors().iter().map(|t| t.range.len() as u64).sum::<u64>());
    let components: Vec<_> = tensors.iter().map(|group| group["component"].as_str()).collect();
    for component in ["dinov2", "siglip", "projector", "token_embedding", "llama", "head"] {
        assert!(components.contains(&Some(component)), "{component} of {components:?}");
    }
    assert!(!components.contains(&Some("others")));
    assert_eq!(found["prompt"]["template"], openvla::prompt::OPENVLA);
    assert_eq!(found["actions"]["token_count"], 256);
    let x = &found["datasets"]["example_tabletop"]["dimensions"][0];
    let wanted = json!({"name": "x", "unit": "as recorded", "q01": -0.0262, "q99": 0.0281,
                        "normalised": true});
    assert_eq!(*x, wanted);
    assert_eq!([&found["checksums"], &found["reference_cases"]], [true, false]);
}

#[test]
fn three_data_sets_are_shown_and_one_can_be_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let file = converted(root.path(), "openvla-v01-7b", Variant::V01, "Q8_0");
    let found = facts(&file);
    assert_eq!(found["image"]["letterbox_fill"], json!([127, 127, 127]));
    assert_eq!(found["datasets"].as_object().unwrap().len(), 3);
    let dimensions = |name: &str| found["datasets"][name]["dimensions"].as_array().unwrap().clone();
    assert_eq!(dimensions("example_bimanual")[13]["name"], "13");
    assert_eq!(dimensions("example_six_axes")[5]["name"], "5");
    assert_eq!(dimensions("example_tabletop")[6]["name"], "gripper");
    let said = stdout(&inspect(&file, &[]));
    assert_eq!(said.matches("data set ").count(), 3, "{said}");
    let said = stdout(&inspect(&file, &["--dataset", "example_six_axes"]));
    assert!(said.contains("data set example_six_axes: 6 dimensions"), "{said}");
    assert!(!said.contains("bimanual"), "{said}");
    let near = inspect(&file, &["--dataset", "example_six"]);
    assert_refused(&near, &["example_six", "did you mean `example_six_axes`?"]);
    assert_eq!(inspect(&file, &["--dataset", "x", "--json"]).status.code(), Some(2));
}

/// A file with the example's metadata, changed as a program or a thief may change it.
fn changed(dir: &Path, change: impl Fn(&str, &mut openvla_kernels::Value)) -> PathBuf {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/example.gguf");
    let mut header = Header::default();
    for (key, value) in Gguf::open(&model).unwrap().metadata() {
        let mut value = value.clone();
        change(key, &mut value);
        header.set(key, value);
    }
    header.set("openvla.checksum.test", "0".to_owned());
    let file = dir.join("changed.gguf");
    std::fs::write(&file, header.encode()).unwrap();
    file
}

#[test]
fn words_of_a_file_are_shown_and_not_obeyed() {
    let root = tempfile::tempdir().unwrap();
    let evil = "\u{1b}]0;owned\u{7}\u{9b}2J\r";
    let file = changed(root.path(), |key, value| {
        if ["general.name", "general.license.link"].contains(&key) {
            *value = evil.to_owned().into();
        }
    });
    let said = stdout(&inspect(&file, &[]));
    assert!(said.starts_with(r"\u{1b}]0;owned\u{7}\u{9b}2J\r"), "{said}");
    assert!(!said.replace('\n', "").contains(char::is_control), "{said:?}");
    assert!(said.contains("checksums   in the file\n"), "{said}");
    let json = stdout(&inspect(&file, &["--json"]));
    assert!(!json.replace('\n', "").contains(char::is_control), "{json:?}");
    assert_eq!(facts(&file)["general"]["name"], evil);
    assert_eq!(facts(&file)["checksums"], true);
    let other = changed(root.path(), |key, value| {
        if key == "general.architecture" {
            *value = evil.to_owned().into();
        }
    });
    assert_refused(&inspect(&other, &[]), &[r"it is a `\u{1b}]0;owned\u{7}"]);
}

#[test]
fn other_files_are_refused_by_what_they_are() {
    let root = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = root.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let mut llama = Header::default();
    llama.set("general.architecture", "llama".to_owned());
    let refused = |path: &Path, words: &[&str]| assert_refused(&inspect(path, &["--json"]), words);
    refused(&write("llama.gguf", &llama.encode()), &["it is a `llama` model, not `openvla`"]);
    refused(&write("text.gguf", b"hello"), &["text.gguf", "not \"GGUF\""]);
    refused(&write("empty.gguf", b""), &["empty.gguf"]);
    refused(&root.path().join("nowhere.gguf"), &["nowhere.gguf"]);
    refused(root.path(), &["cannot read"]);
}

/// The example's file, and where its metadata end and the vocabulary begins.
fn example() -> &'static (Vec<u8>, usize) {
    static EXAMPLE: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
    EXAMPLE.get_or_init(|| {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/example.gguf");
        let bytes = std::fs::read(model).unwrap();
        let vocabulary = bytes.windows(20).position(|at| at == b"tokenizer.ggml.token").unwrap();
        (bytes, vocabulary)
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_byte_makes_it_panic(
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
        json in any::<bool>(),
    ) {
        let (bytes, end) = example();
        let mut bytes = bytes.clone();
        for (at, new) in changes {
            bytes[at.index(*end)] = new;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.gguf");
        std::fs::write(&file, bytes).unwrap();
        let output = inspect(&file, if json { &["--json"] } else { &[] });
        let said = String::from_utf8_lossy(&output.stderr);
        prop_assert!(matches!(output.status.code(), Some(0 | 1)), "{:?}: {}", output.status, said);
        prop_assert!(!said.contains("panicked"), "{}", said);
    }
}

/// With the published files around openvla-7b, which are beside the repository.
mod shared {
    use super::*;

    fn shared(file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(file)
    }

    fn json_of(path: &Path) -> Value {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    #[ignore = "needs ../shared"]
    fn every_published_data_set_has_a_card_and_none_has_an_invented_rate() {
        let dir = shared("real_configs");
        let of = |json: &Value| cards(&Statistics::parse(json.to_string()).unwrap());
        let published = json_of(&dir.join("openvla-7b/config.json"))["norm_stats"].take();
        let base = of(&published);
        assert_eq!(
            base.keys().collect::<Vec<_>>(),
            published.as_object().unwrap().keys().collect::<Vec<_>>()
        );
        let libero = of(&json_of(&dir.join("lora-merged-libero/dataset_statistics.json")));
        assert_eq!(libero.len(), 4);
        for (name, card) in base.iter().chain(&libero) {
            let ActionCard { dimensions, rate_hz, gripper, .. } = card;
            let names: Vec<&str> = dimensions.iter().map(|d| d.name.as_str()).collect();
            assert_eq!(names, ["x", "y", "z", "roll", "pitch", "yaw", "gripper"], "{name}");
            // The one data set whose rate sources disagree about.
            assert_eq!(rate_hz.is_none(), name == "dobbe", "{name}");
            let constant = dimensions[6].q01 == dimensions[6].q99;
            assert!(
                !(constant && gripper.is_some()),
                "{name}: nothing is known of a still gripper"
            );
            let units = dimensions[..6].iter().all(|d| d.unit == "as recorded");
            assert_eq!(units, !libero.contains_key(name), "{name}");
        }
        let rate = |name: &str| base.get(name).or_else(|| libero.get(name)).unwrap().rate_hz;
        for (name, hz) in [
            ("bridge_orig", 5.0),
            ("fractal20220817_data", 3.0),
            ("libero_goal_no_noops", 20.0),
            ("ucsd_kitchen_dataset_converted_externally_to_rlds", 2.0),
        ] {
            assert_eq!(rate(name), Some(hz), "{name}");
        }
    }

    /// The published files, described as a download whose LoRA adapter was merged; no tensors.
    #[test]
    #[ignore = "needs ../shared"]
    fn the_published_model_is_listed_and_found_by_name() {
        let mut info = CheckpointInfo::open(&shared("real_configs/openvla-7b")).unwrap();
        let facts_of_tensors =
            json_of(&shared("golden/facts.json"))["dinosiglip"]["tensors"].take();
        let tensors: Vec<(String, Vec<usize>)> = serde_json::from_value(facts_of_tensors).unwrap();
        let shapes: Shapes = tensors.into_iter().collect();
        info.hub_revision = Some(HubRevision {
            repository: "openvla/openvla-7b".into(),
            revision: "47a0ec7fc4ec123775a391911046cf33cf9ed83f".into(),
        });
        info.adapter = Some("openvla-7b+my_robot+b16".into());
        let mapping = mapping(&info.config, &shapes, false).unwrap();
        let statistics = StatisticsText::of(&info).unwrap().parse().unwrap();
        let config = describe(
            &info,
            statistics,
            &shapes,
            &mapping,
            None,
            Pictures::default(),
            "Q8_0".parse().unwrap(),
        )
        .unwrap();
        let mut header = Header::default();
        config.write(&mut header);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.gguf");
        std::fs::write(&file, header.encode()).unwrap();
        let said = stdout(&inspect(&file, &[]));
        for line in [
            "OpenVLA 7B my-robot-b16 v1.0\n",
            "tuned from  OpenVLA 7B, v1.0, OpenVLA, https://huggingface.co/openvla/openvla-7b\n",
            "source      openvla/openvla-7b at 47a0ec7fc4ec123775a391911046cf33cf9ed83f\n",
            "25 data sets; --dataset KEY shows one\n",
            "  bridge_orig: 7 dimensions, 5 Hz, gripper 1 open, 0 closed\n",
            "  dobbe: 7 dimensions, rate unknown, gripper unknown\n",
        ] {
            assert!(said.contains(line), "{line:?} is missing in:\n{said}");
        }
        let said = stdout(&inspect(&file, &["--dataset", "toto"]));
        assert!(said.contains("note: x to yaw are where to be, not how far to move"), "{said}");
        assert_eq!(facts(&file)["general"]["base_models"][0]["name"], "OpenVLA 7B");
    }
}
