//! The interface of a model to the worker; tests implement it without a model.

use openvla::image::RgbImage;
use openvla::oft;
use openvla::prompt::Prompt;
use openvla::{
    ActionSpace, Config, OftConfig, OpenVla, Preprocess, Profile, Request, Session, Statistics,
    Usage,
};

use crate::observation::{Motion, Observation};

/// A policy that runs one control step after another.
pub trait Policy {
    /// The model's description.
    fn info(&self) -> ModelInfo;

    /// Runs one step of a session, in the units of the named data set.
    ///
    /// # Errors
    /// As [`openvla::OpenVla::act_in`] and [`oft::OpenVlaOft::act`].
    fn act(
        &mut self,
        session: &mut Session,
        observation: &Observation,
        unnorm_key: Option<&str>,
    ) -> openvla::Result<Motion>;

    /// How many robots are better served together than one after another.
    fn max_batch(&self) -> usize {
        1
    }

    /// Runs one step of several sessions. Calls `answer` with the place and the result of each as soon as it is known.
    fn act_each(
        &mut self,
        turns: &mut [Turn<'_>],
        answer: &mut dyn FnMut(usize, openvla::Result<Motion>),
    ) {
        one_by_one(self, turns, answer);
    }
}

fn one_by_one<P: Policy + ?Sized>(
    policy: &mut P,
    turns: &mut [Turn<'_>],
    answer: &mut dyn FnMut(usize, openvla::Result<Motion>),
) {
    for (at, Turn { session, observation, unnorm_key }) in turns.iter_mut().enumerate() {
        answer(at, policy.act(session, observation, *unnorm_key));
    }
}

/// What [`Policy::act`] takes, of one of several robots.
#[derive(Debug)]
pub struct Turn<'a> {
    /// What is remembered of the robot.
    pub session: &'a mut Session,
    /// What it sees and is asked to do.
    pub observation: &'a Observation,
    /// The data set whose units its motion is in.
    pub unnorm_key: Option<&'a str>,
}

/// The description of a model.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// The name to be shown.
    pub name: String,
    /// Sides of the square that pictures become, in pixels.
    pub image_size: u32,
    /// How images are resized to that square. Without it, the policy gets the original images.
    pub preprocess: Option<Preprocess>,
    /// What is done to pictures before the towers see them, the resizing included.
    pub shown: Preprocess,
    /// The ids that mean motion.
    pub actions: ActionSpace,
    /// What an OpenVLA-OFT model is shown, and how many actions it gives.
    pub oft: Option<OftConfig>,
    /// The prompt template. Without it, instructions are not checked.
    pub prompt: Option<Prompt>,
    /// The data sets it was trained on.
    pub statistics: Statistics,
    /// The memory used on each device, in bytes.
    pub memory: Vec<(String, usize)>,
}

impl ModelInfo {
    /// The description of a model of this configuration.
    fn new(config: &Config, usage: &[Usage]) -> Self {
        let bytes = |usage: &Usage| usage.weights + usage.states + usage.graphs;
        let preprocess = &config.preprocess;
        // Any other preparation starts from the picture as the camera took it.
        let is_square = preprocess.profile == Profile::Raw && !preprocess.center_crop;
        Self {
            name: config.general.name.clone(),
            image_size: preprocess.size,
            preprocess: is_square.then(|| preprocess.clone()),
            shown: preprocess.clone(),
            actions: config.actions,
            oft: config.oft.clone(),
            prompt: Some(config.prompt.clone()),
            statistics: config.statistics.clone(),
            memory: usage.iter().map(|usage| (usage.device.clone(), bytes(usage))).collect(),
        }
    }

    /// Cameras whose pictures the model is shown.
    pub fn n_camera(&self) -> usize {
        self.oft.as_ref().map_or(1, |oft| oft.cameras.len())
    }
}

impl Policy for openvla::Policy {
    fn info(&self) -> ModelInfo {
        ModelInfo::new(self.config(), &self.usage())
    }

    fn act(
        &mut self,
        session: &mut Session,
        observation: &Observation,
        unnorm_key: Option<&str>,
    ) -> openvla::Result<Motion> {
        let Observation { image, wrists, state, instruction, .. } = observation;
        match self {
            Self::OpenVla(policy) => {
                policy.act_in(session, image, instruction, unnorm_key).map(Motion::from)
            }
            Self::Oft(policy) => {
                let images: Vec<&RgbImage> = [image].into_iter().chain(wrists).collect();
                let seen = oft::Observation { images: &images, state: state.as_deref() };
                policy.act(&seen, instruction, unnorm_key).map(Motion::from)
            }
        }
    }

    fn max_batch(&self) -> usize {
        match self {
            Self::OpenVla(policy) if policy.shares_passes() => OpenVla::MAX_BATCH,
            _ => 1,
        }
    }

    fn act_each(
        &mut self,
        turns: &mut [Turn<'_>],
        answer: &mut dyn FnMut(usize, openvla::Result<Motion>),
    ) {
        let Self::OpenVla(policy) = self else { return one_by_one(self, turns, answer) };
        let requests = turns.iter_mut().map(|Turn { session, observation, unnorm_key }| {
            let Observation { image, instruction, .. } = observation;
            Request { session, image, instruction, unnorm_key: *unnorm_key }
        });
        let mut requests: Vec<_> = requests.collect();
        policy.act_each(&mut requests, |at, result| answer(at, result.map(Motion::from)));
    }
}
