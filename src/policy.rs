//! The policy: an image and an instruction to a motion. The only place where stages meet.

use std::path::Path;
use std::time::{Duration, Instant};

use image::RgbImage;
use openvla_kernels::{Backend, Gguf, Products};
use serde::Serialize;

use crate::Result;
use crate::action::{Dataset, argmax};
use crate::config::Config;
use crate::network::Network;
use crate::tokenizer::Tokenizer;

/// How a model is opened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// CPU threads. The default is one for each core.
    pub n_threads: usize,
    /// What a token may be.
    pub decoding: Decoding,
    /// Whose matrix products are used.
    pub products: Products,
    /// Whether the networks note what their weights are multiplied by: see [`Network::observed`].
    pub observe: bool,
}

impl Default for Options {
    fn default() -> Self {
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            n_threads,
            decoding: Decoding::default(),
            products: Products::default(),
            observe: false,
        }
    }
}

/// What the next token is chosen among.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decoding {
    /// The 256 action ids: every token is a motion.
    #[default]
    Actions,
    /// All ids, as the reference does: an id that is no action is clipped into the first or last
    /// bin, and EOS ends the motion early, whose missing tokens are then taken from the prompt.
    Reference,
}

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
    /// The data set whose units it is in.
    pub unnorm_key: String,
    /// What all ids together would have chosen.
    pub unconstrained: Unconstrained,
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

/// Milliseconds of one control step, by stage.
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
    config: Config,
    tokenizer: Tokenizer,
    network: Network,
    decoding: Decoding,
}

impl OpenVla {
    /// Opens a model file that `openvla-convert` wrote.
    ///
    /// # Errors
    /// [`Error::Kernels`] if it is not a sound GGUF file, [`Error::Model`] if it is another model's.
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        Self::load(&Gguf::open(path.as_ref())?, options)
    }

    /// Opens a model file that is part of the program; `name` stands for its path in messages.
    ///
    /// # Errors
    /// As [`OpenVla::open`].
    pub fn built_in(name: &str, bytes: &'static [u8], options: &Options) -> Result<Self> {
        Self::load(&Gguf::built_in(name, bytes)?, options)
    }

    fn load(file: &Gguf, options: &Options) -> Result<Self> {
        let config = Config::read(file)?;
        let tokenizer = Tokenizer::new(&config.vocabulary)?;
        let backend = Backend::cpu_with(options.n_threads, options.products)?;
        let load = if options.observe { Network::observed } else { Network::load };
        let network = load(file, &config, &backend)?;
        Ok(Self { config, tokenizer, network, decoding: options.decoding })
    }

    /// One control step: what the camera sees and what was asked for, to one motion.
    ///
    /// `unnorm_key` names the data set whose units the motion is in; it may be left out where there
    /// is one.
    ///
    /// # Errors
    /// [`Error::UnknownStatistics`] and [`Error::AmbiguousStatistics`] before anything is computed;
    /// [`Error::Image`], [`Error::InstructionTooLong`], [`Error::NotFinite`].
    pub fn act(
        &mut self,
        image: &RgbImage,
        instruction: &str,
        unnorm_key: Option<&str>,
    ) -> Result<Action> {
        let start = Instant::now();
        let (key, dataset) = self.config.statistics.select(unnorm_key)?;
        let (key, dataset) = (key.to_owned(), dataset.clone());
        let mut clock = Clock(start);

        let planes = self.config.preprocess.planes(image)?; // [224, 224, 6]
        let preprocess = clock.lap();
        self.network.see(&planes)?; // [2176, 256]
        let vision = clock.lap();
        self.network.project()?; // [4096, 256]
        let projector = clock.lap();
        let ids = self.config.prompt.ids(&self.tokenizer, instruction)?; // BOS … 29871
        let first = self.network.prefill(&ids)?; // [32064]
        let prefill = clock.lap();
        let chosen = self.decode(&ids, first, dataset.q01.len())?; // one token per dimension
        let decode = clock.lap();

        let total = milliseconds(start.elapsed());
        let timing = Timing { preprocess, vision, projector, prefill, decode, total };
        Ok(self.action(chosen, key, &dataset, timing))
    }

    /// What the model file says about itself.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The prompt's ids for an instruction.
    ///
    /// # Errors
    /// [`Error::Model`] if the tokenizer refuses the text.
    pub fn prompt_ids(&self, instruction: &str) -> Result<Vec<u32>> {
        self.config.prompt.ids(&self.tokenizer, instruction)
    }

    /// The networks, to run stage by stage.
    pub fn network(&mut self) -> &mut Network {
        &mut self.network
    }

    /// Greedy decoding of `n` tokens, from the logits of the first.
    fn decode(&mut self, prompt: &[u32], mut logits: Vec<f32>, n: usize) -> Result<Chosen> {
        let mut chosen = Chosen::default();
        loop {
            let step = chosen.tokens.len();
            let best = argmax(&logits, 0..self.config.llama.n_vocab as u32, step)?;
            let token = match self.decoding {
                Decoding::Reference => best,
                Decoding::Actions => argmax(&logits, self.config.actions.ids(), step)?,
            };
            chosen.unconstrained.push(best);
            chosen.tokens.push(token);
            let ended = self.decoding == Decoding::Reference && token == self.config.vocabulary.eos;
            if chosen.tokens.len() == n || ended {
                break;
            }
            logits = self.network.step(token)?;
        }
        // ref: `predict_action` takes the last n ids of prompt and tokens together, whichever
        // they are.
        let missing = n - chosen.tokens.len();
        let from_prompt = prompt[prompt.len().saturating_sub(missing)..].iter().copied();
        chosen.tokens.splice(..0, from_prompt);
        Ok(chosen)
    }

    fn action(&self, chosen: Chosen, key: String, dataset: &Dataset, timing_ms: Timing) -> Action {
        let actions = self.config.actions;
        let normalized = actions.normalized(&chosen.tokens);
        let all_actions = chosen.unconstrained.iter().all(|id| actions.ids().contains(id));
        Action {
            action: dataset.unnormalise(&normalized),
            normalized,
            tokens: chosen.tokens,
            unnorm_key: key,
            unconstrained: Unconstrained { tokens: chosen.unconstrained, all_actions },
            timing_ms,
        }
    }
}

#[derive(Default)]
struct Chosen {
    tokens: Vec<u32>,
    unconstrained: Vec<u32>,
}

struct Clock(Instant);

impl Clock {
    /// Milliseconds since the last call.
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let lap = now - self.0;
        self.0 = now;
        milliseconds(lap)
    }
}

fn milliseconds(time: Duration) -> f64 {
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
