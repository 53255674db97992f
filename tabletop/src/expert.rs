//! The expert: what to do next, decided from where everything is alone.
//!
//! Rise, move above the object and turn, descend, close; rise, move above the receptacle, open.

use crate::geometry::{length, sub};
use crate::world::{Action, LIMITS, OPEN, World, alignment};

/// Height of the fingertips when moving over things.
const OVER: f64 = 0.10;
/// Below this, things are in the way.
const CLEAR: f64 = 0.07;
/// How deep fingertips go: over an item's underside.
const DEPTH: f64 = 0.006;
/// Near enough to descend, metres and radians; and to close.
const ABOVE: f64 = 0.02;
const ALIGNED: f64 = 0.25;
const LOW: f64 = 0.010;

/// The best next step. Each axis goes as far as a step may, or to its goal.
pub fn act(world: &World) -> Action {
    let (gripper, item) = (&world.gripper, world.target());
    let holds_target = world.held.is_some_and(|held| held.item == world.scene.target);
    let wrong = !holds_target && gripper.opening < OPEN; // closed on nothing, or on another item
    if wrong || world.is_done() {
        return motion([0.0; 3], 0.0, true);
    }
    let goal = if holds_target { world.scene.receptacle_at } else { item.at };
    let [x, y] = sub(goal, gripper.at);
    let above = length([x, y]) < ABOVE;
    let turn = match holds_target {
        true => 0.0,
        false if item.object.half == 0.0 => -gripper.yaw,
        false => alignment(gripper, item),
    };
    if holds_target && above && gripper.z > CLEAR {
        return motion([0.0; 3], 0.0, true);
    }
    if holds_target || !above || turn.abs() > ALIGNED {
        // Straight up first: what is low would push things about.
        let [x, y] = if gripper.z < CLEAR { [0.0; 2] } else { [x, y] };
        return motion([x, y, OVER - gripper.z], turn, !holds_target);
    }
    let bottom = item.z + DEPTH;
    match gripper.z < bottom + LOW {
        true => motion([0.0; 3], 0.0, false),
        false => motion([x, y, bottom - gripper.z], turn, true),
    }
}

fn motion(way: [f64; 3], turn: f64, open: bool) -> Action {
    let [x, y, z] = [0, 1, 2].map(|i| way[i].clamp(-LIMITS[i], LIMITS[i]));
    [x, y, z, 0.0, 0.0, turn.clamp(-LIMITS[5], LIMITS[5]), f64::from(u8::from(open))]
}
