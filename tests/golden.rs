//! Every stage against what the reference computed, on its own tiny checkpoints.
//!
//! Needs `../shared/golden`; says so and passes where it is not. What the project can check by
//! itself is in `tests/example.rs`. On a machine with an NVIDIA GPU:
//!
//! ```sh
//! OPENVLA_DEVICE=cuda cargo test --release --features cuda --test golden
//! ```

mod common;

use std::path::Path;

use common::{
    Stage, TOLERANCE, assert_close, devices, floats, goldens, ids, json, open, picture, tensors,
};
use openvla::{Decoding, Devices, OpenVla, Session};
use serde_json::Value;

/// Folders of cases, and which files their checkpoint consists of.
const SUITES: [&str; 3] = ["public", "rounded", "extra/v01"];

/// A folder's cases, and its checkpoint in `encoding`.
fn suite(golden: &Path, name: &str, encoding: &str, decoding: Decoding) -> (OpenVla, Vec<Value>) {
    let index = json(&golden.join(name).join("cases.json"));
    let cases = index["cases"].as_array().unwrap().clone();
    if name != "rounded" {
        let checkpoint = golden.join(name).join(index["checkpoint"].as_str().unwrap());
        return (open(&checkpoint, encoding, decoding), cases);
    }
    // The public checkpoint with another preprocessor_config.json.
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden.join("public/ckpt")).unwrap() {
        let entry = entry.unwrap();
        std::os::unix::fs::symlink(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let preprocessor = dir.path().join("preprocessor_config.json");
    std::fs::remove_file(&preprocessor).unwrap();
    std::fs::copy(golden.join("rounded/preprocessor_config.json"), &preprocessor).unwrap();
    (open(dir.path(), encoding, decoding), cases)
}

/// The reference's features: DINOv2's and SigLIP's channels side by side, `[Σ dim, 256]`.
fn features(golden: &std::collections::BTreeMap<String, Vec<f32>>) -> Vec<f32> {
    let towers: Vec<_> = ["vit0_patch_features", "vit1_patch_features"]
        .iter()
        .filter_map(|name| golden.get(*name))
        .map(|tower| tower.chunks(tower.len() / 256))
        .collect();
    (0..256)
        .flat_map(|patch| towers.iter().flat_map(move |t| t.clone().nth(patch).unwrap()))
        .copied()
        .collect()
}

/// Runs a suite stage by stage, each token forced to the reference's. Gives the worst error of
/// features, soft tokens and logits.
fn stages(golden: &Path, name: &str, encoding: &str) -> [f64; 3] {
    let (mut policy, cases) = suite(golden, name, encoding, Decoding::Reference);
    let mut worst = [0.0_f64; 3];
    for case in &cases {
        let dir = golden.join(name);
        let id = case["id"].as_str().unwrap();
        let want = tensors(&dir.join(case["tensors"].as_str().unwrap()));
        let image = picture(&dir.join(case["image"].as_str().unwrap()));
        let planes = policy.config().preprocess.planes(&image).unwrap();
        let prompt = policy.prompt_ids(case["instruction"].as_str().unwrap()).unwrap();
        assert_eq!(prompt, ids(&case["prompt_ids"]), "{id}: prompt ids");
        let network = policy.network();
        let encoded = network.encode(&planes).unwrap();
        let got = network.features();
        let error = assert_close(id, encoding, Stage::Features, &got, &features(&want));
        worst[0] = worst[0].max(error);
        let soft = network.project(&encoded).unwrap();
        let got = network.soft_tokens();
        let error = assert_close(id, encoding, Stage::Soft, &got, &want["projector_output"]);
        worst[1] = worst[1].max(error);
        let mut sequence = network.prefill(&prompt, &soft).unwrap();
        if encoding == "F32" {
            assert_close(id, encoding, Stage::Logits, sequence.logits(), &want["logits_first"]);
        }
        let tokens = ids(&case["generated_ids"]);
        let rows = want["logits_action_range"].chunks(320);
        for (step, (row, token)) in rows.zip(&tokens).enumerate() {
            let what = format!("{id} step {step}");
            let error = assert_close(
                &what,
                encoding,
                Stage::Logits,
                &sequence.logits()[31_744..32_064],
                row,
            );
            worst[2] = worst[2].max(error);
            if step + 1 < tokens.len() {
                sequence.step(*token).unwrap();
            }
        }
    }
    worst
}

fn every_stage(encoding: &str) {
    let Some(golden) = goldens() else { return };
    for name in SUITES {
        let [features, soft, logits] = stages(&golden, name, encoding);
        eprintln!(
            "{encoding:6} {name:9} features {features:.1e} soft {soft:.1e} logits {logits:.1e}"
        );
    }
}

#[test]
fn f32_stages_are_the_references() {
    every_stage("F32");
}

#[test]
fn f16_and_bf16_stages_are_near_the_references() {
    every_stage("F16");
    every_stage("BF16");
}

#[test]
fn quantised_stages_are_near_the_references() {
    for (encoding, _) in &TOLERANCE[3..] {
        every_stage(encoding);
    }
}

/// Real autoregressive decoding, end to end: every id and every action of the reference.
#[test]
fn f32_acts_exactly_as_the_reference() {
    let Some(golden) = goldens() else { return };
    if devices() != Devices::Cpu {
        return eprintln!("SKIPPED: on a GPU, near-ties may fall the other way");
    }
    for name in SUITES {
        for decoding in [Decoding::Reference, Decoding::Actions] {
            let (mut policy, cases) = suite(&golden, name, "F32", decoding);
            for case in &cases {
                acts_as(&mut policy, case, &golden.join(name), decoding);
            }
        }
    }
}

fn acts_as(policy: &mut OpenVla, case: &Value, dir: &Path, decoding: Decoding) {
    let id = case["id"].as_str().unwrap();
    let generated = ids(&case["generated_ids"]);
    let actions = policy.config().actions.ids();
    if decoding == Decoding::Actions && !generated.iter().all(|id| actions.contains(id)) {
        return; // the two modes differ on purpose
    }
    let image = picture(&dir.join(case["image"].as_str().unwrap()));
    let instruction = case["instruction"].as_str().unwrap();
    let key = case["unnorm_key"].as_str();
    let plain = policy.act(&image, instruction, key).unwrap();
    assert_eq!(plain.draft.passes, generated.len(), "{id}");
    let wrong: Vec<u32> = generated.iter().map(|id| id - 1).collect();
    let half: Vec<u32> = generated.iter().enumerate().map(|(i, id)| id - i as u32 % 2).collect();
    let drafted = [generated.clone(), wrong, half].map(|guess| {
        policy.act_in(&mut Session::with_history([guess]), &image, instruction, key).unwrap()
    });
    // A prompt of 281 to 288 rows has room for fewer drafts.
    assert!(drafted[0].draft.passes <= 2, "{id}: {:?}", drafted[0].draft);
    assert_eq!(drafted[1].draft.passes, generated.len(), "{id}: all drafts are wrong");
    for got in [plain].into_iter().chain(drafted) {
        assert_eq!(got.tokens, ids(&case["last_n_ids_used_by_reference"]), "{id} {decoding:?}");
        assert_eq!(got.unconstrained.tokens, generated, "{id} {decoding:?}");
        assert_eq!(got.normalized, floats(&case["normalized_action"]), "{id}");
        assert_eq!(got.action, floats(&case["action"]), "{id}");
    }
}
