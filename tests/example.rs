//! The whole engine on the built-in examples, against an independent implementation.
//!
//! `example/expected.json` holds what a float64 implementation that shares no code with this
//! project computes (`example/expected.py`). Everything needed is in the repository.

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use common::{floats, ids, json, of, open, picture};
use indicatif::ProgressBar;
use openvla::{Config, Decoding, OpenVla};
use openvla_convert::Conversion;
use openvla_example::{COMMITTED, Size, Spec, Variant};
use openvla_kernels::Gguf;
use serde_json::Value;
use sha2::{Digest, Sha256};

fn example() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("example")
}

/// Both checkpoints at f32, with what is expected of them.
fn both() -> [(OpenVla, Value); 2] {
    let expected = json(&example().join("expected.json"));
    let v01 = tempfile::tempdir().unwrap();
    let spec = Spec { variant: Variant::V01, seed: 1, shards: 3, ..COMMITTED };
    openvla_example::write(v01.path(), &spec).unwrap();
    let fused = example().join("openvla-example");
    [
        (open(&fused, "F32", Decoding::Reference), expected["openvla"].clone()),
        (open(v01.path(), "F32", Decoding::Reference), expected["v01"].clone()),
    ]
}

/// Probes of an array: the values at some of its indices, within `limit`.
fn assert_probes(what: &str, got: &[f32], probes: &Value, limit: f64) {
    let (at, want) = (ids(&probes["at"]), floats(&probes["values"]));
    assert!(at.len() >= 32, "{what}: enough probes");
    for (at, want) in at.iter().zip(want) {
        let got = f64::from(got[*at as usize]);
        assert!((got - want).abs() <= limit, "{what} at {at}: got {got}, want {want}");
    }
}

/// One tower's channels of the joined features `[Σ dim, n_patch]`.
fn tower(features: &[f32], joined: usize, start: usize, dim: usize) -> Vec<f32> {
    features.chunks(joined).flat_map(|patch| &patch[start..start + dim]).copied().collect()
}

#[test]
fn every_stage_is_the_independent_implementations() {
    let image = picture(&example().join("table.png"));
    for (mut policy, expected) in both() {
        let planes = policy.config().preprocess.planes(&image).unwrap();
        let bytes: Vec<u8> = planes.iter().flat_map(|x| x.to_le_bytes()).collect();
        let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hash, expected["pixels_sha256"].as_str().unwrap());

        let config = policy.config().clone();
        let network = policy.network();
        let encoded = network.encode(&planes).unwrap();
        let features = network.features();
        let mut start = 0;
        for (i, t) in config.towers.iter().enumerate() {
            let got = tower(&features, config.projector[0], start, t.dim);
            assert_probes(&t.name, &got, &expected[format!("vit{i}")], 5e-6);
            start += t.dim;
        }
        let soft = policy.network().project(&encoded).unwrap();
        assert_probes("projector", &policy.network().soft_tokens(), &expected["projector"], 5e-6);

        for case in expected["cases"].as_array().unwrap() {
            let prompt = policy.prompt_ids(case["instruction"].as_str().unwrap()).unwrap();
            assert_eq!(prompt, ids(&case["prompt_ids"]));
            let sequence = policy.network().prefill(&prompt, &soft).unwrap();
            assert_probes("logits", sequence.logits(), &case["logits_first"], 1e-3);
        }
    }
}

#[test]
fn it_acts_as_the_independent_implementation() {
    let image = picture(&example().join("table.png"));
    for (mut policy, expected) in both() {
        for case in expected["cases"].as_array().unwrap() {
            let instruction = case["instruction"].as_str().unwrap();
            let got = policy.act(&image, instruction, case["unnorm_key"].as_str()).unwrap();
            assert_eq!(got.tokens, ids(&case["generated_ids"]), "{instruction}");
            let want = floats(&case["action"]);
            assert_eq!(got.action.len(), want.len());
            for (got, want) in got.action.iter().zip(want) {
                assert!((got - want).abs() < 1e-8, "{instruction}: {got}, {want}"); // nine digits
            }
        }
    }
}

/// `attention` is `[n_token, n_patch]`, and its probes lie all over it.
#[test]
fn it_looks_where_the_independent_implementation_looks() {
    let image = picture(&example().join("table.png"));
    for (mut policy, expected) in both() {
        for case in expected["cases"].as_array().unwrap() {
            let (instruction, want) = (case["instruction"].as_str().unwrap(), &case["attention"]);
            let key = case["unnorm_key"].as_str();
            let got = policy.explain(&image, instruction, key).unwrap();
            assert_eq!(got.action.tokens, ids(&case["generated_ids"]));
            assert_eq!(got.attention.len(), got.action.tokens.len());
            let looks: Vec<f32> = got.attention.iter().flatten().map(|x| *x as f32).collect();
            assert_eq!(looks.len(), got.action.tokens.len() * policy.config().n_patch());
            // Shares up to 0.1, of scores whose rows are within 5e-6.
            assert_probes(instruction, &looks, want, 2e-5);
            for looks in &got.attention {
                let share: f64 = looks.iter().sum();
                assert!((0.0..1.0).contains(&share), "{share}");
            }
            assert_eq!(got.shown.width(), policy.config().preprocess.size);
        }
    }
}

/// Teacher-forced or not, a narrower type must stay near f32 on the first token's logits.
#[test]
fn narrower_types_stay_near_f32() {
    let image = picture(&example().join("table.png"));
    let first = |encoding: &str| {
        let mut policy = open(&example().join("openvla-example"), encoding, Decoding::Actions);
        let planes = policy.config().preprocess.planes(&image).unwrap();
        let prompt = policy.prompt_ids("put eggplant into pot").unwrap();
        let network = policy.network();
        let features = network.encode(&planes).unwrap();
        let soft = network.project(&features).unwrap();
        network.prefill(&prompt, &soft).unwrap().logits().to_vec()
    };
    let exact = first("F32");
    let error = |encoding: &str| {
        let square = |x: f32| f64::from(x * x);
        let wrong: f64 = first(encoding).iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
        (wrong / exact.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
    };
    for (encoding, limit) in
        [("F16", 2e-2), ("BF16", 5e-2), ("Q8_0", 0.3), ("Q4_0", 1.0), ("Q4_K_M", 1.0)]
    {
        let error = error(encoding);
        eprintln!("{encoding}: relative error of the first logits {error:.1e}");
        assert!(error <= limit && error > 0.0, "{encoding}: {error}");
    }
}

/// The wide size behaves as the committed one does: it moves, and 8 bits do not move it elsewhere.
#[test]
fn the_wide_size_acts_and_8_bits_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    openvla_example::write(dir.path(), &Spec { size: Size::Wide, ..COMMITTED }).unwrap();
    let image = picture(&example().join("table.png"));
    let [exact, rounded] = ["F32", "Q8_0"].map(|encoding| {
        let mut policy = open(dir.path(), encoding, Decoding::Actions);
        let llama = &policy.config().llama;
        assert_eq!((llama.dim % 256, llama.n_ff % 256, llama.n_layer), (0, 0, 4));
        policy.act(&image, "put eggplant into pot", None).unwrap()
    });
    assert!(exact.unconstrained.all_actions, "{:?}", exact.unconstrained.tokens);
    assert!(exact.tokens.iter().collect::<BTreeSet<_>>().len() > 2, "{:?}", exact.tokens);
    assert_eq!(rounded.tokens, exact.tokens);
}

/// `act` keeps nothing of what came before: not of longer prompts, other images or other motions.
#[test]
fn a_step_depends_on_nothing_before_it() {
    let mut policy = open(&example().join("openvla-example"), "Q4_K_M", Decoding::Actions);
    let image = picture(&example().join("table.png"));
    let grey = image::RgbImage::from_pixel(50, 80, image::Rgb([99; 3]));
    let act = |policy: &mut OpenVla, image, instruction| {
        policy.act(image, instruction, None).unwrap().tokens
    };
    let want = act(&mut policy, &image, "put eggplant into pot");
    let others = [
        act(&mut policy, &grey, "put eggplant into pot"),
        act(&mut policy, &image, "a much longer instruction, in more words than the first"),
        act(&mut policy, &image, ""),
    ];
    assert!(others.iter().all(|other| *other != want), "image and instruction matter");
    assert_eq!(act(&mut policy, &image, "put eggplant into pot"), want);
}

/// The default mode gives action ids only, and says what all ids would have been.
#[test]
fn default_decoding_stays_among_the_actions_and_reports_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { variant: Variant::V01, seed: 1, ..COMMITTED };
    openvla_example::write(dir.path(), &spec).unwrap();
    let image = picture(&example().join("table.png"));
    let mut policy = open(dir.path(), "F32", Decoding::Actions);
    let expected = json(&example().join("expected.json"));
    let actions = policy.config().actions.ids();
    let mut strays = 0;
    for case in expected["v01"]["cases"].as_array().unwrap() {
        let instruction = case["instruction"].as_str().unwrap();
        let got = policy.act(&image, instruction, case["unnorm_key"].as_str()).unwrap();
        assert!(got.tokens.iter().all(|id| actions.contains(id)));
        let all = got.unconstrained.tokens.iter().all(|id| actions.contains(id));
        assert_eq!(got.unconstrained.all_actions, all);
        strays += usize::from(!all);
        let want = ids(&case["generated_ids"]);
        let same = want.iter().take_while(|id| actions.contains(id)).count();
        assert_eq!(got.tokens[..same], want[..same], "as the reference until it strays");
        assert_eq!(got.unconstrained.tokens[..same], want[..same]);
    }
    assert_eq!(strays, 1, "one of the cases has a token that is not an action");
}

/// The model built into `openvla-run` is the trained example, converted at the default type.
#[test]
#[cfg_attr(
    target_arch = "aarch64",
    ignore = "ggml's encoders round otherwise with fused multiply-adds"
)]
fn the_built_in_model_is_the_trained_example() {
    is_converted("openvla-tabletop", "tabletop.gguf");
}

#[test]
#[cfg_attr(
    target_arch = "aarch64",
    ignore = "ggml's encoders round otherwise with fused multiply-adds"
)]
fn the_random_model_is_the_random_example() {
    is_converted("openvla-example", "example.gguf");
}

/// Its files tell that it is an OpenVLA-OFT run, and of which platform's sizes.
#[test]
#[cfg_attr(
    target_arch = "aarch64",
    ignore = "ggml's encoders round otherwise with fused multiply-adds"
)]
fn the_oft_model_is_the_trained_oft_example() {
    is_converted("openvla-tabletop-oft", "tabletop-oft.gguf");
    let file = Gguf::open(&example().join("tabletop-oft.gguf")).unwrap();
    let oft = Config::read(&file).unwrap().oft.unwrap();
    assert_eq!((oft.chunk, oft.n_action, oft.n_state, oft.film), (8, 7, 8, false));
    assert_eq!(oft.cameras, ["full_image", "wrist_image"]);
}

/// With the default type; runs of the tabletop see whole pictures.
fn is_converted(checkpoint: &str, file: &str) {
    let dir = tempfile::tempdir().unwrap();
    let fresh = dir.path().join("fresh.gguf");
    let mut options = of("Q4_K_M");
    options.center_crop = Some(false);
    let conversion = Conversion::new(&example().join(checkpoint), &options).unwrap();
    conversion.write(&fresh, &ProgressBar::hidden()).unwrap();
    let (fresh, built_in) =
        (Gguf::open(&fresh).unwrap(), Gguf::open(&example().join(file)).unwrap());
    let again = &*format!("openvla-convert --q4 example/{checkpoint} -o example/{file} writes it");
    // What was computed, as bytes below, may round differently.
    let stated =
        |key: &&String| !["openvla.proof.", "openvla.checksum."].iter().any(|p| key.starts_with(p));
    let keys = |file: &Gguf| file.metadata().keys().filter(stated).cloned().collect::<Vec<_>>();
    assert_eq!(keys(&fresh), keys(&built_in), "{again}");
    for key in keys(&fresh) {
        assert!(built_in.metadata()[&key] == fresh.metadata()[&key], "{key} differs; {again}");
    }
    assert_eq!(fresh.tensors().len(), built_in.tensors().len(), "{again}");
    // Bytes may differ by the rounding of a processor's fused multiply-add, values hardly.
    for (a, b) in fresh.tensors().iter().zip(built_in.tensors()) {
        assert_eq!((&a.name, a.dtype, a.shape), (&b.name, b.dtype, b.shape), "{again}");
        let [fresh, built_in] = [(&fresh, a), (&built_in, b)]
            .map(|(file, t)| t.dtype.decode(&file.bytes()[t.range.clone()]));
        let differ = fresh.iter().zip(&built_in).filter(|(a, b)| a != b).count();
        assert!(differ * 1000 <= fresh.len(), "{}: {differ} values differ; {again}", a.name);
    }
}
