//! The world: a gripper over a table, and what happens when it moves and closes.
//!
//! in   an [`Action`], OpenVLA's seven numbers: meters, radians, and 1 for open or 0 for closed
//! out  where everything is afterwards
//!
//! The gripper points down; it has no joints for roll and pitch, so those two are ignored. A step
//! is cut into [`TICKS`] small motions. Each is refused if a finger or what it holds would enter a
//! wall, the table, or a thing that cannot give way; a finger that moves sideways pushes free things.

use std::f64::consts::FRAC_PI_2;

use crate::geometry::{Point, Rod, add, direction, half_turn, length, scale, sub, turn};
use crate::scene::{Item, Scene};

/// Δx Δy Δz in meters, Δroll Δpitch Δyaw in radians, gripper: at least a half opens, less closes.
pub type Action = [f64; 7];

/// The most that a step moves: meters and radians.
pub const LIMITS: [f64; 6] = [0.06, 0.06, 0.06, 0.0, 0.0, 0.3];
/// Motions of a step.
pub const TICKS: usize = 10;
/// Between the fingers' middles when they are open.
pub const OPEN: f64 = 0.11;
/// Radius of a finger.
pub const FINGER: f64 = 0.008;
/// How far from the middle the gripper and things on the table can be.
pub const REACH: f64 = 0.15;
/// Where the table ends, in a rim that nothing gets over.
pub const TABLE: f64 = 0.20;
/// The highest the fingertips get.
pub const CEILING: f64 = 0.12;
/// Thickness of a receptacle's floor.
pub const FLOOR: f64 = 0.004;
/// A thing slips out of fingers that press it at more than this from its short axis: about 35°.
const FRICTION: f64 = 0.6;
/// How deep fingertips must be below a thing's upper side to hold it.
const GRIP: f64 = 0.003;

/// Where the gripper is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gripper {
    /// Between the fingers.
    pub at: Point,
    /// Height of the fingertips over the table.
    pub z: f64,
    /// Angle from the x axis of the line between the fingers.
    pub yaw: f64,
    /// Between the fingers' middles.
    pub opening: f64,
}

/// An arm's state: position, then roll, pitch and yaw, then where each finger is, as LIBERO's robots
/// report theirs. Meters and radians.
pub type ArmState = [f64; 8];

impl Gripper {
    /// What the arm reports of itself.
    pub fn state(&self) -> ArmState {
        let [x, y] = self.at;
        let finger = self.opening / 2.0;
        [x, y, self.z, 0.0, 0.0, self.yaw, finger, -finger]
    }

    /// Where its fingers are.
    pub fn fingers(&self) -> [Point; 2] {
        let half = scale(direction(self.yaw), self.opening / 2.0);
        [sub(self.at, half), add(self.at, half)]
    }
}

/// What the fingers hold, and where it is as seen from the gripper.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Held {
    /// Index of the item.
    pub item: usize,
    offset: Point,
    below: f64,
    yaw: f64,
}

/// A scene as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct World {
    /// What is on the table, where it is by now.
    pub scene: Scene,
    /// Where the gripper is.
    pub gripper: Gripper,
    /// What it holds.
    pub held: Option<Held>,
}

impl World {
    /// The beginning of a scene.
    pub fn new(scene: Scene) -> Self {
        let [x, y, z, yaw] = scene.start;
        let gripper = Gripper { at: [x, y], z, yaw, opening: OPEN };
        Self { scene, gripper, held: None }
    }

    /// The item that is asked for.
    pub fn target(&self) -> &Item {
        &self.scene.items[self.scene.target]
    }

    /// Whether the task is done: its item lies in the receptacle.
    pub fn is_done(&self) -> bool {
        self.is_inside(self.scene.target)
    }

    fn is_inside(&self, item: usize) -> bool {
        let distance = length(sub(self.scene.items[item].at, self.scene.receptacle_at));
        !self.holds(item) && distance < self.scene.receptacle.inner
    }

    /// A whole step.
    pub fn step(&mut self, action: &Action) {
        for _ in 0..TICKS {
            self.tick(action);
        }
    }

    /// A tenth of a step. Fingers open and close within the first.
    pub fn tick(&mut self, action: &Action) {
        let delta = |i: usize| {
            if action[i].is_nan() {
                0.0
            } else {
                action[i].clamp(-LIMITS[i], LIMITS[i]) / TICKS as f64
            }
        };
        if action[6] >= 0.5 {
            self.open()
        } else {
            self.close()
        }
        let Gripper { at, z, yaw, .. } = self.gripper;
        let at = add(at, [delta(0), delta(1)]).map(|x| x.clamp(-REACH, REACH));
        self.go(Gripper { at, ..self.gripper }, Motion::Sideways);
        let z = (z + delta(2)).clamp(0.0, CEILING);
        self.go(Gripper { z, ..self.gripper }, Motion::Vertical);
        let yaw = (yaw + delta(5)).clamp(-FRAC_PI_2, FRAC_PI_2);
        self.go(Gripper { yaw, ..self.gripper }, Motion::Sideways);
        for i in 0..self.scene.items.len() {
            if self.scene.items[i].z > 0.0 && !self.holds(i) {
                self.fall(i);
            }
        }
    }

    fn holds(&self, item: usize) -> bool {
        self.held.is_some_and(|held| held.item == item)
    }

    /// Moves the gripper unless something is in the way.
    fn go(&mut self, to: Gripper, motion: Motion) {
        let fingers = to.fingers();
        let walls = fingers.iter().any(|f| self.hits_wall(&Rod::disk(*f, FINGER), to.z));
        if walls || self.held.is_some_and(|held| self.carried_hits(held, &to)) {
            return;
        }
        let mut items = self.scene.items.clone();
        for i in (0..items.len()).filter(|i| !self.holds(*i)) {
            for finger in fingers {
                let out = items[i].rod().clearance(finger, FINGER);
                let Some(out) = out.filter(|_| items[i].top() > to.z) else { continue };
                items[i].at = add(items[i].at, out);
                if motion == Motion::Vertical || !self.has_room(&items, i) {
                    return;
                }
            }
        }
        self.scene.items = items;
        self.gripper = to;
        if let Some(held) = self.held {
            self.scene.items[held.item] = self.carried(held, &to);
        }
    }

    /// Whether a body whose underside is at `z` would be in the receptacle's wall or floor.
    fn hits_wall(&self, body: &Rod, z: f64) -> bool {
        let bin = self.scene.receptacle;
        let [near, far] = body.distances(self.scene.receptacle_at);
        let in_wall = near < bin.outer && far > bin.inner && z < bin.height;
        in_wall || (near < bin.inner && z < FLOOR)
    }

    /// A held item when the gripper is there.
    fn carried(&self, held: Held, gripper: &Gripper) -> Item {
        let item = &self.scene.items[held.item];
        let at = add(gripper.at, turn(held.offset, gripper.yaw));
        Item { at, z: gripper.z - held.below, yaw: gripper.yaw + held.yaw, ..item.clone() }
    }

    fn carried_hits(&self, held: Held, to: &Gripper) -> bool {
        let item = self.carried(held, to);
        let rod = item.rod();
        let mut others = self.scene.items.iter().enumerate().filter(|(i, _)| *i != held.item);
        item.z < -1e-9
            || !on_table(&rod)
            || self.hits_wall(&rod, item.z)
            || others.any(|(_, other)| item.z < other.top() && rod.overlaps(&other.rod()))
    }

    /// Whether a thing that was pushed may be where it is now.
    fn has_room(&self, items: &[Item], pushed: usize) -> bool {
        let (item, rod) = (&items[pushed], items[pushed].rod());
        let mut others = items.iter().enumerate().filter(|(i, _)| *i != pushed && !self.holds(*i));
        let inside = self.is_inside(pushed);
        let wall = if inside {
            rod.distances(self.scene.receptacle_at)[1] > self.scene.receptacle.inner
        } else {
            self.hits_wall(&rod, item.z)
        };
        on_table(&rod) && !wall && !others.any(|(_, other)| rod.overlaps(&other.rod()))
    }

    /// Closes the fingers around what is between them, or on nothing. Where they cannot, they stay
    /// open: at a wall, or at a thing that is pressed at such a slant that it would turn out.
    fn close(&mut self) {
        if self.gripper.opening < OPEN {
            return;
        }
        let Gripper { at, z, yaw, .. } = self.gripper;
        let along = direction(yaw);
        let reach = OPEN / 2.0 - FINGER;
        let between = |item: &Item| {
            let [from, to] = item.rod().chord(at, along)?;
            (z < item.top() - GRIP && from > -reach && to < reach).then_some([from, to])
        };
        let mut items = self.scene.items.clone();
        let found = items.iter().enumerate().find_map(|(i, item)| Some((i, between(item)?)));
        let width = found.map_or(0.0, |(_, [from, to])| to - from);
        let closed = Gripper { opening: 2.0 * FINGER + width, ..self.gripper };
        if self.sweeps_wall(&closed) {
            return;
        }
        let Some((i, [from, to])) = found else { return self.go(closed, Motion::Sideways) };
        let item = &mut items[i];
        item.at = sub(item.at, scale(along, f64::midpoint(from, to)));
        let slant = half_turn(item.yaw - yaw).abs();
        let turns_out = item.object.half > 0.0 && slant > FRICTION; // round things cannot
        let offset = turn(sub(item.at, at), -yaw);
        let held = Held { item: i, offset, below: z - item.z, yaw: item.yaw - yaw };
        if !turns_out && self.has_room(&items, i) {
            self.scene.items = items;
            (self.gripper, self.held) = (closed, Some(held));
        }
    }

    /// Whether a finger meets the receptacle's wall on the way there.
    fn sweeps_wall(&self, to: &Gripper) -> bool {
        let ways = self.gripper.fingers().into_iter().zip(to.fingers());
        let mut ways = ways.map(|(a, b)| Rod {
            at: scale(add(a, b), 0.5),
            half: scale(sub(b, a), 0.5),
            radius: FINGER,
        });
        ways.any(|way| self.hits_wall(&way, to.z))
    }

    /// Opens the fingers, if there is room.
    fn open(&mut self) {
        let wide = Gripper { opening: OPEN, ..self.gripper };
        if self.gripper.opening < OPEN {
            let held = self.held.take();
            if !self.sweeps_wall(&wide) {
                self.go(wide, Motion::Sideways);
            }
            if self.gripper != wide {
                self.held = held;
            }
        }
    }

    /// What nothing holds falls straight down. From the receptacle's wall it slides to the side that
    /// its middle is on, or inside if there is no table outside; on another item it stays.
    fn fall(&mut self, i: usize) {
        let (center, bin) = (self.scene.receptacle_at, self.scene.receptacle);
        let (rod, was) = (self.scene.items[i].rod(), self.scene.items[i].z);
        let from = sub(rod.at, center);
        let slide = |t: f64| Rod { at: add(center, scale(from, t)), ..rod };
        let distance = length(from);
        let far = bin.outer + length(rod.half) + rod.radius;
        let outside =
            || nearest(far / distance, slide, |rod| rod.distances(center)[0] >= bin.outer);
        let beside = (distance >= bin.inner).then(outside).filter(on_table);
        let inside = || nearest(0.0, slide, |rod| rod.distances(center)[1] <= bin.inner);
        let (rod, ground) = beside.map_or_else(|| (inside(), FLOOR), |rod| (rod, 0.0));
        let others = self.scene.items.iter().enumerate();
        let others =
            others.filter(|(j, other)| *j != i && !self.holds(*j) && other.top() < was + 1e-9);
        let below = others.filter(|(_, other)| rod.overlaps(&other.rod()));
        let z = below.map(|(_, other)| other.top()).fold(ground, f64::max);
        let item = &mut self.scene.items[i];
        (item.at, item.z) = (rod.at, z.min(was));
    }
}

/// The place that fits and is nearest to where it is, at `t` = 1, on the way to a `t` that fits.
fn nearest(fitting: f64, slide: impl Fn(f64) -> Rod, fits: impl Fn(&Rod) -> bool) -> Rod {
    if fits(&slide(1.0)) {
        return slide(1.0);
    }
    let (mut good, mut bad) = (fitting, 1.0);
    for _ in 0..40 {
        let middle = f64::midpoint(good, bad);
        if fits(&slide(middle)) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    slide(good)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Motion {
    Sideways,
    Vertical,
}

fn on_table(rod: &Rod) -> bool {
    let most = |i: usize| rod.at[i].abs() + rod.half[i].abs() + rod.radius;
    most(0) < TABLE && most(1) < TABLE
}
