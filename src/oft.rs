//! The OpenVLA-OFT policy: pictures of several cameras, an instruction and the arm's state to a chunk of actions.
//!
//! in   `[3, width, height]` RGB bytes of each camera; `[n_state]` numbers in the data set's units
//! out  `[n_action]` numbers for each of `chunk` time steps
//!
//! Several robots are served one after another: the Llama's one pass has some 600 rows, of which each costs as much as one
//! of 300 on a CPU (`benches/SPEED.md`), so that together they would take as long.
//!
//! ref: openvla-oft `experiments/robot/openvla_utils.py` `get_vla_action`

mod film;
mod head;
mod network;
pub mod streamed;

use std::path::Path;
use std::time::Instant;

use image::RgbImage;
use openvla_kernels::{Gguf, Usage};
use serde::Serialize;

use crate::action::argmax;
use crate::config::{Config, OftConfig, OftHead};
use crate::options::{Decoding, ModelDevices, Options};
use crate::policy::{Clock, milliseconds};
use crate::speculative::Draft;
use crate::statistics::{Scale, WIDTH};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

pub use network::{Hidden, OftNetwork};

/// What a robot sees, and the state of its arm.
#[derive(Debug, Clone, Copy, Default)]
pub struct Observation<'a> {
    /// The third-person camera's picture, then those of the wrist cameras, in the order that the model was trained
    /// with; [`OftConfig::in_order`] puts named ones there. Other pictures in these places give other motions without an
    /// error.
    pub images: &'a [&'a RgbImage],
    /// The arm's state in the data set's units, if the model reads it.
    pub state: Option<&'a [f64]>,
}

/// A chunk of actions, to be executed one after another before the robot looks again.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Chunk {
    /// `[chunk]` actions of `[n_action]` numbers, in the data set's units.
    pub actions: Vec<Vec<f64>>,
    /// The same as the model gave them: about -1..1, and not bounded.
    pub normalized: Vec<Vec<f64>>,
    /// The ids that they were decoded from, if the model gives tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<Vec<u32>>>,
    /// The logits of the action ids, `[n_bin]`, that each token was chosen by, if the model gives tokens.
    #[serde(skip)]
    pub logits: Vec<Vec<f32>>,
    /// The state as the model was given it, in -1..1.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub normalized_state: Vec<f64>,
    /// The data set whose units they are in.
    pub unnorm_key: String,
    /// Where the time went.
    pub timing_ms: ChunkTiming,
}

/// Milliseconds of one chunk, by stage.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[non_exhaustive]
pub struct ChunkTiming {
    /// Images to planes.
    pub preprocess: f64,
    /// Instruction to ids, FiLM's vectors if it is another than before, planes to patch features.
    pub vision: f64,
    /// Patch features to soft tokens.
    pub projector: f64,
    /// State to a row, and the Llama over all rows.
    pub llama: f64,
    /// Hidden rows to actions.
    pub head: f64,
    /// Everything.
    pub total: f64,
}

/// An OpenVLA-OFT model, ready to act.
pub struct OpenVlaOft {
    config: Config,
    tokenizer: Tokenizer,
    network: OftNetwork,
    decoding: Decoding,
}

impl OpenVlaOft {
    /// Opens a model file that `openvla-convert` wrote.
    ///
    /// # Errors
    /// As [`crate::OpenVla::open`]; [`Error::OtherPolicy`] if it is an OpenVLA's, [`Error::NothingToDraft`] if drafts
    /// are asked for.
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        let file = Gguf::open(path.as_ref())?;
        Self::load(&file, options.config(&file)?, options)
    }

    pub(crate) fn load(file: &Gguf, config: Config, options: &Options) -> Result<Self> {
        if config.oft.is_none() {
            return Err(Error::OtherPolicy { found: "an OpenVLA", wanted: "OpenVLA-OFT" });
        }
        if options.draft != Draft::Off {
            return Err(Error::NothingToDraft);
        }
        let tokenizer = Tokenizer::new(&config.vocabulary)?;
        let devices = ModelDevices::new(file, &config, options)?;
        let device = |name: &str| devices.device(name);
        let network = OftNetwork::load(file, &config, &devices.backend, &device, options.observe)?;
        Ok(Self { config, tokenizer, network, decoding: options.decoding })
    }

    /// One control step: pictures, instruction and the state of the arm, to a chunk of actions.
    ///
    /// `unnorm_key` names the data set whose units state and actions are in; it may be left out where there is one.
    ///
    /// # Errors
    /// [`Error::UnknownStatistics`], [`Error::AmbiguousStatistics`], [`Error::Observation`] before anything is
    /// computed; [`Error::Image`], [`Error::InstructionTooLong`], [`Error::NotFiniteAction`].
    pub fn act(
        &mut self,
        observation: &Observation<'_>,
        instruction: &str,
        unnorm_key: Option<&str>,
    ) -> Result<Chunk> {
        let start = Instant::now();
        let (key, dataset) = self.config.statistics.select(unnorm_key)?;
        let (unnorm_key, dataset) = (key.to_owned(), dataset.clone());
        let normalized_state = normalized_state(observation.state, dataset.state.as_ref())?;
        let images = self.images(observation.images)?;
        let mut clock = Clock(start);

        let mut planes = Vec::new(); // [224, 224, 6 · n_camera]
        for image in images {
            planes.extend(self.config.preprocess.planes(image)?);
        }
        let preprocess = clock.lap();
        let ids = self.config.prompt.ids(&self.tokenizer, instruction)?; // BOS … 29871
        let features = self.network.encode(&planes, &ids)?; // [2176, 256 · n_camera]
        let vision = clock.lap();
        let soft = self.network.project(&features)?; // [4096, 256 · n_camera]
        let projector = clock.lap();
        let state: Vec<f32> = normalized_state.iter().map(|x| *x as f32).collect();
        let hidden = self.network.forward(&ids, &soft, &state)?; // [4096, n_action · chunk]
        let llama = clock.lap();
        let output = self.network.actions(&hidden)?;
        let head = clock.lap();

        let Decoded { normalized, tokens, logits } = self.decode(&output)?;
        let (kind, scale) = (self.oft().head, &dataset.action);
        let actions = normalized.iter().map(|action| unnormalize(scale, kind, action)).collect();
        let total = milliseconds(start.elapsed());
        let timing_ms = ChunkTiming { preprocess, vision, projector, llama, head, total };
        Ok(Chunk { actions, normalized, tokens, logits, normalized_state, unnorm_key, timing_ms })
    }

    /// What the model file says about itself.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What it says about chunks and cameras.
    pub fn oft(&self) -> &OftConfig {
        self.config.oft.as_ref().expect("`load` refuses others")
    }

    /// Rows of a pass for a prompt of `n_id` ids: pictures, state, actions and the stop token included.
    pub fn n_row(&self, n_id: usize) -> usize {
        let oft = self.oft();
        let n_patch = self.config.n_patch() * oft.cameras.len();
        n_patch + usize::from(oft.n_state > 0) + n_id + oft.n_slot() + 1
    }

    /// What the model takes on each device: the GPUs, then the CPU.
    pub fn usage(&self) -> Vec<Usage> {
        self.network.usage()
    }

    /// The prompt's ids for an instruction.
    ///
    /// # Errors
    /// [`Error::Model`] if the tokenizer refuses the text.
    pub fn prompt_ids(&self, instruction: &str) -> Result<Vec<u32>> {
        self.config.prompt.ids(&self.tokenizer, instruction)
    }

    /// The networks, to run stage by stage.
    pub fn network(&mut self) -> &mut OftNetwork {
        &mut self.network
    }

    /// The pictures that the model is shown. ref: `get_vla_action`, which leaves out the wrist cameras' where the
    /// model has one camera.
    fn images<'a>(&self, images: &'a [&'a RgbImage]) -> Result<&'a [&'a RgbImage]> {
        let cameras = &self.oft().cameras;
        let wanted = cameras.len();
        if images.len() == wanted || (wanted == 1 && !images.is_empty()) {
            return Ok(&images[..wanted]);
        }
        let why = format!(
            "there are {} pictures; the model has {wanted} cameras: {}",
            images.len(),
            cameras.join(", ")
        );
        Err(Error::Observation { why })
    }

    /// What the head's output stands for.
    fn decode(&self, output: &[f32]) -> Result<Decoded> {
        let (oft, actions) = (self.oft(), self.config.actions);
        if oft.head == OftHead::L1 {
            if let Some(i) = output.iter().position(|x| !x.is_finite()) {
                let (step, dimension) = (i / oft.n_action, i % oft.n_action);
                return Err(Error::NotFiniteAction { step, dimension, value: output[i] });
            }
            let action = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect();
            let normalized = output.chunks(oft.n_action).map(action).collect();
            return Ok(Decoded { normalized, tokens: None, logits: Vec::new() });
        }
        let n_vocab = self.config.llama.n_vocab;
        let ids = match self.decoding {
            Decoding::Actions => actions.ids(),
            Decoding::Reference => 0..n_vocab as u32,
        };
        let rows = output.chunks(n_vocab);
        let token = |(step, logits)| argmax(logits, ids.clone(), step);
        let tokens: Vec<u32> = rows.clone().enumerate().map(token).collect::<Result<_>>()?;
        let tokens: Vec<Vec<u32>> = tokens.chunks(oft.n_action).map(<[u32]>::to_vec).collect();
        Ok(Decoded {
            normalized: tokens.iter().map(|ids| actions.normalized(ids)).collect(),
            tokens: Some(tokens),
            logits: rows.map(|logits| logits[actions.rows()].to_vec()).collect(),
        })
    }
}

/// Actions as the head returns them, and if it chooses tokens, those and the logits of action ids.
struct Decoded {
    normalized: Vec<Vec<f64>>,
    tokens: Option<Vec<Vec<u32>>>,
    logits: Vec<Vec<f32>>,
}

/// An action that a `head` returned, to the data set's units. ref: `_unnormalize_actions`, which computes
/// `0.5 * (x + 1)` in the precision of `x`: what an L1 head returns is f32, centers of bins are f64.
pub fn unnormalize(scale: &Scale, head: OftHead, action: &[f64]) -> Vec<f64> {
    let share = |x: f64| match head {
        OftHead::L1 => f64::from(0.5 * (x as f32 + 1.0)),
        OftHead::Tokens => 0.5 * (x + 1.0),
    };
    let unnormalize = |(x, (low, high, scaled)): (&f64, (f64, f64, bool))| {
        if scaled { share(*x) * (high - low + WIDTH) + low } else { *x }
    };
    action.iter().zip(scale.dimensions()).map(unnormalize).collect()
}

/// The arm's state in -1..1; empty if there is no `scale`, so that nobody reads it. ref: `normalize_proprio`
///
/// # Errors
/// [`Error::Observation`] if the state is missing, has another length or is not finite.
pub fn normalized_state(state: Option<&[f64]>, scale: Option<&Scale>) -> Result<Vec<f64>> {
    let refused = |why: String| Err(Error::Observation { why });
    let (Some(scale), Some(state)) = (scale, state) else {
        return match scale {
            None => Ok(Vec::new()), // as the reference, which does not look at it
            Some(scale) => refused(format!("the arm's state of {} numbers is missing", scale.n())),
        };
    };
    if state.len() != scale.n() {
        return refused(format!("the arm's state has {} numbers, not {}", state.len(), scale.n()));
    }
    if let Some(i) = state.iter().position(|x| !x.is_finite()) {
        return refused(format!("number {i} of the arm's state is {}", state[i]));
    }
    let normalize = |(x, (low, high, scaled)): (&f64, (f64, f64, bool))| {
        let x = if scaled { 2.0 * (x - low) / (high - low + WIDTH) - 1.0 } else { *x };
        x.clamp(-1.0, 1.0)
    };
    Ok(state.iter().zip(scale.dimensions()).map(normalize).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale() -> Scale {
        Scale {
            low: vec![-2.0, 3.0, 0.0],
            high: vec![2.0, 3.0, 1.0],
            mask: vec![true, true, false],
        }
    }

    #[test]
    fn a_state_is_scaled_and_clipped_and_a_width_of_zero_goes_to_an_end() {
        let got = normalized_state(Some(&[1.0, 3.5, 0.25]), Some(&scale())).unwrap();
        assert!((got[0] - 0.5).abs() < 1e-8, "{got:?}");
        assert_eq!(got[1..], [1.0, 0.25]);
        let low = normalized_state(Some(&[-9.0, 3.0, 7.0]), Some(&scale())).unwrap();
        assert_eq!(low, [-1.0, -1.0, 1.0]);
    }

    #[test]
    fn a_state_that_cannot_be_used_is_named() {
        let error = |state: Option<&[f64]>| {
            normalized_state(state, Some(&scale())).unwrap_err().to_string()
        };
        assert!(error(None).contains("state of 3 numbers is missing"));
        assert!(error(Some(&[1.0])).contains("has 1 numbers, not 3"));
        assert!(error(Some(&[1.0, f64::NAN, 0.0])).contains("number 1 of the arm's state is NaN"));
        assert_eq!(normalized_state(Some(&[1.0]), None).unwrap(), [0.0; 0], "nobody reads it");
    }

    /// 0.5 · (x + 1) is rounded to f32 where the head gave an f32.
    #[test]
    fn actions_are_unnormalized_in_the_references_precision() {
        let x = 0.123_456_79_f32;
        let got = unnormalize(&scale(), OftHead::L1, &[f64::from(x); 3]);
        let share = f64::from(0.5_f32 * (x + 1.0));
        assert_eq!(got[0], share * (4.0 + 1e-8) - 2.0);
        assert_eq!(got[1], share * 1e-8 + 3.0);
        assert_eq!(got[2], f64::from(x), "a gripper stays as the head gave it");
        let got = unnormalize(&scale(), OftHead::Tokens, &[0.1; 3]);
        assert_eq!(got[0], 0.5 * 1.1 * (4.0 + 1e-8) - 2.0);
    }
}
