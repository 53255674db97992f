//! Evaluation: many episodes of each suite, and how sure their success rate is.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::episode::{Difference, Outcome, Pace, Policy, run};
use crate::scene::{Scene, Suite};
use crate::world::World;

/// Which episodes.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How many of each suite.
    pub episodes: usize,
    /// The first scene's seed; the next has the next.
    pub seed: u64,
    /// Whether worlds wait.
    pub pace: Pace,
    /// Steps after which an episode has failed.
    pub steps: usize,
}

/// How a suite went.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Which suite.
    pub suite: Suite,
    /// Episodes.
    pub episodes: usize,
    /// Those that succeeded.
    pub successes: usize,
    /// Their share.
    pub rate: f64,
    /// Wilson's interval around it, of 95 %.
    pub interval: [f64; 2],
    /// Mean steps of the episodes that succeeded.
    pub steps: Option<f64>,
    /// Mean calls of the policy in those.
    pub calls: Option<f64>,
    /// Mean milliseconds of a call, where the policy had the machine for itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<f64>,
    /// Mean over episodes of how far the policy was from the expert.
    pub error: Difference,
    /// Passes of the Llama for one motion.
    pub passes: Option<f64>,
    /// Tokens of a motion that were drafted and right.
    pub accepted: Option<f64>,
}

/// Runs a suite, with as many threads as there are policies. The outcome does not depend on how
/// many there are.
///
/// # Errors
/// The first of a policy's.
pub fn evaluate(
    suite: Suite,
    plan: &Plan,
    policies: &mut [Box<dyn Policy + Send>],
    progress: &ProgressBar,
) -> Result<Report> {
    let next = AtomicUsize::new(0);
    let work = |policy: &mut dyn Policy| -> Result<Vec<(usize, Outcome)>> {
        let mut outcomes = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= plan.episodes {
                return Ok(outcomes);
            }
            let world = World::new(Scene::new(suite, plan.seed.wrapping_add(i as u64)));
            outcomes.push((i, run(world, policy, plan.pace, plan.steps, &mut |_| ())?));
            progress.inc(1);
        }
    };
    let work = &work;
    let all: Vec<Result<Vec<_>>> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            policies.iter_mut().map(|p| scope.spawn(move || work(p.as_mut()))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no policy panics")).collect()
    });
    let mut outcomes = all.into_iter().collect::<Result<Vec<_>>>()?.concat();
    outcomes.sort_by_key(|(i, _)| *i); // sums of floats depend on their order
    let outcomes: Vec<Outcome> = outcomes.into_iter().map(|(_, outcome)| outcome).collect();
    Ok(report(suite, plan, &outcomes))
}

fn report(suite: Suite, plan: &Plan, outcomes: &[Outcome]) -> Report {
    let done: Vec<&Outcome> = outcomes.iter().filter(|o| o.done).collect();
    let (episodes, successes) = (outcomes.len(), done.len());
    let mean = |f: fn(&Outcome) -> usize| {
        let sum: usize = done.iter().map(|outcome| f(outcome)).sum();
        (successes > 0).then(|| sum as f64 / successes as f64)
    };
    let errors: Vec<Difference> = outcomes.iter().map(|outcome| outcome.error).collect();
    let sum = |f: fn(&Outcome) -> usize| outcomes.iter().map(f).sum::<usize>() as f64;
    let thinking: f64 = outcomes.iter().map(|o| o.thinking_ms).sum();
    let (actions, passes) = (sum(|o| o.drafted.actions), sum(|o| o.drafted.passes));
    let accepted = sum(|o| o.drafted.accepted.iter().sum());
    Report {
        suite,
        episodes,
        successes,
        rate: successes as f64 / episodes as f64,
        interval: wilson(successes, episodes),
        steps: mean(|o| o.steps),
        calls: mean(|o| o.calls),
        latency_ms: plan.pace.is_timed().then(|| thinking / sum(|o| o.calls)),
        error: Difference::mean(&errors),
        passes: (actions > 0.0).then(|| passes / actions),
        accepted: (actions > 0.0).then(|| accepted / actions),
    }
}

/// A progress bar of `n` of something, such as episodes, shown from the third second on, and only to people.
pub fn progress(n: u64, unit: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = format!("{{bar:30}} {{pos}} of {{len}} {unit}, {{eta}} left");
    let style = ProgressStyle::with_template(&template);
    let bar = ProgressBar::with_draw_target(Some(n), ProgressDrawTarget::stderr_with_hz(2));
    bar.with_style(style.expect("a sound template"))
}

/// Wilson's score interval of 95 % for a share of `k` in `n`.
pub fn wilson(k: usize, n: usize) -> [f64; 2] {
    const Z: f64 = 1.959_963_984_540_054;
    let (n, p) = (n as f64, k as f64 / n as f64);
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    [(middle - half), (middle + half)].map(|x| (x / (1.0 + Z * Z / n)).clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its definition: the ends are where the observed share is just Z deviations away.
    #[test]
    fn wilsons_ends_are_two_deviations_from_what_was_seen() {
        for (k, n) in [(0, 10), (45, 50), (50, 50), (7, 9)] {
            let p = k as f64 / n as f64;
            let [low, high] = wilson(k, n);
            assert!((0.0..=p).contains(&low) && (p..=1.0).contains(&high), "{k} of {n}");
            for end in [low, high].into_iter().filter(|end| *end > 1e-9 && *end < 1.0 - 1e-9) {
                let deviations = (p - end).abs() / (end * (1.0 - end) / n as f64).sqrt();
                assert!((deviations - 1.959_963_984_540_054).abs() < 1e-9, "{k} of {n}: {end}");
            }
        }
    }
}
