//! The three networks on the devices that they were placed on, and the tensors that lead from one to the next.
//!
//! ```text
//! planes [size, size, 6] ─vision→ features [2176, 256] ─projector→ soft [4096, 256] ─Llama→ logits
//! ```
//!
//! Each stage is a graph that is built once. [`crate::OpenVla`] runs them in order; tests and
//! benches run them one by one.

use std::collections::BTreeMap;
use std::sync::Arc;

use openvla_kernels::{
    Backend, DType, Gguf, Graph, Observer, Squares, State, Usage, Weights, shape,
};

use crate::Result;
use crate::config::Config;
use crate::llama::{Llama, TABLES};
use crate::projector::Projector;
use crate::vision::Vision;

/// Vision towers, projector and Llama, ready to run.
pub struct Network {
    backend: Arc<Backend>,
    planes: State,
    features: State,
    soft: State,
    vision: Graph,
    projector: Graph,
    llama: Llama,
    observer: Observer,
}

impl Network {
    /// Takes every tensor of the file, each on the device of `backend` that `place` has for it, and
    /// builds the stages that do not depend on the prompt. If it is to `observe`, it notes what each
    /// matrix is multiplied by, see [`Network::squares`], and needs memory for all activations of a
    /// stage together: about a gigabyte for openvla-7b.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] names a tensor that is missing, left over or of another shape, or
    /// what the device lacks.
    pub fn load(
        file: &Gguf,
        config: &Config,
        backend: &Arc<Backend>,
        place: &dyn Fn(&str) -> usize,
        observe: bool,
    ) -> Result<Self> {
        let mut weights = Weights::placed(file, backend, &TABLES, place)?;
        let observer = if observe { weights.observe() } else { Observer::default() };
        let vision = Vision::load(&mut weights, config)?;
        let projector = Projector::load(&mut weights, config)?;
        let llama = Llama::load(&mut weights, config, backend)?;
        weights.finish()?;
        let size = config.preprocess.size as usize;
        let state = |dims: &[usize]| State::zeros(backend, DType::F32, shape(dims));
        let planes = state(&[size, size, 3 * config.towers.len()])?;
        let features = state(&[config.projector[0], config.n_patch()])?;
        let soft = state(&[config.llama.dim, config.n_patch()])?;
        let vision = Graph::build(backend, vision.max_nodes(), |g| {
            g.store(vision.build(g, g.state(&planes)), &features);
        })?;
        let projector = Graph::build(backend, projector.max_nodes(), |g| {
            g.store(projector.build(g, g.state(&features)), &soft);
        })?;
        let backend = backend.clone();
        Ok(Self { backend, planes, features, soft, vision, projector, llama, observer })
    }

    /// Vision: normalised planes `[size, size, 3 · n_tower]` to patch features.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    pub fn see(&mut self, planes: &[f32]) -> Result<()> {
        self.planes.write(planes);
        Ok(self.vision.compute()?)
    }

    /// Projector: patch features to soft tokens.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    pub fn project(&mut self) -> Result<()> {
        Ok(self.projector.compute()?)
    }

    /// Puts soft tokens `[dim, n_patch]` where the projector leaves its own.
    ///
    /// # Panics
    /// If there are more or fewer numbers.
    pub fn set_soft_tokens(&mut self, soft: &[f32]) {
        let n = self.soft.shape().iter().product::<usize>();
        assert_eq!(soft.len(), n, "soft tokens of {:?}", self.soft.shape());
        self.soft.write(soft);
    }

    /// Llama: soft tokens and prompt ids to the logits of the motion's first token, `[n_vocab]`.
    ///
    /// # Errors
    /// [`crate::Error::InstructionTooLong`], or [`crate::Error::Kernels`] if the device has no room
    /// or fails.
    ///
    /// # Panics
    /// If there are fewer than two ids, or one is no row of the embedding.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        Ok(self.prefill_drafted(ids, &[])?.remove(0))
    }

    /// The same with `drafts` after the prompt: guesses of the first tokens. Gives the logits of the
    /// first token and of the one after each draft, `[n_vocab]` each.
    ///
    /// # Errors
    /// As [`Network::prefill`].
    ///
    /// # Panics
    /// As [`Network::prefill`], or if there are as many drafts as the longest motion has tokens.
    pub fn prefill_drafted(&mut self, ids: &[u32], drafts: &[u32]) -> Result<Vec<Vec<f32>>> {
        self.llama.prefill(ids, &self.soft, drafts)
    }

    /// Llama: one more token to the logits of the next, `[n_vocab]`.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    ///
    /// # Panics
    /// Without a prefill before, after more tokens than the longest motion has, or if the token is
    /// no row of the embedding.
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>> {
        Ok(self.step_drafted(&[token])?.remove(0))
    }

    /// The same with drafts after the token. Gives the logits after each, `[n_vocab]` each.
    ///
    /// # Errors
    /// As [`Network::step`].
    ///
    /// # Panics
    /// As [`Network::step`], or without any token.
    pub fn step_drafted(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        self.llama.step(tokens)
    }

    /// Takes the last `n` tokens back: drafts that were wrong.
    ///
    /// # Panics
    /// If there are fewer after the prompt.
    pub fn forget(&mut self, n: usize) {
        self.llama.forget(n);
    }

    /// What each matrix was multiplied by so far, if the network was loaded to observe it.
    pub fn squares(&self) -> BTreeMap<String, Squares> {
        self.observer.squares()
    }

    /// What is allocated on each device now: the GPUs, then the CPU.
    pub fn usage(&self) -> Vec<Usage> {
        self.backend.usage()
    }

    /// What vision left for the projector: `[Σ dim, n_patch]`.
    pub fn features(&self) -> Vec<f32> {
        self.features.read()
    }

    /// What the projector left for the Llama: `[dim, n_patch]`.
    pub fn soft_tokens(&self) -> Vec<f32> {
        self.soft.read()
    }
}
