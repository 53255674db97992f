//! Policies on the table: the expert, one that cannot read, and what time does to them.

use anyhow::Result;
use clap::ValueEnum;
use indicatif::ProgressBar;
use openvla_tabletop::{
    Action, Difference, Expert, Pace, Plan, Policy, STEPS, Scene, Steps, Suite, World, bytes,
    evaluate, expert, run, step_bytes,
};

const PLAN: Plan = Plan { episodes: 200, seed: 10_000, pace: Pace::Blocking, steps: STEPS };

fn policies<P: Policy + Send + Copy + 'static>(policy: P, n: usize) -> Vec<Box<dyn Policy + Send>> {
    (0..n).map(|_| Box::new(policy) as _).collect()
}

#[derive(Clone, Copy)]
struct Knows;

impl Policy for Knows {
    fn act(&mut self, world: &World) -> Result<Action> {
        Expert.act(world)
    }
}

/// The expert, always for the thing that was laid first.
#[derive(Clone, Copy)]
struct CannotRead;

impl Policy for CannotRead {
    fn act(&mut self, world: &World) -> Result<Action> {
        let mut guess = world.clone();
        guess.scene.target = 0;
        Ok(expert(&guess))
    }
}

#[test]
fn the_expert_solves_every_layout_of_every_suite() {
    for suite in Suite::value_variants() {
        let progress = ProgressBar::hidden();
        let report = evaluate(*suite, &PLAN, &mut policies(Knows, 1), &progress).unwrap();
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

fn steps(seed: u64, pace: Pace) -> (bool, usize) {
    let world = World::new(Scene::new(Suite::Base, seed));
    let outcome = run(world, &mut Expert, pace, STEPS, &mut |_| ()).unwrap();
    (outcome.done, outcome.steps)
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
        let step = |_| steps.next(|step| bytes(step.world, &step.action, 24));
        (0..50).map(step).collect::<Vec<_>>()
    };
    assert!(stream(1) == stream(1) && stream(1) != stream(2));
    assert!(stream(1).iter().all(|step| step.len() == step_bytes(24)));
}
