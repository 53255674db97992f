//! Every stage against what the PyTorch reference computed: of the example's checkpoints, which is in
//! `tests/reference`, and of its own with Llama-2's vocabulary where `../shared` is. On a machine with
//! an NVIDIA GPU (`tests/vulkan` is for others):
//!
//! ```sh
//! OPENVLA_DEVICE=cuda cargo test --release --features cuda --test golden
//! ```

mod common;
#[path = "common/suite.rs"]
mod suite;

use common::{Stage, TOLERANCE, assert_close, devices, floats, ids, open, picture};
use openvla::{Decoding, Devices, OpenVla, Session};
use serde_json::Value;
use suite::{Suite, sha256_of};

const COMMITTED: [&str; 2] = ["openvla", "v01"];
const SHARED: [&str; 3] = ["public", "rounded", "extra/v01"];

/// Runs a suite stage by stage, each token forced to the reference's. Gives the worst error of
/// features, soft tokens and logits.
fn stages(suite: &Suite, encoding: &str) -> [f64; 3] {
    let mut policy = open(&suite.checkpoint, encoding, Decoding::Reference);
    let actions = policy.config().actions.ids().start as usize;
    let mut worst = [0.0_f64; 3];
    for case in &suite.cases {
        let id = case["id"].as_str().unwrap();
        let want = suite.want(case);
        let image = picture(&suite.file(case, "image"));
        let planes = policy.config().preprocess.planes(&image).unwrap();
        assert_eq!(sha256_of(&planes), case["pixel_values_f32_sha256"].as_str().unwrap(), "{id}");
        let prompt = policy.prompt_ids(case["instruction"].as_str().unwrap()).unwrap();
        assert_eq!(prompt, ids(&case["prompt_ids"]), "{id}: prompt ids");
        let network = policy.network();
        let encoded = network.encode(&planes).unwrap();
        let got = network.features();
        let error = assert_close(id, encoding, Stage::Features, &got, &want.features);
        worst[0] = worst[0].max(error);
        let soft = network.project(&encoded).unwrap();
        let got = network.soft_tokens();
        let error = assert_close(id, encoding, Stage::Soft, &got, &want.soft);
        worst[1] = worst[1].max(error);
        let mut sequence = network.prefill(&prompt, &soft).unwrap();
        if encoding == "F32" {
            assert_close(id, encoding, Stage::Logits, sequence.logits(), &want.first_logits);
        }
        let tokens = ids(&case["generated_ids"]);
        let rows = want.action_logits.chunks(sequence.logits().len() - actions);
        assert_eq!(rows.len(), tokens.len(), "{id}: steps");
        for (step, (row, token)) in rows.zip(&tokens).enumerate() {
            let what = format!("{id} step {step}");
            let logits = &sequence.logits()[actions..];
            let error = assert_close(&what, encoding, Stage::Logits, logits, row);
            worst[2] = worst[2].max(error);
            if step + 1 < tokens.len() {
                sequence.step(*token).unwrap();
            }
        }
    }
    worst
}

fn every_stage(suites: &[Suite], encoding: &str) {
    for suite in suites {
        let [features, soft, logits] = stages(suite, encoding);
        let name = suite.dir.file_name().unwrap().display();
        eprintln!(
            "{encoding:6} {name:9} features {features:.1e} soft {soft:.1e} logits {logits:.1e}"
        );
    }
}

fn committed() -> [Suite; 2] {
    COMMITTED.map(Suite::committed)
}

#[test]
fn f32_stages_are_the_references() {
    every_stage(&committed(), "F32");
}

#[test]
fn f16_stages_are_near_the_references() {
    every_stage(&committed(), "F16");
}

#[test]
fn bf16_stages_are_near_the_references() {
    every_stage(&committed(), "BF16");
}

#[test]
fn quantized_stages_are_near_the_references() {
    for (encoding, _) in &TOLERANCE[3..] {
        every_stage(&committed(), encoding);
    }
}

/// Real autoregressive decoding, end to end: every id and every action of the reference.
#[test]
fn f32_acts_exactly_as_the_reference() {
    act_as_the_reference(&committed());
}

mod shared {
    use super::*;

    fn suites() -> [Suite; 3] {
        SHARED.map(Suite::shared)
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn f32_stages_are_the_references() {
        every_stage(&suites(), "F32");
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn f16_and_bf16_stages_are_near_the_references() {
        every_stage(&suites(), "F16");
        every_stage(&suites(), "BF16");
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn quantized_stages_are_near_the_references() {
        for (encoding, _) in &TOLERANCE[3..] {
            every_stage(&suites(), encoding);
        }
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn f32_acts_exactly_as_the_reference() {
        act_as_the_reference(&suites());
    }
}

fn act_as_the_reference(suites: &[Suite]) {
    if devices() != Devices::Cpu {
        return eprintln!("not compared: on a GPU, near-ties may fall the other way");
    }
    for suite in suites {
        for decoding in [Decoding::Reference, Decoding::Actions] {
            let mut policy = open(&suite.checkpoint, "F32", decoding);
            for case in &suite.cases {
                acts_as(&mut policy, case, suite, decoding);
            }
        }
    }
}

fn acts_as(policy: &mut OpenVla, case: &Value, suite: &Suite, decoding: Decoding) {
    let id = case["id"].as_str().unwrap();
    let generated = ids(&case["generated_ids"]);
    let actions = policy.config().actions.ids();
    if decoding == Decoding::Actions && !generated.iter().all(|id| actions.contains(id)) {
        return; // the two modes differ on purpose
    }
    let image = picture(&suite.file(case, "image"));
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
