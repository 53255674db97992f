//! A small table on which an OpenVLA acts: see an eggplant go into a pot, and count how often.
//!
//! | file | what it is |
//! |---|---|
//! | `geometry` | vectors, rods, hulls |
//! | `scene` | what lies where, how it looks, what is asked: drawn from a seed |
//! | `world` | the gripper, and what happens when it moves and closes |
//! | `camera` | where the two cameras are, and where they see a point |
//! | `render` | what they see |
//! | `expert` | what to do next, if one knows where everything is |
//! | `steps` | the expert's steps, with noise in what is done and none in what is recorded |
//! | `record` | those as a data set in a folder |
//! | `gym` | worlds for a policy in another program |
//! | `episode` | a policy in a world, which waits for it or not |
//! | `model` | the policies of model files |
//! | `remote` | the policy of a server |
//! | `eval` | many episodes, and how sure their success rate is |
//! | `film` | one episode as a GIF |
//!
//! Nothing here depends on the machine but the model's own arithmetic: the same seed gives the same
//! scenes, pictures and steps everywhere. Meters and radians throughout; `train/` holds the program
//! that trains a miniature OpenVLA on this table.

mod camera;
mod episode;
mod eval;
mod expert;
mod film;
mod geometry;
mod gym;
mod model;
mod record;
#[cfg(feature = "remote")]
mod remote;
mod render;
mod scene;
mod steps;
mod world;

pub use episode::{Difference, Expert, Outcome, Pace, Policy, STEPS, run};
pub use eval::{Plan, Report, evaluate, progress, wilson};
pub use expert::{act as expert, plan};
pub use film::film;
pub use geometry::{Point, Rod};
pub use gym::gym;
pub use model::{OftModel, OpenVlaModel};
pub use record::{DataSet, NAME, quantile, record, statistics};
#[cfg(feature = "remote")]
pub use remote::Remote;
pub use render::{picture, wrist_picture};
pub use scene::{
    DISTRACTORS, Item, Look, OBJECTS, Object, RECEPTACLES, Receptacle, Scene, SceneRng, Suite,
    instructions,
};
pub use steps::{CHUNK, Learner, Step, Steps};
pub use world::{
    Action, ArmState, CEILING, FINGER, Gripper, Held, LIMITS, OPEN, REACH, TABLE, TICKS, World,
};
