//! Scenes: what lies on the table, how it looks, and what is asked, all drawn from a seed.

use clap::ValueEnum;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::geometry::{Point, Rod, direction, length, scale, sub};

/// Something to grasp: a rod of some height. Meters.
#[derive(Debug, PartialEq)]
pub struct Object {
    /// The word for it.
    pub name: &'static str,
    /// Half of the segment that the rod is around. Zero for round things.
    pub half: f64,
    /// Around that segment.
    pub radius: f64,
    /// Of its upper side, over its underside.
    pub height: f64,
    /// RGB, in full light.
    pub color: [u8; 3],
}

const fn object(name: &'static str, size: [f64; 3], color: [u8; 3]) -> Object {
    Object { name, half: size[0], radius: size[1], height: size[2], color }
}

/// What can be asked for.
pub const OBJECTS: [Object; 3] = [
    object("eggplant", [0.018, 0.021, 0.036], [120, 20, 150]),
    object("carrot", [0.026, 0.017, 0.032], [250, 120, 10]),
    object("cucumber", [0.026, 0.018, 0.034], [30, 150, 50]),
];
/// What only lies about.
pub const DISTRACTORS: [Object; 2] = [
    object("block", [0.006, 0.013, 0.022], [150, 120, 95]),
    object("stone", [0.0, 0.016, 0.02], [120, 125, 130]),
];

/// Something to put things into: a ring of wall around a floor. Meters.
#[derive(Debug, PartialEq)]
pub struct Receptacle {
    /// The word for it.
    pub name: &'static str,
    /// Radius of the wall's inside.
    pub inner: f64,
    /// Radius of its outside.
    pub outer: f64,
    /// Of the wall.
    pub height: f64,
    /// RGB, in full light.
    pub color: [u8; 3],
    /// Its words for "into".
    pub into: [&'static str; 2],
}

/// Where things can be put.
pub const RECEPTACLES: [Receptacle; 2] = [
    receptacle("pot", [0.058, 0.066, 0.05], [56, 58, 66], ["into", "in"]),
    receptacle("plate", [0.058, 0.066, 0.012], [250, 250, 250], ["onto", "on"]),
];

const fn receptacle(
    name: &'static str,
    size: [f64; 3],
    color: [u8; 3],
    into: [&'static str; 2],
) -> Receptacle {
    Receptacle { name, inner: size[0], outer: size[1], height: size[2], color, into }
}

/// Which scenes are drawn. All but the first differ from the training data in one way, along
/// OpenVLA's axes of generalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Suite {
    /// The training distribution: one or two objects, a receptacle
    Base,
    /// Other table colors and light, and a distractor
    Visual,
    /// Objects farther out and turned farther than in training
    Motion,
    /// Objects smaller or larger than in training
    Physical,
    /// Wordings that are not in the training data
    Semantic,
    /// Two objects, either of which could be asked for
    Language,
}

impl std::str::FromStr for Suite {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        <Self as ValueEnum>::from_str(name, false).map_err(|_| {
            let known = Self::value_variants().iter().filter_map(Self::to_possible_value);
            let known: Vec<String> = known.map(|suite| suite.get_name().to_owned()).collect();
            format!("there is no suite `{name}`; there are {}", known.join(", "))
        })
    }
}

/// An object that lies on the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// What it is.
    pub object: &'static Object,
    /// How much larger than usual it is.
    pub size: f64,
    /// Its middle.
    pub at: Point,
    /// Height of its underside over the table.
    pub z: f64,
    /// Angle of its long axis from the y axis, counter-clockwise.
    pub yaw: f64,
}

impl Item {
    /// Its footprint.
    pub fn rod(&self) -> Rod {
        let [c, s] = direction(self.yaw);
        let half = scale([-s, c], self.size * self.object.half);
        Rod { at: self.at, half, radius: self.size * self.object.radius }
    }

    /// Height of its upper side over the table.
    pub fn top(&self) -> f64 {
        self.z + self.size * self.object.height
    }
}

/// How a scene looks.
#[derive(Debug, Clone, PartialEq)]
pub struct Look {
    /// RGB of the table, in full light.
    pub table: [u8; 3],
    /// What all colors are multiplied by.
    pub brightness: f64,
    /// How far a shadow reaches, per height.
    pub light: Point,
}

/// A task and where everything is when it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// What lies on the table.
    pub items: Vec<Item>,
    /// Where the item is to be put.
    pub receptacle: &'static Receptacle,
    /// Its middle.
    pub receptacle_at: Point,
    /// Index of the item that is asked for.
    pub target: usize,
    /// The task in words.
    pub instruction: String,
    /// How it looks.
    pub look: Look,
    /// Where the gripper begins: x, y, z, yaw.
    pub start: [f64; 4],
}

/// Random numbers that are the same on every machine.
pub struct SceneRng(ChaCha8Rng);

impl SceneRng {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A seed for something else.
    pub fn seed(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Evenly in `low..high`.
    pub fn within(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * f64::from(self.0.next_u32()) / 4_294_967_296.0
    }

    /// Around 0 with deviation 1, near enough.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.within(-0.5, 0.5)).sum()
    }

    /// Evenly in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.within(0.0, 1.0) < p
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// Wordings of the training data; `{into}` is the receptacle's.
pub const WORDINGS: [&str; 3] = [
    "put {object} {into} {receptacle}",
    "put the {object} {into} the {receptacle}",
    "place the {object} {into} the {receptacle}",
];
const UNSEEN_WORDINGS: [&str; 4] = [
    "take the {object} and place it {into} the {receptacle}",
    "the {object} to the {receptacle}",
    "put the {object} that is on the table {into} the {receptacle}",
    "pick up {object} and move it to {receptacle}",
];

/// Everything that the training data can be asked.
pub fn instructions() -> Vec<String> {
    let mut all = Vec::new();
    for wording in WORDINGS {
        for object in &OBJECTS {
            for receptacle in &RECEPTACLES {
                all.extend(receptacle.into.map(|into| fill(wording, object, receptacle, into)));
            }
        }
    }
    all
}

fn fill(wording: &str, object: &Object, receptacle: &Receptacle, into: &str) -> String {
    let wording = wording.replace("{object}", object.name).replace("{into}", into);
    wording.replace("{receptacle}", receptacle.name)
}

/// What things keep between them, so that fingers fit: meters from outline to outline.
const GAP: f64 = 0.055;

impl Scene {
    /// The scene of a suite and a seed.
    pub fn new(suite: Suite, seed: u64) -> Self {
        let mut rng = SceneRng::new(seed);
        loop {
            if let Some(scene) = Self::draw(suite, &mut rng) {
                return scene;
            }
        }
    }

    /// `None` if there was no room for something.
    fn draw(suite: Suite, rng: &mut SceneRng) -> Option<Self> {
        let receptacle = rng.pick(&RECEPTACLES);
        let n_object = if suite == Suite::Language { 2 } else { 1 + rng.below(2) };
        let n_distractor = if suite == Suite::Visual { 1 } else { 0 };
        let (reach, turn) = if suite == Suite::Motion { (0.14, 0.5) } else { (0.12, 0.3) };
        let place = |rng: &mut SceneRng| [rng.within(-reach, reach), rng.within(-reach, reach)];
        let receptacle_at = place(rng).map(|x| x.clamp(-0.12, 0.12));
        let mut items: Vec<Item> = Vec::new();
        for i in 0..n_object + n_distractor {
            let kinds = if i < n_object { &OBJECTS[..] } else { &DISTRACTORS[..] };
            let object = rng.pick(kinds);
            let size = match suite {
                Suite::Physical if rng.chance(0.5) => rng.within(0.75, 0.85),
                Suite::Physical => rng.within(1.15, 1.25),
                _ => rng.within(0.95, 1.05),
            };
            let mut item = Item { object, size, at: place(rng), z: 0.0, yaw: 0.0 };
            item.yaw = rng.within(-turn, turn);
            let rod = Rod { radius: item.rod().radius + GAP, ..item.rod() };
            let near = items.iter().any(|other| rod.overlaps(&other.rod()));
            let same = items.iter().any(|other| other.object == object);
            if near || same || rod.overlaps(&Rod::disk(receptacle_at, receptacle.outer)) {
                return None;
            }
            items.push(item);
        }
        let target = rng.below(n_object);
        let wordings = if suite == Suite::Semantic { &UNSEEN_WORDINGS[..] } else { &WORDINGS[..] };
        let (wording, into) = (rng.pick(wordings), rng.pick(&receptacle.into));
        let instruction = fill(wording, items[target].object, receptacle, into);
        let start = [rng.within(-0.1, 0.1), rng.within(-0.1, 0.1), rng.within(0.09, 0.12), 0.0];
        let clear = items.iter().all(|item| length(sub(item.at, [start[0], start[1]])) > 0.03);
        let look = Look::draw(suite, rng);
        clear.then_some(Self { items, receptacle, receptacle_at, target, instruction, look, start })
    }
}

/// Woods and cloths that tables of the training data are of.
const TABLES: [[u8; 3]; 1] = [[190, 170, 140]];
const UNSEEN_TABLES: [[u8; 3]; 3] = [[120, 150, 165], [205, 190, 200], [110, 100, 90]];

impl Look {
    fn draw(suite: Suite, rng: &mut SceneRng) -> Self {
        let unseen = suite == Suite::Visual;
        let base = *rng.pick(if unseen { &UNSEEN_TABLES } else { &TABLES });
        let table = base.map(|level| (f64::from(level) + rng.within(-5.0, 5.0)) as u8);
        let brightness = if unseen { rng.within(0.75, 0.9) } else { rng.within(0.97, 1.03) };
        let light = [rng.within(0.55, 0.65), rng.within(0.0, 0.05)];
        Self { table, brightness, light }
    }
}
