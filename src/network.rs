//! The three networks on the devices that they were placed on, and the tensors that lead from one to the next.
//!
//! ```text
//! planes [size, size, 6] ─vision→ features [2176, 256] ─projector→ soft [4096, 256] ─Llama→ logits
//! ```
//!
//! Each stage is a graph that is built once, and hands on proof that it ran: what it computed stays on the
//! device. [`crate::OpenVla`] runs them in order; tests and benches run them one by one.

use std::collections::BTreeMap;
use std::sync::Arc;

use openvla_kernels::{Backend, Gguf, Observer, Squares, Usage, Weights};

use crate::Result;
use crate::config::Config;
use crate::encoder::{Encoder, Features, SoftTokens};
use crate::llama::{Llama, TABLES, Tree};
use crate::projector::Projector;
use crate::vision::Vision;

/// Vision towers, projector and Llama, ready to run.
pub struct Network {
    backend: Arc<Backend>,
    encoder: Encoder,
    llama: Llama,
    observer: Observer,
}

/// A prompt that the Llama has read, the tokens after it, and what may come next.
pub struct Sequence<'n> {
    llama: &'n mut Llama,
    logits: Vec<Vec<f32>>,
}

impl Sequence<'_> {
    /// Logits of the next token, `[n_vocab]`.
    pub fn logits(&self) -> &[f32] {
        self.logits.last().expect("a pass has a row or more")
    }

    /// Those after each row of the last forward pass: after the prompt or a token, and after each draft that
    /// followed it.
    pub fn all_logits(&self) -> &[Vec<f32>] {
        &self.logits
    }

    /// Appends a token, and gives the logits of the next, `[n_vocab]`.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    ///
    /// # Panics
    /// After more tokens than the longest motion has, or if the token is not a row of the embedding.
    pub fn step(&mut self, token: u32) -> Result<&[f32]> {
        self.step_drafted(&[token])?;
        Ok(self.logits())
    }

    /// Appends a token and drafts in one forward pass, and gives the logits after each, `[n_vocab]` each.
    ///
    /// # Errors
    /// As [`Sequence::step`].
    ///
    /// # Panics
    /// As [`Sequence::step`], or without any token.
    pub fn step_drafted(&mut self, tokens: &[u32]) -> Result<&[Vec<f32>]> {
        self.logits = self.llama.step(tokens)?;
        Ok(&self.logits)
    }

    /// Takes the last `n` tokens back: drafts that were wrong.
    ///
    /// # Panics
    /// If there are fewer after the prompt.
    pub fn forget(&mut self, n: usize) {
        self.llama.forget(n);
    }

    /// Moves it to a slot of its own, beside those of other robots, if there is one for it: see [`Llama::park`].
    pub(crate) fn park(&mut self) -> Result<Option<usize>> {
        self.llama.park()
    }

    /// The logits after each node of a tree of continuations, `[n_vocab]`, which are forgotten at once.
    ///
    /// # Panics
    /// If it has more nodes than there is room for.
    pub(crate) fn branch(&mut self, tree: &Tree) -> Result<Vec<Vec<f32>>> {
        self.llama.branch(tree)
    }
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
        let vision = Vision::load(&mut weights, config, backend, observe)?;
        let projector = Projector::load(&mut weights, config)?;
        let llama = Llama::load(&mut weights, config, backend)?;
        weights.finish()?;
        let encoder = Encoder::new(backend, config, 1, &vision, &|_, _, _| None, &projector)?;
        let backend = backend.clone();
        Ok(Self { backend, encoder, llama, observer })
    }

    /// Vision: normalized planes `[size, size, 3 · n_tower]` to patch features.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    pub fn encode(&mut self, planes: &[f32]) -> Result<Features> {
        self.encoder.encode(planes)
    }

    /// Projector: patch features to soft tokens.
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] if the device fails.
    pub fn project(&mut self, _: &Features) -> Result<SoftTokens> {
        self.encoder.project()
    }

    /// Takes soft tokens `[dim, n_patch]` that come from elsewhere.
    ///
    /// # Panics
    /// If there are more or fewer numbers.
    pub fn set_soft_tokens(&mut self, soft: &[f32]) -> SoftTokens {
        self.encoder.set_soft_tokens(soft)
    }

    /// Llama: reads a prompt, its first id, the soft tokens and its other ids.
    ///
    /// # Errors
    /// [`crate::Error::InstructionTooLong`], or [`crate::Error::Kernels`] if the device has no room
    /// or fails.
    ///
    /// # Panics
    /// If there are fewer than two ids, or one is not a row of the embedding.
    pub fn prefill(&mut self, ids: &[u32], soft: &SoftTokens) -> Result<Sequence<'_>> {
        self.prefill_drafted(ids, soft, &[])
    }

    /// The same with drafts of the first tokens after the prompt.
    ///
    /// # Errors
    /// As [`Network::prefill`].
    ///
    /// # Panics
    /// As [`Network::prefill`], or if there are as many drafts as the longest motion has tokens.
    pub fn prefill_drafted(
        &mut self,
        ids: &[u32],
        _: &SoftTokens,
        drafts: &[u32],
    ) -> Result<Sequence<'_>> {
        let logits = self.llama.prefill(ids, self.encoder.soft(), drafts)?;
        Ok(Sequence { llama: &mut self.llama, logits })
    }

    /// Whether a pass may have rows of several robots.
    pub(crate) fn shares_passes(&self) -> bool {
        self.llama.shares_passes()
    }

    /// Slots for prompts of so many rows are wanted: see [`Llama::plan_slots`].
    pub(crate) fn plan_slots(&mut self, n_rows: &[usize]) {
        self.llama.plan_slots(n_rows);
    }

    /// Appends tokens and drafts to what is in slots, all in one pass: see [`Llama::step_slots`].
    pub(crate) fn step_slots(&mut self, rows: &[(usize, Vec<u32>)]) -> Result<Vec<Vec<Vec<f32>>>> {
        self.llama.step_slots(rows)
    }

    /// Takes the last `n` tokens of a slot back: drafts that were wrong.
    pub(crate) fn forget_in(&mut self, slot: usize, n: usize) {
        self.llama.forget_in(slot, n);
    }

    /// Makes room for trees of `n` nodes after prompts that are read from now on.
    pub(crate) fn reserve(&mut self, n: usize) {
        self.llama.reserve(n);
    }

    /// Where the Llama looked, of the picture and the prompt `ids` that it read last: for each token after the prompt, of
    /// which `tokens` are all but the last, the attention of the row that it was chosen by, `[n_row]`, in the mean over
    /// all heads of the last `n_layer` layers. Row 0 is BOS, those after it are the picture's patches.
    pub(crate) fn attention(
        &mut self,
        ids: &[u32],
        tokens: &[u32],
        n_layer: usize,
    ) -> Result<Vec<Vec<f64>>> {
        self.llama.attention(ids, self.encoder.soft(), tokens, n_layer)
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
        self.encoder.features().read()
    }

    /// What the projector left for the Llama: `[dim, n_patch]`.
    pub fn soft_tokens(&self) -> Vec<f32> {
        self.encoder.soft().read()
    }
}
