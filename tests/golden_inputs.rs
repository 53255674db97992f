//! What goes into the model, against the reference: every preprocessed byte and plane, every
//! prompt's ids, with the example's vocabulary and with Llama-2's where `../shared` is.

mod common;
#[path = "common/suite.rs"]
mod suite;

use std::path::Path;

use common::{ids, json, picture};
use openvla::prompt::{OPENVLA, Prompt, V01};
use openvla::tokenizer::{Tokenizer, Vocabulary};
use openvla::{Normalize, Preprocess, Profile, Resize};
use serde_json::Value;
use suite::{Suite, sha256_of};

const DINOV2: Normalize = Normalize { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
const SIGLIP: Normalize = Normalize { mean: [0.5; 3], std: [0.5; 3] };

#[test]
fn preprocessing_is_the_references_to_the_bit() {
    let golden = common::committed();
    let cases = json(&golden.join("preprocess.json"))["cases"].take();
    assert_eq!(cases.as_array().unwrap().len(), 31);
    preprocess_as_the_reference(&golden, &cases);
}

fn preprocess_as_the_reference(dir: &Path, cases: &Value) {
    for case in cases.as_array().unwrap() {
        let id = case["id"].as_str().unwrap();
        let resize = match case["strategy"].as_str().unwrap() {
            "resize-naive" => Resize::Naive,
            "resize-crop" => Resize::Crop,
            "letterbox" => Resize::Letterbox { fill: [127; 3] },
            other => panic!("{id}: {other}"),
        };
        let towers =
            if case["fused"].as_bool().unwrap() { vec![DINOV2, SIGLIP] } else { vec![SIGLIP] };
        let preprocess =
            Preprocess { profile: Profile::Raw, center_crop: false, size: 224, resize, towers };
        let image = picture(&dir.join(case["input"].as_str().unwrap()));
        // The planes' hash says as much, but not where they differ.
        if let Some(square) = case["expected_u8"].as_str() {
            let (got, want) = (preprocess.square(&image).unwrap(), picture(&dir.join(square)));
            assert!(got == want, "{id} {resize:?}: bytes differ");
        }
        let planes = preprocess.planes(&image).unwrap();
        let want = case["pixel_values_f32_sha256"].as_str().unwrap();
        assert_eq!(sha256_of(&planes), want, "{id} {resize:?}");
    }
}

/// In both templates, with the tokenizer read from `tokenizer.json` and from `tokenizer.model` alone.
#[test]
fn prompts_are_the_references_ids() {
    let cases = json(&common::committed().join("prompts.json"))["cases"].take();
    assert_eq!(cases.as_array().unwrap().len(), 47);
    for name in ["openvla", "v01"] {
        let suite = Suite::committed(name);
        assert_eq!(suite.checkpoint.join("tokenizer.json").exists(), name == "openvla");
        let vocabulary = openvla_convert::tokenizer::read(&suite.checkpoint, 768).unwrap();
        have_the_references_ids(name, &vocabulary, 352, &cases);
    }
}

fn have_the_references_ids(name: &str, vocabulary: &Vocabulary, suffix: u32, cases: &Value) {
    let tokenizer = Tokenizer::new(vocabulary).unwrap();
    for case in cases.as_array().unwrap() {
        let instruction = case["instruction"].as_str().unwrap();
        for (key, template) in [("openvla", OPENVLA), ("v01", V01)] {
            let prompt = Prompt::new(template.into(), suffix).unwrap();
            let want = &case[key];
            assert_eq!(prompt.text(instruction), want["prompt"].as_str().unwrap());
            let got = tokenizer.encode(want["prompt"].as_str().unwrap()).unwrap();
            assert_eq!(got, ids(&want["ids"]), "{name}: {instruction:?}");
            let got = prompt.ids(&tokenizer, instruction).unwrap();
            assert_eq!(got, ids(&want["model_input_ids"]), "{name}: {instruction:?}");
        }
        let raw = tokenizer.encode(instruction).unwrap();
        assert_eq!(raw[1..], ids(&case["raw_ids_no_bos"]), "{name}: {instruction:?}");
    }
}

mod shared {
    use super::*;

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn preprocessing_is_the_references_to_the_bit() {
        let golden = common::shared().join("preprocess");
        let cases = json(&golden.join("index.json"))["cases"].take();
        assert!(cases.as_array().unwrap().len() >= 23);
        preprocess_as_the_reference(&golden, &cases);
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn prompts_are_the_references_ids() {
        let golden = common::shared();
        let cases = json(&golden.join("tokenizer/prompts.json"))["cases"].take();
        assert_eq!(cases.as_array().unwrap().len(), 70);
        for checkpoint in ["public/ckpt", "extra/ckpt_v01"] {
            let vocabulary =
                openvla_convert::tokenizer::read(&golden.join(checkpoint), 32_064).unwrap();
            assert_eq!(vocabulary.merges.len(), 61_249, "{checkpoint}");
            have_the_references_ids(checkpoint, &vocabulary, 29_871, &cases);
        }
    }
}
