//! The interface of a model to the worker; tests implement it without a model.

use openvla::prompt::Prompt;
use openvla::{OpenVla, Preprocess, Session, Statistics, Usage};

use crate::observation::{Motion, Observation};

/// A policy that runs one control step after another.
pub trait Policy {
    /// The model's description.
    fn info(&self) -> ModelInfo;

    /// Runs one step of a session, in the units of the named data set.
    ///
    /// # Errors
    /// As [`OpenVla::act_in`].
    fn act(
        &mut self,
        session: &mut Session,
        observation: &Observation,
        unnorm_key: Option<&str>,
    ) -> openvla::Result<Motion>;
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
    /// The prompt template. Without it, instructions are not checked.
    pub prompt: Option<Prompt>,
    /// The data sets it was trained on.
    pub statistics: Statistics,
    /// The memory used on each device, in bytes.
    pub memory: Vec<(String, usize)>,
}

impl Policy for OpenVla {
    fn info(&self) -> ModelInfo {
        let config = self.config();
        let bytes = |usage: &Usage| usage.weights + usage.states + usage.graphs;
        ModelInfo {
            name: config.general.name.clone(),
            image_size: config.preprocess.size,
            preprocess: Some(config.preprocess.clone()),
            prompt: Some(config.prompt.clone()),
            statistics: config.statistics.clone(),
            memory: self.usage().iter().map(|usage| (usage.device.clone(), bytes(usage))).collect(),
        }
    }

    fn act(
        &mut self,
        session: &mut Session,
        observation: &Observation,
        unnorm_key: Option<&str>,
    ) -> openvla::Result<Motion> {
        let Observation { image, instruction, .. } = observation;
        self.act_in(session, image, instruction, unnorm_key).map(Motion::from)
    }
}
