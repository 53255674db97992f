//! The policy: an image and an instruction to a motion. The only place where stages meet.

use std::path::Path;
use std::time::{Duration, Instant};

use image::RgbImage;
use openvla_kernels::{Backend, Gguf, Kernels, Usage};
use serde::Serialize;

use crate::Result;
use crate::action::argmax;
use crate::cli::Threads;
use crate::config::Config;
use crate::llama::Llama;
use crate::network::Network;
use crate::placement::{Devices, Needs, Placement};
use crate::session::{Drafted, Session};
use crate::tokenizer::Tokenizer;

/// How a model is opened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// The devices to run on.
    pub devices: Devices,
    /// How many of the Llama's layers lie on GPUs, if there are any. The default is all.
    pub n_gpu_layers: Option<usize>,
    /// CPU threads. The default is one for each core.
    pub n_threads: usize,
    /// What a token may be.
    pub decoding: Decoding,
    /// Whether tokens are guessed ahead in a session.
    pub draft: Draft,
    /// Whose functions a CPU computes with.
    pub kernels: Kernels,
    /// Whether the networks note what their weights are multiplied by: see [`Network::load`].
    pub observe: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            devices: Devices::default(),
            n_gpu_layers: None,
            n_threads: Threads::default().count(),
            decoding: Decoding::default(),
            draft: Draft::default(),
            kernels: Kernels::default(),
            observe: false,
        }
    }
}

/// Whether tokens are guessed ahead, for the Llama to check several in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Draft {
    /// One pass for each token.
    #[default]
    Off,
    /// The tokens of the session's motion before, as long as that pays.
    Auto,
}

/// What a row more costs in a pass of few rows, in passes of one: see `benches/SPEED.md`.
const ROW_COST_CPU: f64 = 0.6;

/// The same with kernels of our own.
const ROW_COST_OWN: f64 = 0.1;

/// The same on a GPU, where eight rows should cost a tenth more than one. Not yet measured.
const ROW_COST_GPU: f64 = 0.015;

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
    /// How many of the tokens were guessed.
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
    draft: Draft,
    row_cost: f64,
}

impl OpenVla {
    /// Opens a model file that `openvla-convert` wrote.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if it is not a sound GGUF file, [`crate::Error::Model`] if it is
    /// another model's.
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
        let gpus = options.devices.gpus()?;
        let needs = Needs::new(file, &config);
        let free: Vec<_> = gpus.iter().map(|gpu| (gpu.name.clone(), gpu.memory().0)).collect();
        let placement = Placement::new(&needs, &free, options.n_gpu_layers)?;
        let backend = Backend::open(&gpus, options.n_threads, options.kernels)?;
        let place = |name: &str| placement.device(name);
        let network = Network::load(file, &config, &backend, &place, options.observe)?;
        let row_cost = match gpus.is_empty() {
            true if backend.has_own_kernels() => ROW_COST_OWN,
            true => ROW_COST_CPU,
            false => ROW_COST_GPU,
        };
        let (decoding, draft) = (options.decoding, options.draft);
        Ok(Self { config, tokenizer, network, decoding, draft, row_cost })
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
    /// [`Options::draft`] lets it guess from the steps before. Each token is the best one after those
    /// before it, in the numbers of the pass that it comes of. Where ggml rounds many rows otherwise
    /// than one, near-ties may fall otherwise than in `act`.
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
        let start = Instant::now();
        let (key, dataset) = self.config.statistics.select(unnorm_key)?;
        let (key, dataset) = (key.to_owned(), dataset.clone());
        session.begin(instruction, &key);
        let mut clock = Clock(start);

        let planes = self.config.preprocess.planes(image)?; // [224, 224, 6]
        let preprocess = clock.lap();
        self.network.see(&planes)?; // [2176, 256]
        let vision = clock.lap();
        self.network.project()?; // [4096, 256]
        let projector = clock.lap();
        let ids = self.config.prompt.ids(&self.tokenizer, instruction)?; // BOS … 29871
        let n = dataset.q01.len();
        let guess = self.guess(session, n);
        let room = Llama::room(self.config.n_patch() + ids.len());
        let first = self.network.prefill_drafted(&ids, ahead(&guess, 0, room))?; // [32064] each
        let prefill = clock.lap();
        let chosen = self.decode(&guess, first, n)?; // one token per dimension
        let decode = clock.lap();

        let total = milliseconds(start.elapsed());
        let timing = Timing { preprocess, vision, projector, prefill, decode, total };
        let draft = session.end(chosen.tokens.clone(), chosen.passes, chosen.accepted);
        // ref: `predict_action` takes the last n ids of prompt and tokens together, whichever they
        // are.
        let all = [ids, chosen.tokens].concat();
        let tokens = all[all.len().saturating_sub(n)..].to_vec();
        let actions = self.config.actions;
        let normalized = actions.normalized(&tokens);
        let all_actions = chosen.unconstrained.iter().all(|id| actions.ids().contains(id));
        Ok(Action {
            action: dataset.unnormalise(&normalized),
            normalized,
            tokens,
            unnorm_key: key,
            unconstrained: Unconstrained { tokens: chosen.unconstrained, all_actions },
            draft,
            timing_ms: timing,
        })
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

    /// What the session guesses of `n` tokens: not the last, after which nothing is computed.
    fn guess(&self, session: &Session, n: usize) -> Vec<u32> {
        let guess = match self.draft {
            Draft::Off => Vec::new(),
            Draft::Auto => session.guess(self.row_cost),
        };
        let n_vocab = self.config.llama.n_vocab;
        guess.into_iter().take(n - 1).take_while(|id| (*id as usize) < n_vocab).collect()
    }

    /// Greedy decoding of `n` tokens, from the logits of the prefill. A pass gives the token after
    /// each of its rows, up to the first that was guessed wrongly; the next pass begins there.
    fn decode(&mut self, guess: &[u32], mut logits: Vec<Vec<f32>>, n: usize) -> Result<Chosen> {
        let mut chosen = Chosen::default();
        loop {
            chosen.passes += 1;
            let n_draft = logits.len() - 1;
            for (i, row) in logits.iter().enumerate() {
                let step = chosen.tokens.len();
                let best = argmax(row, 0..self.config.llama.n_vocab as u32, step)?;
                let token = match self.decoding {
                    Decoding::Reference => best,
                    Decoding::Actions => argmax(row, self.config.actions.ids(), step)?,
                };
                chosen.unconstrained.push(best);
                chosen.tokens.push(token);
                let eos = self.config.vocabulary.eos;
                if step + 1 == n || (self.decoding == Decoding::Reference && token == eos) {
                    return Ok(chosen);
                }
                let right = i < n_draft && guess[step] == token;
                chosen.accepted.push(right);
                if !right {
                    self.network.forget(n_draft - i);
                    break;
                }
            }
            let at = chosen.tokens.len();
            let drafts = ahead(guess, at, Llama::MAX_ROWS - 1);
            logits = self.network.step_drafted(&[&chosen.tokens[at - 1..], drafts].concat())?;
        }
    }
}

/// What is guessed of the tokens from `at` on, at most `room` of them.
fn ahead(guess: &[u32], at: usize, room: usize) -> &[u32] {
    let rest = guess.get(at..).unwrap_or_default();
    &rest[..rest.len().min(room)]
}

#[derive(Default)]
struct Chosen {
    tokens: Vec<u32>,
    unconstrained: Vec<u32>,
    passes: usize,
    /// Whether each token but the last was guessed.
    accepted: Vec<bool>,
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
