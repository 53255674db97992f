//! Scores of many statements at once are those of their tokens one by one.

mod common;

use std::path::Path;

use common::{open, picture};
use openvla::image::RgbImage;
use openvla::{Decoding, Error, OpenVla, Statement, TokenScore};

const INSTRUCTION: &str = "put eggplant into pot";

fn example(encoding: &str) -> (OpenVla, RgbImage) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("example");
    (
        open(&dir.join("openvla-tabletop"), encoding, Decoding::Actions),
        picture(&dir.join("tabletop.png")),
    )
}

/// The logits before each token, in passes of one row.
fn one_by_one(policy: &mut OpenVla, image: &RgbImage, statement: &Statement<'_>) -> Vec<Vec<f32>> {
    let planes = policy.config().preprocess.planes(image).unwrap();
    let ids = policy.prompt_ids(statement.instruction).unwrap();
    let network = policy.network();
    let features = network.encode(&planes).unwrap();
    let soft = network.project(&features).unwrap();
    let mut sequence = network.prefill(&ids, &soft).unwrap();
    let mut logits = vec![sequence.logits().to_vec()];
    let (_, before) = statement.tokens.split_last().unwrap();
    logits.extend(before.iter().map(|token| sequence.step(*token).unwrap().to_vec()));
    logits
}

/// What the scores are to be, spelled out.
fn naive(policy: &OpenVla, logits: &[f32], token: u32) -> [f64; 3] {
    let all: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    let p: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp() / all).collect();
    let entropy = -p.iter().map(|p| p * p.ln()).sum::<f64>();
    let actions = policy.config().actions.rows().map(|id| p[id]).sum();
    [p[token as usize].ln(), entropy, actions]
}

/// Motions that begin alike, and others: more rows than a pass has.
fn motions(policy: &OpenVla) -> Vec<Vec<u32>> {
    let id = |x: f64| policy.config().actions.id(x);
    let base: Vec<u32> = [-1.0, 0.3, 1.0, 0.0, 0.0, 0.0, 1.0].map(id).to_vec();
    let mut all = vec![base.clone()];
    for axis in 0..7 {
        for x in [-0.7, -0.1, 0.6] {
            let mut motion = base.clone();
            motion[axis] = id(x);
            all.push(motion);
        }
    }
    all
}

fn statements<'a>(motions: &'a [Vec<u32>], others: &'a [&'a str]) -> Vec<Statement<'a>> {
    let same = motions.iter().map(|tokens| Statement { instruction: INSTRUCTION, tokens });
    let other = |instruction| Statement { instruction, tokens: &motions[0] };
    same.chain(others.iter().map(|instruction| other(instruction))).collect()
}

#[test]
fn many_at_once_equal_one_by_one() {
    let others = ["put eggplant into pot.", "", "put the carrot onto the plate", "a", INSTRUCTION];
    for (encoding, tolerance) in [("F32", 1e-4), ("Q8_0", 0.05)] {
        let (mut policy, image) = example(encoding);
        let motions = motions(&policy);
        let statements = statements(&motions, &others);
        let before = policy.act(&image, INSTRUCTION, None).unwrap().tokens;
        let scores = policy.score(&image, &statements).unwrap();
        assert_eq!(scores.len(), statements.len());
        for (statement, scores) in statements.iter().zip(&scores) {
            let logits = one_by_one(&mut policy, &image, statement);
            assert_eq!(scores.len(), 7);
            for ((logits, token), score) in logits.iter().zip(statement.tokens).zip(scores) {
                let TokenScore { log_likelihood, entropy, actions, best, .. } = *score;
                let wanted = naive(&policy, logits, *token);
                let got = [log_likelihood, entropy, actions];
                let off = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off < tolerance, "{encoding}, {statement:?}: {got:?}, not {wanted:?}");
                let space = policy.config().actions;
                assert!(
                    space.ids().contains(&best) && logits[best as usize] >= logits[*token as usize]
                );
            }
        }
        assert_eq!(
            policy.act(&image, INSTRUCTION, None).unwrap().tokens,
            before,
            "nothing is left"
        );
        let again = policy.score(&image, &statements).unwrap();
        assert_eq!(scores, again);
    }
}

/// What the model would do is likely, its opposite is not.
#[test]
fn its_own_motion_is_the_likeliest() {
    let (mut policy, image) = example("Q4_K_M");
    let own = policy.act(&image, INSTRUCTION, None).unwrap();
    let opposite: Vec<u32> =
        own.normalized.iter().map(|x| policy.config().actions.id(-x)).collect();
    let statement = |tokens| Statement { instruction: INSTRUCTION, tokens };
    let scores = policy.score(&image, &[statement(&own.tokens), statement(&opposite)]).unwrap();
    let sum = |i: usize| scores[i].iter().map(|score| score.log_likelihood).sum::<f64>();
    assert!(sum(0) > -20.0 && sum(1) < sum(0) - 20.0, "{} {}", sum(0), sum(1));
    assert!(scores[0].iter().all(|score| score.actions > 0.99));
    let best: Vec<u32> = scores[0].iter().map(|score| score.best).collect();
    assert_eq!(best, own.tokens, "after its own tokens");
}

#[test]
fn nothing_and_too_much() {
    let (mut policy, image) = example("F32");
    assert!(policy.score(&image, &[]).unwrap().is_empty());
    let none = Statement { instruction: INSTRUCTION, tokens: &[] };
    assert_eq!(policy.score(&image, &[none]).unwrap(), [vec![]]);
    let long = "put it down ".repeat(2000);
    let tokens = [policy.config().actions.id(0.0); 7];
    for instructions in [[INSTRUCTION, &long], [&long, INSTRUCTION]] {
        let statements = instructions.map(|instruction| Statement { instruction, tokens: &tokens });
        let error = policy.score(&image, &statements).unwrap_err();
        assert!(matches!(error, Error::InstructionTooLong { .. }), "{error}");
    }
}
