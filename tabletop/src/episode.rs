//! Episodes: a policy in a world, step by step, until the task is done or the time is over.

use std::time::Instant;

use anyhow::Result;
use openvla::image::RgbImage;
use openvla::{OpenVla, Session, Totals};

use crate::expert;
use crate::geometry::half_turn;
use crate::render::picture;
use crate::world::{Action, TICKS, World};

/// Steps after which an episode has failed. The expert needs about 11.
pub const STEPS: usize = 40;

/// What acts in a world.
pub trait Policy {
    /// The next step.
    ///
    /// # Errors
    /// If it cannot say.
    fn act(&mut self, world: &World) -> Result<Action>;

    /// An episode begins.
    fn begin(&mut self) {}

    /// What drafts did in this episode, if the policy has any.
    fn drafted(&self) -> Totals {
        Totals::default()
    }
}

/// Knows where everything is.
pub struct Expert;

impl Policy for Expert {
    fn act(&mut self, world: &World) -> Result<Action> {
        Ok(expert(world))
    }
}

/// Sees what the camera sees, in the size that the model wants, and reads the instruction.
pub struct Model {
    vla: OpenVla,
    unnorm_key: Option<String>,
    session: Session,
    drafted: Totals,
}

impl Model {
    /// `unnorm_key` names the model's data set whose units are meters and radians per step; it may
    /// be left out where there is one.
    ///
    /// # Errors
    /// If the model's motions are not of seven numbers, or the data set is unknown.
    pub fn new(vla: OpenVla, unnorm_key: Option<String>) -> Result<Self> {
        let (name, dataset) = vla.config().statistics.select(unnorm_key.as_deref())?;
        let n = dataset.action.n();
        anyhow::ensure!(n == 7, "motions of `{name}` have {n} numbers; seven move this gripper");
        Ok(Self { vla, unnorm_key, session: Session::default(), drafted: Totals::default() })
    }

    /// What it sees.
    pub fn render_view(&self, world: &World) -> RgbImage {
        picture(world, self.vla.config().preprocess.size)
    }

    /// All that it says to a picture.
    ///
    /// # Errors
    /// If it cannot say.
    pub fn answer(&mut self, picture: &RgbImage, instruction: &str) -> Result<openvla::Action> {
        let key = self.unnorm_key.as_deref();
        Ok(self.vla.act_in(&mut self.session, picture, instruction, key)?)
    }

    /// The network that it is.
    pub fn vla(&self) -> &OpenVla {
        &self.vla
    }
}

impl Policy for Model {
    fn act(&mut self, world: &World) -> Result<Action> {
        let action = self.answer(&self.render_view(world), &world.scene.instruction)?;
        self.drafted = action.draft.session;
        Ok(std::array::from_fn(|i| action.action[i]))
    }

    fn begin(&mut self) {
        (self.session, self.drafted) = Default::default();
    }

    fn drafted(&self) -> Totals {
        self.drafted.clone()
    }
}

/// Whether the world waits for the policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// It does: each step begins where the last one ended.
    Blocking,
    /// The camera takes a picture `hz` times a second and a step lasts one such period. While the
    /// policy thinks, the step before goes on to its end; then the gripper stands still. A period
    /// that begins while the policy still thinks brings no picture.
    Running {
        /// Periods a second.
        hz: f64,
        /// How long a policy thinks. Without it, as long as it does on this machine.
        latency_ms: Option<f64>,
    },
}

/// How an episode went.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Whether the thing lies where it should.
    pub done: bool,
    /// Steps that were asked of the policy.
    pub steps: usize,
    /// Means over all steps of how far the policy was from the expert.
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

/// Runs an episode to its end. `seen` is called with each world that the policy sees, and the last.
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
    let mut errors = Vec::new();
    let mut pending = PendingStep { action: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], left: 0 };
    let mut time = 0; // in ticks
    while !world.is_done() && time < most * TICKS {
        seen(&world);
        let start = Instant::now();
        let action = policy.act(&world)?;
        errors.push(Difference::between(&action, &expert(&world)));
        let delay = match pace {
            Pace::Blocking => 0,
            Pace::Running { hz, latency_ms } => {
                let thinking = latency_ms.unwrap_or_else(|| start.elapsed().as_secs_f64() * 1e3);
                (thinking / 1e3 * hz * TICKS as f64).round() as usize
            }
        };
        let period = delay.div_ceil(TICKS).max(1) * TICKS;
        pending.advance(&mut world, delay);
        pending = PendingStep { action, left: TICKS };
        pending.advance(&mut world, period - delay);
        time += period;
    }
    if !world.is_done() {
        pending.advance(&mut world, pending.left);
    }
    seen(&world);
    let error = Difference::mean(&errors);
    Ok(Outcome { done: world.is_done(), steps: errors.len(), error, drafted: policy.drafted() })
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
