//! What makes motions of observations: a model, or what stands in for one in tests.

use openvla::prompt::Prompt;
use openvla::{OpenVla, Preprocess, Session, Statistics, Usage};

use crate::observation::{Motion, Observation};

/// One step of a robot after another.
pub trait Policy {
    /// What is known of it before any step.
    fn info(&self) -> ModelInfo;

    /// One step of a session, in units of the data set of this name.
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

/// What a model says about itself.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// For people.
    pub name: String,
    /// Sides of the square that pictures become, in pixels.
    pub image_size: u32,
    /// How pictures become that square. Without it, the policy is given them as they came.
    pub preprocess: Option<Preprocess>,
    /// How instructions are wrapped. Without it, none is doubted.
    pub prompt: Option<Prompt>,
    /// The data sets it was trained on.
    pub statistics: Statistics,
    /// Bytes that it takes on each device.
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
