//! Episodes: a policy in a world, step by step, until the task is done or the time is over.

use std::time::Instant;

use anyhow::Result;
use openvla::Totals;

use crate::expert;
use crate::expert::plan;
use crate::geometry::half_turn;
use crate::world::{Action, TICKS, World};

/// Steps after which an episode has failed. The expert needs about 11.
pub const STEPS: usize = 40;

/// What acts in a world.
pub trait Policy {
    /// The next steps, at least one. All of them are made before it is called again.
    ///
    /// # Errors
    /// If it cannot say.
    fn act(&mut self, world: &World) -> Result<Vec<Action>>;

    /// An episode begins.
    fn begin(&mut self) {}

    /// What drafts did in this episode, if the policy has any.
    fn drafted(&self) -> Totals {
        Totals::default()
    }

    /// Whether it sees the wrist camera's picture beside the front camera's.
    fn sees_wrist(&self) -> bool {
        false
    }
}

/// Knows where everything is.
pub struct Expert {
    /// Steps that it plans ahead.
    pub ahead: usize,
}

impl Policy for Expert {
    fn act(&mut self, world: &World) -> Result<Vec<Action>> {
        Ok(plan(world, self.ahead))
    }
}

/// Whether the world waits for the policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// It does: each step begins where the last one ended.
    Blocking,
    /// The camera takes a picture `hz` times a second and a step lasts one such period. While the
    /// policy thinks, the step before goes on to its end; then the gripper stands still. A period
    /// that begins while the policy still thinks brings no picture, nor does one that begins before
    /// the last step of a chunk.
    Running {
        /// Periods a second.
        hz: f64,
        /// How long a policy thinks. Without it, as long as it does on this machine.
        latency_ms: Option<f64>,
    },
}

impl Pace {
    /// Whether the outcome depends on how long the policy takes on this machine.
    pub fn is_timed(self) -> bool {
        matches!(self, Self::Running { latency_ms: None, .. })
    }
}

/// How an episode went.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Whether the thing lies where it should.
    pub done: bool,
    /// Steps that were made.
    pub steps: usize,
    /// Calls of the policy, each of which saw what the cameras see.
    pub calls: usize,
    /// Milliseconds that they took, all together.
    pub thinking_ms: f64,
    /// Mean over all calls of how far the policy's next step was from the expert's.
    pub error: Difference,
    /// What drafts did.
    pub drafted: Totals,
}

/// How far two actions are from each other.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Difference {
    /// Of Δx Δy Δz, in meters.
    pub metres: f64,
    /// Of Δyaw, in radians.
    pub radians: f64,
    /// 1 if one opens and the other closes.
    pub gripper: f64,
}

impl Difference {
    fn between(a: &Action, b: &Action) -> Self {
        let square = |i: usize| (a[i] - b[i]) * (a[i] - b[i]);
        let gripper = f64::from(u8::from((a[6] >= 0.5) != (b[6] >= 0.5)));
        let metres = (square(0) + square(1) + square(2)).sqrt();
        Self { metres, radians: half_turn(a[5] - b[5]).abs(), gripper }
    }

    /// The mean of several.
    pub fn mean(all: &[Self]) -> Self {
        let mean = |f: fn(&Self) -> f64| all.iter().map(f).sum::<f64>() / all.len().max(1) as f64;
        Self {
            metres: mean(|d| d.metres),
            radians: mean(|d| d.radians),
            gripper: mean(|d| d.gripper),
        }
    }
}

/// Runs an episode to its end. `seen` is called with each world in which a step was chosen or begins,
/// and the last.
///
/// # Errors
/// Those of the policy.
pub fn run(
    mut world: World,
    policy: &mut dyn Policy,
    pace: Pace,
    most: usize,
    seen: &mut dyn FnMut(&World),
) -> Result<Outcome> {
    policy.begin();
    let (mut errors, mut steps, mut thinking_ms) = (Vec::new(), 0, 0.0);
    let mut pending = PendingStep { action: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], left: 0 };
    let mut time = 0; // in ticks
    while !world.is_done() && time < most * TICKS {
        seen(&world);
        let start = Instant::now();
        let actions = policy.act(&world)?;
        let thinking = start.elapsed().as_secs_f64() * 1e3;
        thinking_ms += thinking;
        errors.push(Difference::between(&actions[0], &expert(&world)));
        let delay = match pace {
            Pace::Blocking => 0,
            Pace::Running { hz, latency_ms } => {
                let thinking = latency_ms.unwrap_or(thinking);
                (thinking / 1e3 * hz * TICKS as f64).round() as usize
            }
        };
        pending.advance(&mut world, delay);
        let period = delay.div_ceil(TICKS).max(1) * TICKS;
        time += period;
        for (i, action) in actions.into_iter().enumerate() {
            if i > 0 {
                // The step before has some ticks to go if the policy took part of a period.
                pending.advance(&mut world, pending.left);
                if world.is_done() || time >= most * TICKS {
                    break;
                }
                seen(&world);
                time += TICKS;
            }
            pending = PendingStep { action, left: TICKS };
            steps += 1;
        }
        pending.advance(&mut world, period - delay);
    }
    if !world.is_done() {
        pending.advance(&mut world, pending.left);
    }
    seen(&world);
    let (done, calls, error) = (world.is_done(), errors.len(), Difference::mean(&errors));
    Ok(Outcome { done, steps, calls, thinking_ms, error, drafted: policy.drafted() })
}

/// A step, and how many ticks of it are still to come.
struct PendingStep {
    action: Action,
    left: usize,
}

impl PendingStep {
    /// Lets time pass: the step goes on to its end, then the gripper stands still.
    fn advance(&mut self, world: &mut World, ticks: usize) {
        for _ in 0..ticks {
            if self.left == 0 {
                self.action[..6].fill(0.0);
            }
            world.tick(&self.action);
            self.left = self.left.saturating_sub(1);
        }
    }
}
