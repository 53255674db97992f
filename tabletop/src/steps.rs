//! Steps of the expert, for training: what the camera sees, what is asked, what the expert does.
//!
//! Half of the worlds begin anywhere, with the gripper low or closed; and noise is added to
//! what is done, never to what is recorded: the policy sees states off the path, and the way back.

use crate::expert;
use crate::geometry::add;
use crate::render::{picture, seen};
use crate::scene::{OBJECTS, Scene, SceneRng, Suite};
use crate::world::{Action, CEILING, LIMITS, OPEN, REACH, World};

/// An episode ends here at the latest.
const LONGEST: usize = 30;

/// Numbers that may be learned beside the action, about 0 to 1: height and opening of the gripper; and
/// where, from -1 to 1 in the picture, the table is under the gripper, the target, the receptacle, and
/// each kind of object, which follows on whether it is there.
const N_STATE: usize = 8 + 3 * OBJECTS.len();
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

/// The numbers beside the action.
fn state(world: &World) -> Vec<f64> {
    let (gripper, scene) = (&world.gripper, &world.scene);
    let mut state = vec![gripper.z / CEILING, gripper.opening / OPEN];
    for at in [gripper.at, world.target().at, scene.receptacle_at] {
        state.extend(seen(at, 0.0));
    }
    for object in &OBJECTS {
        let item = scene.items.iter().find(|item| item.object == object);
        let [x, y] = item.map_or([0.0; 2], |item| seen(item.at, 0.0));
        state.extend([f64::from(u8::from(item.is_some())), x, y]);
    }
    state
}

/// A step as bytes: picture, action and state in f32, instruction; see [`step_bytes`].
pub fn bytes(world: &World, action: &Action, size: u32) -> Vec<u8> {
    let mut bytes = picture(world, size).into_raw();
    let numbers = action.iter().copied().chain(state(world));
    bytes.extend(numbers.flat_map(|x| (x as f32).to_le_bytes()));
    bytes.extend(world.scene.instruction.bytes());
    bytes.resize(step_bytes(size), 0);
    bytes
}

/// How many those are.
pub fn step_bytes(size: u32) -> usize {
    3 * (size * size) as usize + 4 * (7 + N_STATE) + TEXT
}
