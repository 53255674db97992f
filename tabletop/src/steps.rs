//! Steps of the expert, for training: what the camera sees, what is asked, what the expert does.
//!
//! Half of the worlds begin anywhere, with the gripper low or closed; and noise is added to
//! what is done, never to what is recorded: the policy sees states off the path, and the way back.

use crate::camera::Camera;
use crate::expert;
use crate::expert::plan;
use crate::geometry::add;
use crate::render::{picture, wrist_picture};
use crate::scene::{OBJECTS, Scene, SceneRng, Suite};
use crate::world::{Action, ArmState, CEILING, LIMITS, OPEN, REACH, World};

/// An episode ends here at the latest.
const LONGEST: usize = 30;

/// Numbers that may be learned beside the action, about 0 to 1: height and opening of the gripper; and
/// where, from -1 to 1 in the picture, the table is under the gripper, the target, the receptacle, and
/// each kind of object, which follows on whether it is there.
const N_LANDMARK: usize = 8 + 3 * OBJECTS.len();
/// Numbers of the arm's state.
const N_ARM: usize = size_of::<ArmState>() / size_of::<f64>();
/// Actions of an OpenVLA-OFT's pass, LIBERO's.
pub const CHUNK: usize = 8;
/// Bytes of the instruction, filled up with zeros.
const TEXT: usize = 96;

/// An endless stream of steps.
pub struct Steps {
    rng: SceneRng,
    worlds: Vec<Running>,
    next: usize,
}

/// A world, which of all it is, and how many steps it has had.
struct Running {
    world: World,
    episode: usize,
    n: usize,
}

/// A step before it is made.
pub struct Step<'a> {
    /// Counts the worlds of the stream.
    pub episode: usize,
    /// Counts the steps of the world.
    pub n: usize,
    /// What the camera sees.
    pub world: &'a World,
    /// What the expert does.
    pub action: Action,
}

impl Steps {
    /// The stream of a seed, in which `n_world` worlds take turns.
    pub fn new(seed: u64, n_world: usize) -> Self {
        let mut rng = SceneRng::new(seed);
        let begin = |episode| Running { world: begin(&mut rng), episode, n: 0 };
        let worlds = (0..n_world).map(begin).collect();
        Self { rng, worlds, next: 0 }
    }

    /// Shows the next step, then makes it.
    pub fn next<T>(&mut self, see: impl FnOnce(&Step) -> T) -> T {
        let newest = self.worlds.iter().map(|running| running.episode).max().unwrap_or(0);
        let Running { world, episode, n } = &mut self.worlds[self.next];
        let action = expert(world);
        let seen = see(&Step { episode: *episode, n: *n, world, action });
        world.step(&noisy(&action, &mut self.rng));
        *n += 1;
        // Of the time after success, little is to be learned.
        if *n == LONGEST || (world.is_done() && self.rng.chance(0.9)) {
            (*world, *episode, *n) = (begin(&mut self.rng), newest + 1, 0);
        }
        self.next = (self.next + 1) % self.worlds.len();
        seen
    }
}

/// Half of them as an episode begins, the others anywhere.
fn begin(rng: &mut SceneRng) -> World {
    let suite = if rng.chance(0.5) { Suite::Base } else { Suite::Language };
    let mut world = World::new(Scene::new(suite, rng.seed()));
    if rng.chance(0.5) {
        return world;
    }
    let near = world.scene.items[rng.below(world.scene.items.len())].at;
    let at = if rng.chance(0.5) {
        [rng.within(-REACH, REACH), rng.within(-REACH, REACH)]
    } else {
        add(near, [0.02 * rng.normal(), 0.02 * rng.normal()])
    };
    world.gripper.at = at.map(|x| x.clamp(-REACH, REACH));
    world.gripper.z = rng.within(0.07, CEILING);
    if rng.chance(0.5) {
        world.step(&[0.0, 0.0, rng.within(-LIMITS[2], 0.0), 0.0, 0.0, 0.0, 1.0]);
    }
    if rng.chance(0.1) {
        world.step(&[0.0; 7]); // closes, mostly on nothing
    }
    world
}

fn noisy(action: &Action, rng: &mut SceneRng) -> Action {
    let mut noisy = *action;
    if rng.chance(0.4) {
        for (i, deviation) in [(0, 0.015), (1, 0.015), (2, 0.01)] {
            noisy[i] += deviation * rng.normal();
        }
    }
    if rng.chance(0.02) {
        noisy[6] = 1.0 - noisy[6];
    }
    noisy
}

/// Whose steps they are: what it sees and what it learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learner {
    /// An OpenVLA: the front picture; the next action.
    OpenVla,
    /// An OpenVLA-OFT: both pictures and the arm's state; the next [`CHUNK`] actions.
    Oft,
}

impl Learner {
    /// A step as bytes: pictures, actions, the arm's state and what else may be learned in f32, instruction.
    pub fn bytes(self, world: &World, size: u32) -> Vec<u8> {
        let mut bytes = picture(world, size).into_raw();
        let mut numbers: Vec<f64> = Vec::new();
        match self {
            Self::OpenVla => numbers.extend(expert(world)),
            Self::Oft => {
                bytes.extend(wrist_picture(world, size).into_raw());
                numbers.extend(plan(world, CHUNK).into_flattened());
                numbers.extend(world.gripper.state());
            }
        }
        numbers.extend(landmarks(world, Camera::Front));
        if self == Self::Oft {
            numbers.extend(landmarks(world, Camera::Wrist(world.gripper)));
        }
        bytes.extend(numbers.iter().flat_map(|x| (*x as f32).to_le_bytes()));
        bytes.extend(world.scene.instruction.bytes());
        bytes.resize(self.step_bytes(size), 0);
        bytes
    }

    /// How many those are.
    pub fn step_bytes(self, size: u32) -> usize {
        let (n_picture, n_number) = match self {
            Self::OpenVla => (1, 7),
            Self::Oft => (2, 7 * CHUNK + N_ARM),
        };
        n_picture * (3 * (size * size) as usize + 4 * N_LANDMARK) + 4 * n_number + TEXT
    }
}

/// What may be learned beside the action, as a camera sees it.
fn landmarks(world: &World, camera: Camera) -> Vec<f64> {
    let (gripper, scene) = (&world.gripper, &world.scene);
    let mut numbers = vec![gripper.z / CEILING, gripper.opening / OPEN];
    for at in [gripper.at, world.target().at, scene.receptacle_at] {
        numbers.extend(camera.seen(at, 0.0));
    }
    for object in &OBJECTS {
        let item = scene.items.iter().find(|item| item.object == object);
        let [x, y] = item.map_or([0.0; 2], |item| camera.seen(item.at, 0.0));
        numbers.extend([f64::from(u8::from(item.is_some())), x, y]);
    }
    numbers
}
