//! The interface of a model to the worker; tests implement it without a model.

use anyhow::{Result, ensure};
use openvla::prompt::Prompt;
use openvla::{ActionSpace, Config, OftConfig, Preprocess, Profile, Session, Statistics, Usage};

use crate::observation::{Motion, Observation};

/// A policy that runs one control step after another.
pub trait Policy {
    /// The model's description.
    fn info(&self) -> ModelInfo;

    /// Runs one step of a session, in the units of the named data set.
    ///
    /// # Errors
    /// As [`openvla::OpenVla::act_in`] and [`openvla::oft::OpenVlaOft::act`].
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

/// Serves turns one after another.
pub fn one_by_one<P: Policy + ?Sized>(
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
    /// The file that it was opened from.
    pub file: String,
    /// What tells it from others.
    pub fingerprint: String,
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
    /// Bytes of the machine's own memory that it takes beside weights.
    pub scratch: usize,
}

impl ModelInfo {
    /// The description of a file's model, before it is known what it takes.
    pub fn new(config: &Config, file: String, fingerprint: String) -> Self {
        let preprocess = &config.preprocess;
        // Any other preparation starts from the picture as the camera took it.
        let is_square = preprocess.profile == Profile::Raw && !preprocess.center_crop;
        Self {
            name: config.general.name.clone(),
            file,
            fingerprint,
            image_size: preprocess.size,
            preprocess: is_square.then(|| preprocess.clone()),
            shown: preprocess.clone(),
            actions: config.actions,
            oft: config.oft.clone(),
            prompt: Some(config.prompt.clone()),
            statistics: config.statistics.clone(),
            memory: Vec::new(),
            scratch: 0,
        }
    }

    /// The same, with what it takes on the GPUs, then the CPU.
    pub fn with_memory(self, usage: &[Usage]) -> Self {
        let beside = |usage: &Usage| usage.states + usage.graphs;
        let bytes = |usage: &Usage| (usage.device.clone(), usage.weights + beside(usage));
        let scratch = usage.last().map_or(0, beside);
        Self { memory: usage.iter().map(bytes).collect(), scratch, ..self }
    }

    /// Whether another model may take its place while it serves: what clients send, and what they may rely on, must stay
    /// the same.
    ///
    /// # Errors
    /// Says what differs.
    pub fn check_successor(&self, new: &Self) -> Result<()> {
        let kind = |model: &Self| if model.oft.is_some() { "OpenVLA-OFT" } else { "OpenVLA" };
        let (wanted, found) = (kind(self), kind(new));
        ensure!(found == wanted, "{} is of an {found} model, and an {wanted} is served", new.file);
        let names = |model: &Self| model.statistics.datasets().keys().cloned().collect::<Vec<_>>();
        let (wanted, found) = (names(self).join(", "), names(new).join(", "));
        ensure!(
            found == wanted,
            "{} knows the data sets {found}, and a model of {wanted} is served",
            new.file
        );
        let datasets = self.statistics.datasets().iter().zip(new.statistics.datasets().values());
        for ((name, wanted), found) in datasets {
            let (wanted, found) = (wanted.action.n(), found.action.n());
            ensure!(
                found == wanted,
                "{}: motions of {name} have {found} dimensions, and a model of {wanted} is served",
                new.file
            );
        }
        ensure!(
            self.oft == new.oft,
            "{} has other cameras, another chunk, state or head than the model that is served",
            new.file
        );
        ensure!(
            self.shown == new.shown,
            "{} prepares pictures in another way than the model that is served",
            new.file
        );
        Ok(())
    }

    /// Cameras whose pictures the model is shown.
    pub fn n_camera(&self) -> usize {
        self.oft.as_ref().map_or(1, |oft| oft.cameras.len())
    }
}
