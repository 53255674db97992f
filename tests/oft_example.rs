//! The trained OpenVLA-OFT example against an independent implementation, and against that implementation with one thing
//! done wrong.
//!
//! `example/expected-oft.json` has what a float64 implementation that shares no code with this project computes
//! (`example/expected_oft.py`). Everything needed is in the repository.
//!
//! [`TRAPS`] has the mistakes that leave a plausible policy, and how far each moves an action of the example, in the data
//! set's units: all but the last few by far more than [`TOLERANCE`], so the golden test notices them.
//! Those that can be made from outside are also made here, and then the engine is the wrong implementation.
//! FiLM and adapters are tested on the reference's runs (`tests/oft.rs`).

mod common;

use std::path::{Path, PathBuf};

use common::{floats, ids, json, of, picture};
use image::RgbImage;
use image::imageops::crop_imm;
use indicatif::ProgressBar;
use openvla::oft::{Chunk, Observation, OpenVlaOft};
use openvla::{Bounds, Options};
use openvla_convert::Conversion;
use serde_json::Value;

/// How far an action may be from the independent implementation's, at f32.
const TOLERANCE: f64 = 2e-5;

/// What is done wrong, and at least how far that moves an action in one of the cases.
const TRAPS: [(&str, f64); 27] = [
    // Pictures and state.
    ("images_swapped", 1e-1),
    ("no_center_crop", 2e-2),
    ("unrounded_mean_std", 1e-1),
    ("proprio_unclipped", 5e-3),
    ("other_bounds", 1e-3),
    // The sequence.
    ("proprio_first", 2e-2),
    ("patches_after_prompt", 5e-1),
    ("causal", 5e-1),
    ("actions_only_bidirectional", 5e-1),
    ("stop_hidden", 2e-2),
    ("no_stop", 2e-2),
    ("placeholders_kept", 2e-1),
    ("same_position_for_placeholders", 5e-1),
    ("no_29871", 1e-1),
    ("first_placeholder", 5e-1),
    ("before_final_norm", 2e-1),
    // The head, and what becomes of its numbers.
    ("head_gelu", 5e-2),
    ("relu_after_sum", 1e-1),
    ("no_residual", 5e-1),
    ("dims_before_steps", 5e-1),
    ("clip_actions", 5e-3),
    ("mask_ignored", 2e-1),
    // Hardly or not at all to be seen here: of rounding's size.
    ("keep_f32", 0.0),
    ("rms_eps_1e-5", 0.0),
    ("projector_tanh_gelu", 0.0),
    ("head_ln_eps_1e-6", 0.0),
    ("no_1e-8", 0.0),
];

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("example").join(name)
}

fn cases() -> Vec<Value> {
    json(&example("expected-oft.json"))["cases"].as_array().unwrap().clone()
}

/// The example at f32, with the bounds that its statistics are read by.
fn open(bounds: Bounds, center_crop: bool) -> OpenVlaOft {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut how = of("F32");
    how.run.bounds = Some(bounds);
    let conversion = Conversion::new(&example("openvla-tabletop-oft"), &how).unwrap();
    conversion.write(&path, &ProgressBar::hidden()).unwrap();
    let mut options = Options::default();
    options.n_threads = 1; // tests run side by side; ggml's threads wait by spinning
    options.center_crop = Some(center_crop);
    OpenVlaOft::open(&path, &options).unwrap() // stays mapped after the folder is gone
}

/// The cut-outs that the cameras of a case see.
fn images(case: &Value) -> Vec<RgbImage> {
    let corners = case["corners"].as_array().unwrap().iter().map(ids);
    let files = ["tabletop.png", "tabletop-wrist.png"].into_iter().zip(corners);
    let cut = |(name, corner): (&str, Vec<u32>)| {
        crop_imm(&picture(&example(name)), corner[0], corner[1], 84, 84).to_image()
    };
    files.map(cut).collect()
}

fn act(policy: &mut OpenVlaOft, case: &Value, images: &[RgbImage], state: &[f64]) -> Chunk {
    let images: Vec<&RgbImage> = images.iter().collect();
    let observation = Observation { images: &images, state: Some(state) };
    policy.act(&observation, case["instruction"].as_str().unwrap(), None).unwrap()
}

/// The largest difference.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max)
}

fn is_cropped(case: &Value) -> bool {
    case["center_crop"].as_bool().unwrap()
}

#[test]
fn it_acts_as_the_independent_implementation() {
    for case in cases() {
        let mut policy = open(Bounds::Quantiles, is_cropped(&case));
        let instruction = case["instruction"].as_str().unwrap();
        assert_eq!(policy.prompt_ids(instruction).unwrap(), ids(&case["prompt_ids"]));
        let chunk = act(&mut policy, &case, &images(&case), &floats(&case["state"]));
        let soft = policy.network().soft_tokens();
        let at = ids(&case["projected_at"]);
        let soft: Vec<f64> = at.iter().map(|at| f64::from(soft[*at as usize])).collect();
        let errors = [
            distance(&soft, &floats(&case["projected"])),
            distance(&chunk.normalized_state, &floats(&case["normalized_state"])),
            distance(&chunk.normalized.concat(), &floats(&case["normalized"])),
            distance(&chunk.actions.concat(), &floats(&case["actions"])),
        ];
        let limits = [2e-5, 1e-8, TOLERANCE, TOLERANCE];
        let within = errors.iter().zip(limits).all(|(error, limit)| *error <= limit);
        assert!(within, "{instruction}: {errors:?}");
    }
}

/// What the golden test would not notice is not in its name: each trap moves an action by more than it allows.
#[test]
fn every_trap_is_farther_from_the_golden_than_its_tolerance() {
    let cases = cases();
    for (trap, least) in TRAPS {
        let moved =
            |case: &Value| distance(&floats(&case["wrong"][trap]), &floats(&case["actions"]));
        let moved = cases.iter().map(moved).fold(0.0, f64::max);
        assert!(
            moved >= least && (least == 0.0 || least > 10.0 * TOLERANCE),
            "{trap}: {moved:.1e}"
        );
    }
    let known = cases[0]["wrong"].as_object().unwrap();
    assert_eq!(known.len(), TRAPS.len(), "all traps of the script are in the table");
}

#[test]
fn cameras_are_known_by_name() {
    let policy = open(Bounds::Quantiles, false);
    let oft = policy.oft();
    assert_eq!(oft.in_order(&[("wrist_image", 1), ("full_image", 0)]).unwrap(), [0, 1]);
    for (named, words) in [
        (&[("full_image", 0)][..], "nothing of the camera `wrist_image`"),
        (
            &[("full_image", 0), ("wrist", 1)],
            "no camera `wrist`; the model has full_image, wrist_image",
        ),
        (
            &[("full_image", 0), ("wrist_image", 1), ("full_image", 2)],
            "`full_image` is named twice",
        ),
    ] {
        let said = oft.in_order(named).unwrap_err().to_string();
        assert!(said.contains(words), "{said}");
    }
}

/// Makes mistakes through inputs and options: the actions are those that the independent implementation has with the
/// same mistake, so that the golden test fails on each.
#[test]
fn mistakes_that_can_be_made_from_outside_are_the_traps() {
    for case in cases() {
        let (seen, state, crop) = (images(&case), floats(&case["state"]), is_cropped(&case));
        let mut policy = open(Bounds::Quantiles, crop);
        let swapped = [seen[1].clone(), seen[0].clone()];
        let swapped = act(&mut policy, &case, &swapped, &state);
        let whole = act(&mut open(Bounds::Quantiles, false), &case, &seen, &state);
        let extremes = act(&mut open(Bounds::Extremes, crop), &case, &seen, &state);
        for (trap, chunk) in
            [("images_swapped", swapped), ("no_center_crop", whole), ("other_bounds", extremes)]
        {
            let got = chunk.actions.concat();
            let error = distance(&got, &floats(&case["wrong"][trap]));
            assert!(error <= TOLERANCE, "{trap}: {error:.1e} from the same mistake");
            let moved = distance(&got, &floats(&case["actions"]));
            let is_moved = moved > 10.0 * TOLERANCE;
            assert!(
                is_moved || (trap == "no_center_crop" && !crop),
                "{trap}: moved by {moved:.1e}"
            );
        }
        // A state that was normalized already: a client that reuses the reference's observation does it.
        let twice = act(&mut policy, &case, &seen, &floats(&case["normalized_state"]));
        assert!(distance(&twice.actions.concat(), &floats(&case["actions"])) > 10.0 * TOLERANCE);
        // The gripper is as the head returned it, neither scaled nor turned round.
        for (action, normalized) in twice.actions.iter().zip(&twice.normalized) {
            assert_eq!(action[6], normalized[6]);
        }
    }
}
