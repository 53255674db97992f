//! Policies on the table: the expert, one that cannot read, and what time does to them.

use anyhow::Result;
use clap::ValueEnum;
use indicatif::ProgressBar;
use openvla_tabletop::{
    Action, CHUNK, Difference, Expert, Learner, Outcome, Pace, Plan, Policy, STEPS, Scene, Steps,
    Suite, World, evaluate, expert, picture, plan, run, wrist_picture,
};

const PLAN: Plan = Plan { episodes: 200, seed: 10_000, pace: Pace::Blocking, steps: STEPS };

fn policies<P: Policy + Send + Copy + 'static>(policy: P, n: usize) -> Vec<Box<dyn Policy + Send>> {
    (0..n).map(|_| Box::new(policy) as _).collect()
}

#[derive(Clone, Copy)]
struct Knows(usize);

impl Policy for Knows {
    fn act(&mut self, world: &World) -> Result<Vec<Action>> {
        Expert { ahead: self.0 }.act(world)
    }
}

/// The expert, always for the thing that was laid first.
#[derive(Clone, Copy)]
struct CannotRead;

impl Policy for CannotRead {
    fn act(&mut self, world: &World) -> Result<Vec<Action>> {
        let mut guess = world.clone();
        guess.scene.target = 0;
        Ok(vec![expert(&guess)])
    }
}

#[test]
fn the_expert_solves_every_layout_of_every_suite() {
    for suite in Suite::value_variants() {
        let progress = ProgressBar::hidden();
        let report = evaluate(*suite, &PLAN, &mut policies(Knows(1), 1), &progress).unwrap();
        assert_eq!((report.successes, report.episodes), (200, 200), "{suite:?}");
        assert_eq!(report.error, Difference::default(), "it differs from itself");
    }
}

#[test]
fn a_policy_that_cannot_read_fails_half_of_the_language_scenes() {
    let progress = ProgressBar::hidden();
    let mut blind = policies(CannotRead, 1);
    let report = evaluate(Suite::Language, &PLAN, &mut blind, &progress).unwrap();
    assert!((80..=120).contains(&report.successes), "{} of 200", report.successes);
}

#[test]
fn a_report_does_not_depend_on_the_number_of_threads() {
    let report = |n| {
        let plan = Plan { episodes: 37, ..PLAN };
        let mut blind = policies(CannotRead, n);
        let report = evaluate(Suite::Language, &plan, &mut blind, &ProgressBar::hidden()).unwrap();
        serde_json::to_string(&report).unwrap()
    };
    assert_eq!(report(1), report(3));
}

fn outcome(seed: u64, ahead: usize, pace: Pace) -> Outcome {
    let world = World::new(Scene::new(Suite::Base, seed));
    run(world, &mut Expert { ahead }, pace, STEPS, &mut |_| ()).unwrap()
}

fn steps(seed: u64, pace: Pace) -> (bool, usize) {
    let outcome = outcome(seed, 1, pace);
    (outcome.done, outcome.steps)
}

/// The world is deterministic, so that nothing is missed by not looking.
#[test]
fn a_plan_is_what_would_be_done_step_by_step() {
    for seed in 0..20 {
        let one = outcome(seed, 1, Pace::Blocking);
        assert_eq!((one.calls, one.done), (one.steps, true));
        for ahead in [3, CHUNK] {
            let planned = outcome(seed, ahead, Pace::Blocking);
            assert_eq!((planned.done, planned.steps), (true, one.steps), "seed {seed}");
            assert_eq!(planned.calls, one.steps.div_ceil(ahead), "seed {seed}");
        }
    }
}

/// Each world in which a step begins, in order, and the last.
#[test]
fn a_chunk_is_seen_step_by_step_and_ends_with_the_episode() {
    let mut world = World::new(Scene::new(Suite::Base, 4));
    let mut seen = Vec::new();
    let policy = &mut Expert { ahead: CHUNK };
    let outcome = run(world.clone(), policy, Pace::Blocking, STEPS, &mut |world| {
        seen.push(world.clone());
    });
    assert_eq!(seen.len(), outcome.unwrap().steps + 1);
    for seen in seen {
        assert_eq!(seen, world);
        world.step(&expert(&world));
    }
}

#[test]
fn no_chunk_goes_on_when_the_time_is_over() {
    for most in [3, CHUNK + 2] {
        let world = World::new(Scene::new(Suite::Base, 4));
        let policy = &mut Expert { ahead: CHUNK };
        let outcome = run(world, policy, Pace::Blocking, most, &mut |_| ()).unwrap();
        assert_eq!((outcome.done, outcome.steps), (outcome.steps < most, most.min(outcome.steps)));
    }
}

/// Three periods of thinking for each step, or for each eight.
#[test]
fn a_slow_policy_gets_more_done_in_chunks() {
    let pace = Pace::Running { hz: 5.0, latency_ms: Some(601.0) };
    let done = |ahead| (0..40).filter(|seed| outcome(*seed, ahead, pace).done).count();
    assert!(done(1) < 10 && done(CHUNK) > 30, "{} and {} of 40", done(1), done(CHUNK));
}

#[test]
fn a_policy_that_takes_no_time_is_waited_for_either_way() {
    let now = Pace::Running { hz: 5.0, latency_ms: Some(0.0) };
    for seed in 0..40 {
        assert_eq!(steps(seed, now), steps(seed, Pace::Blocking), "seed {seed}");
    }
}

#[test]
fn what_a_policy_sees_late_costs_steps() {
    let total = |latency_ms| {
        let pace = Pace::Running { hz: 5.0, latency_ms: Some(latency_ms) };
        (0..40).map(|seed| steps(seed, pace).1).sum::<usize>()
    };
    let totals = [0.0, 60.0, 120.0].map(total);
    assert!(totals[0] < totals[1] && totals[1] < totals[2], "{totals:?}");
}

#[test]
fn noise_is_in_what_is_done_and_never_in_what_is_recorded() {
    let (mut steps, mut noisy) = (Steps::new(3, 1), 0);
    let mut last: Option<(usize, World)> = None;
    for _ in 0..400 {
        let (episode, world) = steps.next(|step| {
            assert_eq!(step.action, expert(step.world));
            (step.episode, step.world.clone())
        });
        if let Some((_, expected)) = last.filter(|(of, _)| *of == episode) {
            noisy += usize::from(expected.gripper != world.gripper);
        }
        let mut next = world.clone();
        next.step(&expert(&world));
        last = Some((episode, next));
    }
    assert!((80..300).contains(&noisy), "{noisy} of 400 steps went elsewhere");
}

#[test]
fn a_stream_is_the_same_again_and_every_step_has_the_same_size() {
    let stream = |seed| {
        let mut steps = Steps::new(seed, 5);
        let step = |_| steps.next(|step| Learner::OpenVla.bytes(step.world, 24));
        (0..50).map(step).collect::<Vec<_>>()
    };
    assert!(stream(1) == stream(1) && stream(1) != stream(2));
    let n_byte = Learner::OpenVla.step_bytes(24);
    assert!(stream(1).iter().all(|step| step.len() == n_byte));
}

/// Where the trainer looks for them.
#[test]
fn a_step_for_oft_has_both_pictures_the_chunk_and_the_state() {
    let mut world = World::new(Scene::new(Suite::Base, 4));
    world.step(&expert(&world));
    let bytes = Learner::Oft.bytes(&world, 24);
    assert_eq!(bytes.len(), Learner::Oft.step_bytes(24));
    let n = 3 * 24 * 24;
    assert_eq!(bytes[..n], picture(&world, 24).into_raw());
    assert_eq!(bytes[n..2 * n], wrist_picture(&world, 24).into_raw());
    let numbers: Vec<f32> =
        bytes[2 * n..].as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let wanted = plan(&world, CHUNK).into_flattened().into_iter().chain(world.gripper.state());
    let wanted: Vec<f32> = wanted.map(|x| x as f32).collect();
    assert_eq!(numbers[..wanted.len()], wanted);
}
