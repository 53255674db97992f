//! The policy: an image and an instruction to a motion.

use std::path::Path;
use std::time::{Duration, Instant};

use image::RgbImage;
use openvla_kernels::{Gguf, Usage};
use serde::Serialize;

use crate::batch::Request;
use crate::config::Config;
use crate::explain::{Explanation, last_layers};
use crate::network::Network;
use crate::options::{Decoding, ModelDevices, Options};
use crate::session::{Drafted, Session};
use crate::speculative::{Draft, TokenCost};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// A motion, and where it came from.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Action {
    /// One number per dimension, in the data set's units.
    pub action: Vec<f64>,
    /// The same in -1..1.
    pub normalized: Vec<f64>,
    /// The ids that it was decoded from.
    pub tokens: Vec<u32>,
    /// The logits of the action ids, `[n_bin]`, that each token was chosen by; none for tokens of the prompt, where the
    /// reference stopped at EOS. [`crate::ActionSpace::probabilities`] gives how likely each was.
    #[serde(skip)]
    pub logits: Vec<Vec<f32>>,
    /// The data set whose units it is in.
    pub unnorm_key: String,
    /// What all ids together would have decoded.
    pub unconstrained: Unconstrained,
    /// How many of the tokens were drafted.
    pub draft: Drafted,
    /// Where the time went.
    pub timing_ms: Timing,
}

/// The choice among all ids, at every step of a motion.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Unconstrained {
    /// The best id of each step. Fewer than the motion has if the reference stopped at EOS.
    pub tokens: Vec<u32>,
    /// Whether they all are action ids. If not, the model is unsure what to do, or was asked
    /// something that it was not trained for.
    pub all_actions: bool,
}

/// Milliseconds of one control step, by stage. Where robots are served together, each has its own time in the stages
/// before the tokens, and that of all in the last; the whole is from where the first began.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[non_exhaustive]
pub struct Timing {
    /// Image to planes.
    pub preprocess: f64,
    /// Planes to patch features.
    pub vision: f64,
    /// Patch features to soft tokens.
    pub projector: f64,
    /// Instruction to ids, and the Llama over all of them.
    pub prefill: f64,
    /// The tokens after the first.
    pub decode: f64,
    /// Everything.
    pub total: f64,
}

/// An OpenVLA model, ready to act.
pub struct OpenVla {
    pub(crate) config: Config,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) network: Network,
    pub(crate) decoding: Decoding,
    pub(crate) draft: Draft,
    pub(crate) token_cost: TokenCost,
}

impl OpenVla {
    /// Opens a model file that `openvla-convert` wrote.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if it is not a sound GGUF file, [`crate::Error::Model`] if it is
    /// another model's.
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        let file = Gguf::open(path.as_ref())?;
        Self::load(&file, options.config(&file)?, options)
    }

    /// Opens a model file that is part of the program; `name` is shown as its path in messages.
    ///
    /// # Errors
    /// As [`OpenVla::open`].
    pub fn built_in(name: &str, bytes: &'static [u8], options: &Options) -> Result<Self> {
        let file = Gguf::built_in(name, bytes)?;
        Self::load(&file, options.config(&file)?, options)
    }

    pub(crate) fn load(file: &Gguf, config: Config, options: &Options) -> Result<Self> {
        if config.oft.is_some() {
            return Err(Error::OtherPolicy { found: "an OpenVLA-OFT", wanted: "OpenVLA" });
        }
        let tokenizer = Tokenizer::new(&config.vocabulary)?;
        let devices = ModelDevices::new(file, &config, options)?;
        let device = |name: &str| devices.device(name);
        let network = Network::load(file, &config, &devices.backend, &device, options.observe)?;
        let token_cost = if devices.has_gpus {
            TokenCost::GPU
        } else if devices.backend.has_own_kernels() {
            TokenCost::OWN
        } else {
            TokenCost::GGML
        };
        let (decoding, draft) = (options.decoding, options.draft);
        Ok(Self { config, tokenizer, network, decoding, draft, token_cost })
    }

    /// One control step: what the camera sees and what was asked for, to one motion. It depends on
    /// no step before it.
    ///
    /// `unnorm_key` names the data set whose units the motion is in; it may be left out where there
    /// is one.
    ///
    /// # Errors
    /// [`crate::Error::UnknownStatistics`] and [`crate::Error::AmbiguousStatistics`] before anything
    /// is computed; [`crate::Error::Image`], [`crate::Error::InstructionTooLong`],
    /// [`crate::Error::NotFinite`].
    pub fn act(
        &mut self,
        image: &RgbImage,
        instruction: &str,
        unnorm_key: Option<&str>,
    ) -> Result<Action> {
        self.act_in(&mut Session::default(), image, instruction, unnorm_key)
    }

    /// One step of a session: what [`OpenVla::act`] does, in fewer passes of the Llama if
    /// [`Options::draft`] lets it draft from the steps before. Each token is the best one after those
    /// before it; where a pass of many rows rounds differently from a pass of one, near-ties may be
    /// resolved differently than in `act`.
    ///
    /// # Errors
    /// As [`OpenVla::act`]; the session is then as before, or begins anew.
    pub fn act_in(
        &mut self,
        session: &mut Session,
        image: &RgbImage,
        instruction: &str,
        unnorm_key: Option<&str>,
    ) -> Result<Action> {
        let mut given = None;
        let request = Request { session, image, instruction, unnorm_key };
        self.act_each(&mut [request], |_, result| given = Some(result));
        given.expect("each request gets a result")
    }

    /// One control step, and what it looked at: [`OpenVla::act`], and a pass more for the attention.
    ///
    /// # Errors
    /// As [`OpenVla::act`].
    pub fn explain(
        &mut self,
        image: &RgbImage,
        instruction: &str,
        unnorm_key: Option<&str>,
    ) -> Result<Explanation> {
        let action = self.act(image, instruction, unnorm_key)?;
        let shown = self.config.preprocess.shown(image)?;
        let ids = self.config.prompt.ids(&self.tokenizer, instruction)?;
        let decoded = &action.tokens[action.tokens.len() - action.logits.len()..];
        let before = &decoded[..decoded.len() - 1];
        let n_layer = last_layers(self.config.llama.n_layer);
        let rows = self.network.attention(&ids, before, n_layer)?;
        let patches = |row: Vec<f64>| row[1..=self.config.n_patch()].to_vec(); // after BOS
        Ok(Explanation { action, shown, attention: rows.into_iter().map(patches).collect() })
    }

    /// What the model file says about itself.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the model takes on each device: the GPUs, then the CPU.
    pub fn usage(&self) -> Vec<Usage> {
        self.network.usage()
    }

    /// The prompt's ids for an instruction.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if the tokenizer refuses the text.
    pub fn prompt_ids(&self, instruction: &str) -> Result<Vec<u32>> {
        self.config.prompt.ids(&self.tokenizer, instruction)
    }

    /// The networks, to run stage by stage.
    pub fn network(&mut self) -> &mut Network {
        &mut self.network
    }
}

/// Takes the time of one stage after another.
pub(crate) struct Clock(pub Instant);

impl Clock {
    /// Milliseconds since the last call.
    pub fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let lap = now - self.0;
        self.0 = now;
        milliseconds(lap)
    }
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_may_move_between_threads() {
        fn send<T: Send>() {}
        send::<OpenVla>();
    }
}
