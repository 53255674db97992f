//! What goes into the model, against the reference: every preprocessed byte and plane, every
//! prompt's ids. Needs `../shared/golden`; says so and passes where it is not.

mod common;

use common::{goldens, ids, json, picture};
use openvla::prompt::{OPENVLA, Prompt, V01};
use openvla::tokenizer::Tokenizer;
use openvla::{Normalize, Preprocess, Resize};
use sha2::{Digest, Sha256};

const DINOV2: Normalize = Normalize { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
const SIGLIP: Normalize = Normalize { mean: [0.5; 3], std: [0.5; 3] };

fn sha256(planes: &[f32]) -> String {
    let bytes: Vec<u8> = planes.iter().flat_map(|x| x.to_le_bytes()).collect();
    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn preprocessing_is_the_references_to_the_bit() {
    let Some(golden) = goldens().map(|golden| golden.join("preprocess")) else { return };
    let index = json(&golden.join("index.json"));
    let cases = index["cases"].as_array().unwrap();
    assert!(cases.len() >= 23);
    for case in cases {
        let id = case["id"].as_str().unwrap();
        let resize = match case["strategy"].as_str().unwrap() {
            "resize-naive" => Resize::Naive,
            "resize-crop" => Resize::Crop,
            "letterbox" => Resize::Letterbox { fill: [127; 3] },
            other => panic!("{id}: {other}"),
        };
        let towers = match case["fused"].as_bool().unwrap() {
            true => vec![DINOV2, SIGLIP],
            false => vec![SIGLIP],
        };
        let preprocess = Preprocess { size: 224, resize, towers };
        let image = picture(&golden.join(case["input"].as_str().unwrap()));
        let square = preprocess.square(&image).unwrap();
        let want = picture(&golden.join(case["expected_u8"].as_str().unwrap()));
        assert!(square == want, "{id} {resize:?}: bytes differ");
        let planes = preprocess.planes(&image).unwrap();
        let want = case["pixel_values_f32_sha256"].as_str().unwrap();
        assert_eq!(sha256(&planes), want, "{id} {resize:?}");
    }
}

/// All 70 instructions in both templates, with the tokenizer read from `tokenizer.json` and from
/// `tokenizer.model` alone.
#[test]
fn prompts_are_the_references_ids() {
    let Some(golden) = goldens() else { return };
    let prompts = json(&golden.join("tokenizer/prompts.json"));
    let cases = prompts["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 70);
    for checkpoint in ["public/ckpt", "extra/ckpt_v01"] {
        let vocabulary =
            openvla_convert::tokenizer::read(&golden.join(checkpoint), 32_064).unwrap();
        assert_eq!(vocabulary.merges.len(), 61_249, "{checkpoint}");
        let tokenizer = Tokenizer::new(&vocabulary).unwrap();
        for case in cases {
            let instruction = case["instruction"].as_str().unwrap();
            for (key, template) in [("openvla", OPENVLA), ("v01", V01)] {
                let prompt = Prompt::new(template.into(), 29_871).unwrap();
                let want = &case[key];
                assert_eq!(prompt.text(instruction), want["prompt"].as_str().unwrap());
                let got = tokenizer.encode(want["prompt"].as_str().unwrap()).unwrap();
                assert_eq!(got, ids(&want["ids"]), "{checkpoint}: {instruction:?}");
                let got = prompt.ids(&tokenizer, instruction).unwrap();
                assert_eq!(got, ids(&want["model_input_ids"]), "{checkpoint}: {instruction:?}");
            }
            let raw = tokenizer.encode(instruction).unwrap();
            assert_eq!(raw[1..], ids(&case["raw_ids_no_bos"]), "{checkpoint}: {instruction:?}");
        }
    }
}
