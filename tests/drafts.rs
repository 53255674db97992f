//! Drafts change how many passes a motion takes, and nothing else: every token is the best one after
//! the tokens before it. What a pass of several rows rounds differently from one of a single row is
//! measured here too.
//!
//! Whether they are right is up to the tests, which give a session the history that they want.

mod common;

use std::path::{Path, PathBuf};

use common::{devices, open, picture};
use openvla::image::RgbImage;
use openvla::{Action, Decoding, Devices, Kernels, OpenVla, Session, argmax};
use openvla_example::{COMMITTED, Size, Spec, Variant};

const INSTRUCTION: &str = "put eggplant into pot";

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("example")
}

/// One of the built-in examples.
fn policy(spec: &Spec, encoding: &str, decoding: Decoding) -> OpenVla {
    let dir = tempfile::tempdir().unwrap();
    openvla_example::write(dir.path(), spec).unwrap();
    open(dir.path(), encoding, decoding)
}

fn table() -> RgbImage {
    picture(&example().join("table.png"))
}

/// Acts after the one motion `last`.
fn after(policy: &mut OpenVla, last: &[u32], key: Option<&str>) -> Action {
    let mut session = Session::with_history([last.to_vec()]);
    policy.act_in(&mut session, &table(), INSTRUCTION, key).unwrap()
}

/// Passes that a motion of `tokens` takes when its prefill has room for all drafts, spelled out.
fn passes(last: &[u32], tokens: &[u32]) -> usize {
    let n = tokens.len() - 1;
    assert!(n <= 7, "a pass has room for all");
    1 + (0..n).filter(|i| last.get(*i) != Some(&tokens[*i])).count()
}

/// What drafts must not change, spelled out: greedy decoding of seven tokens, of which those that
/// follow a right guess in the prefill come from a prefill, and the others of a row alone.
fn greedy(policy: &mut OpenVla, guess: &[u32], decoding: Decoding) -> Vec<u32> {
    let config = policy.config().clone();
    let ids = policy.prompt_ids(INSTRUCTION).unwrap();
    let best = |logits: &[f32]| match decoding {
        Decoding::Reference => argmax(logits, 0..config.llama.n_vocab as u32, 0).unwrap(),
        Decoding::Actions => argmax(logits, config.actions.ids(), 0).unwrap(),
    };
    let network = policy.network();
    let features = network.encode(&config.preprocess.planes(&table()).unwrap()).unwrap();
    let soft = network.project(&features).unwrap();
    let mut sequence = network.prefill(&ids, &soft).unwrap();
    let mut tokens = vec![best(sequence.logits())];
    while tokens.len() < 7 && guess.starts_with(&tokens) {
        sequence = network.prefill_drafted(&ids, &soft, &tokens).unwrap();
        tokens.push(best(sequence.logits()));
    }
    while tokens.len() < 7 {
        tokens.push(best(sequence.step(*tokens.last().unwrap()).unwrap()));
    }
    tokens
}

/// Motions to draft: right, wrong, by one bin, right here and there, too short, too long, of ids
/// that are not actions or not even in the vocabulary.
fn guesses(right: &[u32]) -> Vec<Vec<u32>> {
    let changed = |mask: u32| {
        let change = |(i, id): (usize, &u32)| id + (mask >> i & 1);
        right.iter().enumerate().map(change).collect::<Vec<_>>()
    };
    let mut guesses: Vec<_> = (0..128).step_by(5).map(changed).collect();
    guesses.extend([changed(0), changed(!0), vec![], right[..2].to_vec(), vec![2; right.len()]]);
    guesses.extend([[right, right].concat(), [&right[..3], &[u32::MAX], &right[4..]].concat()]);
    guesses
}

#[test]
fn every_draft_leads_to_the_same_motion() {
    for (encoding, decoding) in [
        ("F32", Decoding::Actions),
        ("F32", Decoding::Reference),
        ("Q8_0", Decoding::Actions),
        ("Q4_K_M", Decoding::Reference),
    ] {
        let mut policy = open(&example().join("openvla-example"), encoding, decoding);
        let want = policy.act(&table(), INSTRUCTION, None).unwrap();
        assert_eq!((want.draft.passes, want.tokens.len()), (7, 7));
        for guess in guesses(&want.tokens) {
            let greedy = greedy(&mut policy, &guess, decoding);
            let got = after(&mut policy, &guess, None);
            assert_eq!(got.tokens, greedy, "{encoding} {decoding:?} after {guess:?}");
            if encoding == "F32" {
                assert_eq!(got.tokens, want.tokens, "{decoding:?} after {guess:?}");
                assert_eq!(got.unconstrained.tokens, want.unconstrained.tokens, "{guess:?}");
            }
            if guess.contains(&u32::MAX) {
                assert!(got.draft.passes >= 4, "nothing is drafted from there on");
                continue;
            }
            assert_eq!(got.draft.passes, passes(&guess, &got.tokens), "{encoding} {guess:?}");
            let hits = got.draft.accepted.iter().filter(|hit| **hit).count();
            assert_eq!(got.draft.passes, 7 - hits, "each hit saves a pass");
        }
    }
}

/// What a motion says of the alternatives to its tokens: the logits that a run stage by stage has there, drafted or not.
#[test]
fn a_motion_has_the_logits_that_its_tokens_were_chosen_by() {
    let mut policy = open(&example().join("openvla-example"), "F32", Decoding::Actions);
    let want = policy.act(&table(), INSTRUCTION, None).unwrap();
    let drafted = after(&mut policy, &want.tokens, None);
    let (config, ids) = (policy.config().clone(), policy.prompt_ids(INSTRUCTION).unwrap());
    let network = policy.network();
    let features = network.encode(&config.preprocess.planes(&table()).unwrap()).unwrap();
    let soft = network.project(&features).unwrap();
    let mut sequence = network.prefill(&ids, &soft).unwrap();
    for (i, token) in want.tokens.iter().enumerate() {
        assert_eq!(want.logits[i], sequence.logits()[config.actions.rows()], "token {i}");
        for action in [&want, &drafted] {
            let p = config.actions.probabilities(&action.logits[i]);
            let best = p[(token - config.actions.ids().start) as usize];
            assert!(p.iter().all(|p| *p <= best), "token {i} is the likeliest");
        }
        if i + 1 < want.tokens.len() {
            sequence.step(*token).unwrap();
        }
    }
    assert_eq!((want.logits.len(), drafted.logits.len()), (7, 7));
}

/// Motions of 14 tokens: seven drafts fit into the prefill, and seven into each pass after.
#[test]
fn long_motions_are_drafted_in_batches() {
    let spec = Spec { variant: Variant::V01, seed: 1, ..COMMITTED };
    let mut policy = policy(&spec, "F32", Decoding::Actions);
    for (key, n) in [("example_six_axes", 6), ("example_bimanual", 14)] {
        let plain = policy.act(&table(), INSTRUCTION, Some(key)).unwrap();
        assert_eq!((plain.tokens.len(), plain.draft.passes), (n, n));
        let right = after(&mut policy, &plain.tokens, Some(key));
        assert_eq!((right.tokens, right.draft.passes), (plain.tokens.clone(), n.div_ceil(8)));
        assert_eq!(right.draft.accepted.len(), n - 1);
        let mut wrong = plain.tokens.clone();
        wrong[2] += 1;
        let got = after(&mut policy, &wrong, Some(key));
        // 0 1 2 | 3 … and then eight at a time.
        assert_eq!((got.tokens, got.draft.passes), (plain.tokens.clone(), 1 + (n - 3).div_ceil(8)));
        // What was drafted for another data set is shorter or longer, and no guess of this one.
        let other = after(&mut policy, &[plain.tokens[0]; 10], Some(key));
        assert_eq!(other.tokens, plain.tokens);
    }
}

/// One robot, step after step: the same image is the same motion, so all drafts are right.
#[test]
fn a_session_remembers_until_the_task_changes() {
    let mut policy = open(&example().join("openvla-example"), "Q4_K_M", Decoding::Actions);
    let mut session = Session::default();
    let mut act = |session: &mut Session, instruction| {
        policy.act_in(session, &table(), instruction, None).unwrap().draft
    };
    let first = act(&mut session, INSTRUCTION);
    assert_eq!((first.passes, first.accepted), (7, vec![false; 6]));
    let second = act(&mut session, INSTRUCTION);
    assert_eq!((second.passes, second.accepted), (1, vec![true; 6]));
    assert_eq!((second.session.actions, second.session.passes), (2, 8));
    assert_eq!((second.session.passes_per_action, second.session.accepted), (4.0, vec![1; 6]));
    let mut other = Session::default();
    assert_eq!(act(&mut other, INSTRUCTION).passes, 7, "a session knows nothing of another");
    let third = act(&mut session, "wave");
    assert_eq!((third.passes, third.session.actions), (7, 1));
}

/// How far logits of the first token, of drafts in the prefill, and of rows that step together may
/// be from those of the same rows one by one: the root mean square of the difference over that of
/// the latter, worst row.
///
/// Our own kernels of quantized matrices compute each row of a step by itself, so that there steps are the same bits.
///
/// Measured on x86-64 as AVX2: F32 and all first tokens at most 6e-7; drafts in a prefill 4e-3 to
/// 3e-2, since ggml's attention sums in f16 for few rows and in f32 for many; steps 6e-4 at F16 and
/// 3e-3 at BF16, whose products round activations for one row and not for several, else 1e-7.
const TOGETHER: [(&str, [f64; 3]); 8] = [
    ("F32", [1e-5, 1e-5, 1e-5]),
    ("F16", [1e-5, 2e-2, 5e-3]),
    ("BF16", [1e-5, 3e-2, 2e-2]),
    ("Q8_0", [1e-5, 1e-1, 1e-5]),
    ("Q6_K", [1e-5, 1e-1, 1e-5]),
    ("Q4_K_M", [1e-5, 1e-1, 1e-5]),
    ("Q4_0", [1e-5, 1e-1, 1e-5]),
    ("IQ4_NL", [1e-5, 1e-1, 1e-5]),
];

#[test]
fn rows_together_have_the_logits_that_they_have_one_by_one() {
    let is_own = Kernels::default().resolve() != Kernels::Ggml && devices() == Devices::Cpu;
    for (encoding, mut limits) in TOGETHER {
        if is_own && !["F32", "F16", "BF16"].contains(&encoding) {
            limits[2] = 0.0;
        }
        // Rows of 256, as blocks of K-quants are.
        let spec = Spec { size: Size::Wide, ..COMMITTED };
        let mut policy = policy(&spec, encoding, Decoding::Actions);
        let ids = policy.prompt_ids(INSTRUCTION).unwrap();
        let planes = policy.config().preprocess.planes(&table()).unwrap();
        let tokens: Vec<u32> = policy.config().actions.ids().step_by(41).take(6).collect();
        let network = policy.network();
        let features = network.encode(&planes).unwrap();
        let soft = network.project(&features).unwrap();
        let mut sequence = network.prefill(&ids, &soft).unwrap();
        let first = sequence.logits().to_vec();
        let alone: Vec<_> =
            tokens.iter().map(|token| sequence.step(*token).unwrap().to_vec()).collect();
        let mut worst = [0.0_f64; 3];
        let mut at_most = |part: usize, error: f64| worst[part] = worst[part].max(error);
        for n in 1..=6 {
            sequence.forget(6);
            let together =
                tokens.chunks(n).flat_map(|rows| sequence.step_drafted(rows).unwrap().to_vec());
            at_most(2, difference(&together.collect::<Vec<_>>(), &alone));
        }
        for n in 1..=6 {
            let sequence = network.prefill_drafted(&ids, &soft, &tokens[..n]).unwrap();
            let together = sequence.all_logits();
            at_most(0, difference(&together[..1], std::slice::from_ref(&first)));
            at_most(1, difference(&together[1..], &alone));
        }
        eprintln!(
            "{encoding:6} first {:.0e} drafts {:.0e} steps {:.0e}",
            worst[0], worst[1], worst[2]
        );
        assert!((0..3).all(|i| worst[i] <= limits[i]), "{encoding}: {worst:?} > {limits:?}");
    }
}

/// The larger of two numbers of rows is cut.
fn difference(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let row = |(got, want): (&Vec<f32>, &Vec<f32>)| {
        let wrong: f64 = got.iter().zip(want).map(|(got, want)| square(got - want)).sum();
        (wrong / want.iter().map(|want| square(*want)).sum::<f64>()).sqrt()
    };
    got.iter().zip(want).map(row).fold(0.0, f64::max)
}
