//! The three networks on one device, and the tensors that lead from one to the next.
//!
//! ```text
//! planes [size, size, 6] ─vision→ features [2176, 256] ─projector→ soft [4096, 256] ─Llama→ logits
//! ```
//!
//! Each stage is a graph that is built once. [`crate::OpenVla`] runs them in order; tests and
//! benches run them one by one.

use std::collections::BTreeMap;
use std::sync::Arc;

use openvla_kernels::{Backend, DType, Gguf, Graph, Observer, Squares, State, Weights, shape};

use crate::Result;
use crate::config::Config;
use crate::llama::{Llama, TABLES};
use crate::projector::Projector;
use crate::vision::Vision;

/// Vision towers, projector and Llama, ready to run.
pub struct Network {
    planes: State,
    features: State,
    soft: State,
    vision: Graph,
    projector: Graph,
    llama: Llama,
    observer: Observer,
}

/// Bytes on the device beside the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// Keys and values. None before the first prefill, as for `prefill` and `step`.
    pub cache: usize,
    /// Between the operations of the vision towers.
    pub vision: usize,
    /// Between those of the projector.
    pub projector: usize,
    /// Between those of the Llama over a prompt.
    pub prefill: usize,
    /// Between those of the Llama over one token.
    pub step: usize,
}

impl Network {
    /// Takes every tensor of the file, and builds the stages that do not depend on the prompt.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] names a tensor that is missing, left over or of another shape, or
    /// what the device lacks.
    pub fn load(file: &Gguf, config: &Config, backend: &Arc<Backend>) -> Result<Self> {
        Self::new(Weights::repacked(file, backend, &TABLES)?, config, backend)
    }

    /// The same, which also sees what each matrix is multiplied by: [`Network::squares`]. It needs
    /// memory for all activations of a stage together, about a gigabyte for openvla-7b.
    ///
    /// # Errors
    /// As [`Network::load`].
    pub fn observed(file: &Gguf, config: &Config, backend: &Arc<Backend>) -> Result<Self> {
        let mut weights = Weights::repacked(file, backend, &TABLES)?;
        let observer = weights.observe();
        Ok(Self { observer, ..Self::new(weights, config, backend)? })
    }

    fn new(mut weights: Weights, config: &Config, backend: &Arc<Backend>) -> Result<Self> {
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
        let observer = Observer::default();
        Ok(Self { planes, features, soft, vision, projector, llama, observer })
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
        self.llama.prefill(ids, &self.soft)
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
        self.llama.step(token)
    }

    /// What the stages take on the device beside the weights.
    pub fn memory(&self) -> Memory {
        let [cache, prefill, step] = self.llama.memory();
        let (vision, projector) = (self.vision.bytes(), self.projector.bytes());
        Memory { cache, vision, projector, prefill, step }
    }

    /// What each matrix was multiplied by so far, if the network is [`Network::observed`].
    pub fn squares(&self) -> BTreeMap<String, Squares> {
        self.observer.squares()
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
