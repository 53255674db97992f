//! The networks of an OpenVLA-OFT: each camera's picture through towers and projector, then one pass of the Llama
//! over all rows, each of which looks at every other.
//!
//! ```text
//! planes [size, size, 6 · n_camera] ─vision→ features [2176, 256 · n_camera] ─projector→ soft [4096, 256 · n_camera]
//! BOS | soft | state | prompt | n_action · chunk rows of zeros | stop ─Llama→ hidden [4096, n_action · chunk] ─head→ actions
//! ```
//!
//! Nothing of a pass can be kept for the next one, since every key depends on every row.
//!
//! ref: openvla-oft `OpenVLAForActionPrediction.predict_action`

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use openvla_kernels::{
    Backend, Builder, DType, Gguf, Graph, Observer, Squares, State, Tensor, Usage, Weight, Weights,
    shape,
};

use super::film::Film;
use super::head::Head;
use crate::Result;
use crate::config::{Config, LlamaConfig, OftConfig};
use crate::encoder::{Encoder, Features, SoftTokens};
use crate::layers::{Linear, RmsNorm};
use crate::llama::{Layer, TABLES, device_ids};
use crate::projector::Projector;
use crate::vision::Vision;

/// Towers, projector, Llama and head of an OpenVLA-OFT, ready to run.
pub struct OftNetwork {
    backend: Arc<Backend>,
    encoder: Encoder,
    film: Option<Film>,
    /// What the FiLM vectors were computed for.
    film_ids: Vec<i32>,
    model: Model,
    pass: Option<Pass>,
    head: HeadPass,
    observer: Observer,
}

/// Hidden rows, on the device until the next pass: the Llama ran.
#[derive(Debug)]
#[must_use]
pub struct Hidden(());

/// The Llama, and what it reads besides soft tokens.
struct Model {
    config: LlamaConfig,
    embedding: Weight,
    state: Option<StateProjector>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    n_slot: usize,
    stop: i32,
    /// `[n_state]`, if the model reads a state.
    input: Option<State>,
    /// Placeholders for the actions: `[dim, n_slot]` of zeros.
    slots: State,
}

/// The arm's state to one row. ref: openvla-oft `ProprioProjector`
pub(super) struct StateProjector {
    fc1: Linear,
    fc2: Linear,
}

/// The graph for one prompt length.
struct Pass {
    graph: Graph,
    /// The prompt's, then the stop token.
    ids: State,
}

/// The head's graph.
struct HeadPass {
    graph: Graph,
    /// What the Llama leaves for it: `[dim, n_slot]`.
    hidden: State,
    out: State,
}

impl OftNetwork {
    /// Takes every tensor of the file: see [`crate::Network::load`].
    ///
    /// # Errors
    /// As [`crate::Network::load`].
    ///
    /// # Panics
    /// If the file is not an OpenVLA-OFT's.
    pub fn load(
        file: &Gguf,
        config: &Config,
        backend: &Arc<Backend>,
        place: &dyn Fn(&str) -> usize,
        observe: bool,
    ) -> Result<Self> {
        let oft = config.oft.as_ref().expect("an OpenVLA-OFT's file");
        let mut weights = Weights::placed(file, backend, &TABLES, place)?;
        let observer = if observe { weights.observe() } else { Observer::default() };
        let vision = Vision::load(&mut weights, config, backend, observe)?;
        let film = if oft.film { Some(Film::load(&mut weights, config, backend)?) } else { None };
        let projector = Projector::load(&mut weights, config)?;
        let model = Model::load(&mut weights, config, backend)?;
        let head = HeadPass::build(&Head::load(&mut weights, config, oft)?, config, oft, backend)?;
        weights.finish()?;
        let encoder = Encoder::new(
            backend,
            config,
            oft.cameras.len(),
            &vision,
            &|g, tower, block| film.as_ref().map(|film| film.vectors(g, tower, block)),
            &projector,
        )?;
        Ok(Self {
            backend: backend.clone(),
            encoder,
            film,
            film_ids: Vec::new(),
            model,
            pass: None,
            head,
            observer,
        })
    }

    /// Vision: normalized planes of all cameras, `[size, size, 3 · n_tower · n_camera]`, to patch features. The
    /// prompt's `ids` count where the model has FiLM.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    pub fn encode(&mut self, planes: &[f32], ids: &[u32]) -> Result<Features> {
        if let Some(film) = &self.film {
            let ids = self.model.with_stop(ids);
            if ids != self.film_ids {
                film.compute(&self.model.embedding, self.model.config.n_vocab, &ids)?;
                self.film_ids = ids;
            }
        }
        self.encoder.encode(planes)
    }

    /// Projector: patch features to soft tokens.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    pub fn project(&mut self, _: &Features) -> Result<SoftTokens> {
        self.encoder.project()
    }

    /// Llama: a prompt, the soft tokens after its first id, and the normalized state, to the rows that the head takes.
    ///
    /// # Errors
    /// [`crate::Error::InstructionTooLong`], or [`crate::Error::Kernels`] if the device has no room or fails.
    ///
    /// # Panics
    /// If there are fewer than two ids, one is not a row of the embedding, or the state has another length.
    pub fn forward(&mut self, ids: &[u32], _: &SoftTokens, state: &[f32]) -> Result<Hidden> {
        assert!(ids.len() > 1, "a prompt is BOS and more");
        let ids = self.model.with_stop(ids);
        if self.pass.as_ref().is_none_or(|pass| pass.ids.shape()[0] != ids.len()) {
            self.pass = None; // gives its memory back before the next takes some
            let (soft, hidden) = (self.encoder.soft(), &self.head.hidden);
            self.pass = Some(self.model.pass(&self.backend, ids.len(), soft, hidden)?);
        }
        let pass = self.pass.as_mut().expect("built above");
        pass.ids.write(&ids);
        match &self.model.input {
            Some(input) => input.write(state),
            None => assert!(state.is_empty(), "the model reads no state"),
        }
        pass.graph.compute()?;
        Ok(Hidden(()))
    }

    /// Head: hidden rows to `[n_action, chunk]` numbers, or `[n_vocab, n_action · chunk]` logits of action tokens.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    pub fn actions(&mut self, _: &Hidden) -> Result<Vec<f32>> {
        self.head.graph.compute()?;
        Ok(self.head.out.read())
    }

    /// What vision left for the projector: `[Σ dim, n_patch · n_camera]`.
    pub fn features(&self) -> Vec<f32> {
        self.encoder.features().read()
    }

    /// What the projector left for the Llama: `[dim, n_patch · n_camera]`.
    pub fn soft_tokens(&self) -> Vec<f32> {
        self.encoder.soft().read()
    }

    /// What each matrix was multiplied by so far, if the network was loaded to observe it.
    pub fn squares(&self) -> BTreeMap<String, Squares> {
        self.observer.squares()
    }

    /// What is allocated on each device now: the GPUs, then the CPU.
    pub fn usage(&self) -> Vec<Usage> {
        self.backend.usage()
    }
}

impl Model {
    fn load(w: &mut Weights, config: &Config, backend: &Arc<Backend>) -> Result<Self> {
        let oft = config.oft.as_ref().expect("an OpenVLA-OFT's file");
        let c = &config.llama;
        let has_state = oft.n_state > 0;
        let input = || State::zeros(backend, DType::F32, shape(&[oft.n_state]));
        Ok(Self {
            config: c.clone(),
            embedding: w.take(TABLES[0], shape(&[c.dim, c.n_vocab]))?,
            state: has_state.then(|| StateProjector::load(w, oft.n_state, c.dim)).transpose()?,
            layers: (0..c.n_layer).map(|i| Layer::load(w, c, i)).collect::<Result<_>>()?,
            norm: RmsNorm::load(w, "output_norm", c.dim, c.eps)?,
            n_slot: oft.n_slot(),
            stop: config.vocabulary.eos as i32,
            input: has_state.then(input).transpose()?,
            slots: State::zeros(backend, DType::F32, shape(&[c.dim, oft.n_slot()]))?,
        })
    }

    /// Ids as the device has them, and the stop token after them, which every row looks at too.
    fn with_stop(&self, ids: &[u32]) -> Vec<i32> {
        let mut ids = device_ids(ids, self.config.n_vocab);
        ids.push(self.stop);
        ids
    }

    /// Builds the graph for prompts of `n_id` ids, the stop token included, which stores `hidden`.
    fn pass(
        &self,
        backend: &Arc<Backend>,
        n_id: usize,
        soft: &State,
        hidden: &State,
    ) -> Result<Pass> {
        let c = &self.config;
        let n_soft = soft.shape()[1];
        let n_row = n_id + n_soft + usize::from(self.state.is_some()) + self.n_slot;
        c.check_rows(n_row)?;
        let ids = State::ids(backend, DType::I32, n_id, c.n_vocab)?;
        let mut positions = BTreeMap::new();
        for layer in &self.layers {
            if let Entry::Vacant(place) = positions.entry(layer.keys().device()) {
                let state = State::beside(layer.keys(), DType::I32, shape(&[n_row]))?;
                state.write(&(0..n_row as i32).collect::<Vec<_>>());
                place.insert(state);
            }
        }
        // The first row that is taken is the prompt's last, as with any next-token prediction.
        let first = n_row - 1 - self.n_slot - 1;
        let max_nodes = 64 + Layer::MAX_NODES * c.n_layer;
        let graph = Graph::build(backend, max_nodes, |g| {
            let x = self.embed(g, g.state(&ids), g.state(soft));
            let last = self.layers.len() - 1;
            let x = self.layers.iter().enumerate().fold(x, |x, (i, layer)| {
                let taken = if i == last { first..first + self.n_slot } else { 0..n_row };
                let positions = g.state(&positions[&layer.keys().device()]);
                layer.build_bidirectional(g, x, positions, taken, c)
            });
            g.compute_in(self.norm.build(g, x), g.state(hidden));
        })?;
        Ok(Pass { graph, ids })
    }

    /// `emb(BOS) | soft tokens | state | emb(the prompt's other ids) | zeros | emb(stop)`: `[dim, n_row]`
    fn embed<'g>(&self, g: &'g Builder, ids: Tensor<'g>, soft: Tensor<'g>) -> Tensor<'g> {
        let (table, n_id) = (g.weight(&self.embedding), ids.shape()[0]);
        let rows = |start, n| table.get_rows(ids.slice(0, start, n));
        let mut x = rows(0, 1).concat(soft, 1);
        if let (Some(projector), Some(input)) = (&self.state, &self.input) {
            x = x.concat(projector.build(g, g.state(input)), 1);
        }
        x.concat(rows(1, n_id - 2), 1).concat(g.state(&self.slots), 1).concat(rows(n_id - 1, 1), 1)
    }
}

impl HeadPass {
    fn build(head: &Head, c: &Config, oft: &OftConfig, backend: &Arc<Backend>) -> Result<Self> {
        let beside = |shape| State::beside(head.weight(), DType::F32, shape);
        let hidden = beside(shape(&[c.llama.dim, oft.n_slot()]))?;
        let out = beside(head.shape(oft.n_slot()))?;
        let graph =
            Graph::build(backend, Head::MAX_NODES, |g| head.build(g, g.state(&hidden), &out))?;
        Ok(Self { graph, hidden, out })
    }
}

impl StateProjector {
    /// More than the graph nodes that [`StateProjector::build`] makes.
    pub const MAX_NODES: usize = 16;

    pub fn load(w: &mut Weights, n_state: usize, dim: usize) -> Result<Self> {
        Ok(Self {
            fc1: Linear::load(w, "oft.state.fc1", n_state, dim)?,
            fc2: Linear::load(w, "oft.state.fc2", dim, dim)?,
        })
    }

    /// `[n_state] → [dim, 1]`
    pub fn build<'g>(&self, g: &'g Builder, state: Tensor<'g>) -> Tensor<'g> {
        self.fc2.build(g, self.fc1.build(g, state).gelu_erf())
    }
}
