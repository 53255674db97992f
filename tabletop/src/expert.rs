//! The expert: what to do next, decided from where everything is alone.
//!
//! One thing at a time: rise, move above the object, descend, close; rise, move above the
//! receptacle, open. Heights are not aimed at: up is as far as the gripper goes, down is the table.

use crate::geometry::{length, sub};
use crate::world::{Action, LIMITS, OPEN, World};

/// Below this, things are in the way.
const CLEAR: f64 = 0.08;
/// Near enough to begin to descend, to go on and close, and to open over a receptacle.
const ABOVE: f64 = 0.015;
const AROUND: f64 = 0.024;
const OVER: f64 = 0.03;
/// Low enough to close.
const LOW: f64 = 0.02;

/// The best next step. Each axis goes as far as a step may, or to its goal. It does not turn: things
/// lie so that fingers which do not turn hold them.
pub fn act(world: &World) -> Action {
    let (gripper, item) = (&world.gripper, world.target());
    let holds_target = world.held.is_some_and(|held| held.item == world.scene.target);
    let wrong = !holds_target && gripper.opening < OPEN; // closed on nothing, or on another item
    if wrong || world.is_done() {
        return motion([0.0; 3], true);
    }
    let goal = if holds_target { world.scene.receptacle_at } else { item.at };
    let [x, y] = sub(goal, gripper.at);
    let (distance, high) = (length([x, y]), gripper.z > CLEAR);
    let near = distance < if high { ABOVE } else { AROUND };
    let up = LIMITS[2];
    match (holds_target, high) {
        (true, true) if distance < OVER => motion([0.0; 3], true),
        (false, _) if near && gripper.z < LOW => motion([0.0; 3], false),
        (false, _) if near => motion([x, y, -up], true),
        (_, true) => motion([x, y, up], !holds_target),
        // Straight up first: what is low would push things about.
        (_, false) => motion([0.0, 0.0, up], !holds_target),
    }
}

/// The next `n` steps, if nothing comes between.
pub fn plan(world: &World, n: usize) -> Vec<Action> {
    let mut world = world.clone();
    let next = |_| {
        let action = act(&world);
        world.step(&action);
        action
    };
    (0..n).map(next).collect()
}

fn motion(way: [f64; 3], open: bool) -> Action {
    let [x, y, z] = [0, 1, 2].map(|i| way[i].clamp(-LIMITS[i], LIMITS[i]));
    [x, y, z, 0.0, 0.0, 0.0, f64::from(u8::from(open))]
}
