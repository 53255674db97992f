//! Policies of model files: what they see of a world, and what they say to it.

use anyhow::{Result, ensure};
use openvla::image::RgbImage;
use openvla::oft::{Observation, OpenVlaOft};
use openvla::{OpenVla, Session, Totals};

use crate::episode::Policy;
use crate::render::{picture, wrist_picture};
use crate::world::{Action, ArmState, World};

/// An OpenVLA: sees what the front camera sees, in the size that the model wants, and reads the
/// instruction.
pub struct OpenVlaModel {
    vla: OpenVla,
    unnorm_key: Option<String>,
    session: Session,
    drafted: Totals,
}

impl OpenVlaModel {
    /// `unnorm_key` names the model's data set whose units are meters and radians per step; it may
    /// be left out where there is one.
    ///
    /// # Errors
    /// If the model's motions are not of seven numbers, or the data set is unknown.
    pub fn new(vla: OpenVla, unnorm_key: Option<String>) -> Result<Self> {
        let (name, dataset) = vla.config().statistics.select(unnorm_key.as_deref())?;
        check_actions(name, dataset.action.n())?;
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

impl Policy for OpenVlaModel {
    fn act(&mut self, world: &World) -> Result<Vec<Action>> {
        let action = self.answer(&self.render_view(world), &world.scene.instruction)?;
        self.drafted = action.draft.session;
        Ok(vec![std::array::from_fn(|i| action.action[i])])
    }

    fn begin(&mut self) {
        (self.session, self.drafted) = Default::default();
    }

    fn drafted(&self) -> Totals {
        self.drafted.clone()
    }
}

/// An OpenVLA-OFT: sees what both cameras see and how the gripper stands, and plans ahead.
pub struct OftModel {
    vla: OpenVlaOft,
    unnorm_key: Option<String>,
    /// Actions of a chunk that are made before it sees again.
    executed: usize,
}

impl OftModel {
    /// `unnorm_key` as for [`OpenVlaModel::new`]; all actions of a chunk are made where `executed` is left out.
    ///
    /// # Errors
    /// If the model's actions are not of seven numbers, it wants another state or more cameras than
    /// there are, its chunks are shorter than `executed`, or the data set is unknown.
    pub fn new(
        vla: OpenVlaOft,
        unnorm_key: Option<String>,
        executed: Option<usize>,
    ) -> Result<Self> {
        let (name, dataset) = vla.config().statistics.select(unnorm_key.as_deref())?;
        check_actions(name, dataset.action.n())?;
        let oft = vla.oft();
        check_arm(oft.n_state, &oft.cameras)?;
        let executed = executed_of(oft.chunk, executed)?;
        Ok(Self { vla, unnorm_key, executed })
    }
}

impl Policy for OftModel {
    fn act(&mut self, world: &World) -> Result<Vec<Action>> {
        let size = self.vla.config().preprocess.size;
        let pictures = [picture(world, size), wrist_picture(world, size)];
        let images: Vec<&RgbImage> = pictures.iter().take(self.vla.oft().cameras.len()).collect();
        let state = world.gripper.state();
        let observation = Observation { images: &images, state: Some(&state) };
        let key = self.unnorm_key.as_deref();
        let chunk = self.vla.act(&observation, &world.scene.instruction, key)?;
        let actions = chunk.actions.iter().take(self.executed);
        Ok(actions.map(|action| std::array::from_fn(|i| action[i])).collect())
    }

    fn sees_wrist(&self) -> bool {
        self.vla.oft().cameras.len() > 1
    }
}

/// Checks that a model reads what there is to see and to know of this arm.
pub(crate) fn check_arm(n_state: usize, cameras: &[String]) -> Result<()> {
    let n = ArmState::default().len();
    ensure!(
        [0, n].contains(&n_state),
        "the model reads a state of {n_state} numbers; this gripper's has {n}"
    );
    ensure!(
        cameras.len() <= 2,
        "the model sees {} cameras ({}); here are a front and a wrist camera",
        cameras.len(),
        cameras.join(", ")
    );
    Ok(())
}

/// Actions of a `chunk` that are made before the model sees again: all where `executed` is left out.
pub(crate) fn executed_of(chunk: usize, executed: Option<usize>) -> Result<usize> {
    let n = executed.unwrap_or(chunk);
    ensure!(
        (1..=chunk).contains(&n),
        "{n} of the {chunk} actions of a chunk cannot be executed; say --execute 1 to {chunk}"
    );
    Ok(n)
}

fn check_actions(name: &str, n: usize) -> Result<()> {
    ensure!(n == 7, "motions of `{name}` have {n} numbers; seven move this gripper");
    Ok(())
}
