//! The Llama-2 decoder: one prefill over `[BOS] + soft tokens + prompt`, then a row per token.
//!
//! in   prompt ids, and `[4096, n_patch]` soft tokens that follow the first of them
//! out  `[32064]` logits of the last row
//!
//! A pass may also run drafts, tokens that are only guessed, and gives the logits after each of
//! them. Rows whose guess was wrong are forgotten: the next pass overwrites them.
//!
//! Or it runs the rows of a tree, continuations of the prompt that share what they begin with. They go
//! behind what is written of the cache, and are forgotten at once.
//!
//! Or it runs the rows of several robots, each of which has a slot in a cache that they share: see `slots`.
//!
//! Graphs have fixed shapes and are kept: for each prompt length one for each number of rows. A
//! step looks at the whole cache, of which a mask hides what is not written yet, or forgotten.
//!
//! ref: transformers 4.40.1 `LlamaModel.forward`, `PrismaticForConditionalGeneration.forward`

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::iter::repeat_n;
use std::ops::Range;
use std::sync::Arc;

use openvla_kernels::{Backend, Builder, DType, Graph, State, Tensor, Weight, Weights, shape};

use crate::Result;
use crate::config::{Config, LlamaConfig};
use crate::layers::RmsNorm;

mod attention;
mod inputs;
mod layer;
mod slots;
mod tree;

use inputs::Inputs;
use layer::{HIDDEN, SEEN};
pub(crate) use layer::{Layer, LayerCache, Rows, mask_row};
use slots::Slots;
pub(crate) use tree::{Node, Tree};

/// Tensors that rows are looked up in.
pub(crate) const TABLES: [&str; 1] = ["token_embd.weight"];

/// How tensors after the last layer begin.
const HEAD: [&str; 3] = ["output", "action_head", "oft.head"];

/// What a tensor belongs to.
pub(crate) enum Part {
    /// What comes before the first layer.
    Front,
    Layer(usize),
    /// What comes after the last.
    Head,
}

/// The part of a model with `n_layer` layers that a tensor of this name belongs to.
pub(crate) fn part(name: &str, n_layer: usize) -> Part {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
    match block.and_then(|i| i.parse().ok()) {
        Some(i) if i < n_layer => Part::Layer(i),
        None if HEAD.iter().any(|prefix| name.starts_with(prefix)) => Part::Head,
        _ => Part::Front,
    }
}

pub(crate) struct Llama {
    model: Model,
    backend: Arc<Backend>,
    /// Rows to keep free for the tokens of the longest motion.
    n_token_max: usize,
    /// Rows to keep free for those of a tree.
    n_node_max: usize,
    graphs: Option<PromptGraphs>,
    slots: Slots,
}

/// What is built for one prompt length.
struct PromptGraphs {
    cache: Cache,
    n_ctx: usize,
    /// Ids of the prompt, without drafts.
    n_id: usize,
    /// Rows of the prompt, without drafts.
    n_row: usize,
    /// Rows written so far: the position of the next.
    n_past: usize,
    /// By the number of drafts.
    prefills: BTreeMap<usize, Pass>,
    /// By the number of tokens.
    steps: BTreeMap<usize, Pass>,
    /// By the number of rows, of trees.
    trees: BTreeMap<usize, Pass>,
}

/// A graph for a number of rows, with what it reads and gives.
struct Pass {
    graph: Graph,
    ids: State,
    /// By device.
    inputs: BTreeMap<usize, Inputs>,
    /// `[n_vocab, n]`, of the last rows.
    logits: State,
}

/// The size of a pass.
struct Size {
    /// Ids that it reads.
    n_id: usize,
    /// Rows, with the soft tokens.
    n_row: usize,
    /// Rows of the cache that it looks at.
    n_kv: usize,
    /// How many of the last rows have logits.
    n_out: usize,
    /// Whether its rows may go anywhere in the cache.
    scattered: bool,
}

impl Llama {
    /// Rows that ggml's CUDA kernels for a single row take at once, nearly for the price of one.
    pub const MAX_ROWS: usize = 8;

    pub fn load(w: &mut Weights, c: &Config, backend: &Arc<Backend>) -> Result<Self> {
        let model = Model::load(w, c)?;
        let (n_token_max, slots) = (c.statistics.longest(), Slots::new(&model, backend));
        Ok(Self {
            model,
            backend: backend.clone(),
            n_token_max,
            n_node_max: 0,
            graphs: None,
            slots,
        })
    }

    /// Makes room for trees of `n` rows after prompts that are read from now on.
    pub fn reserve(&mut self, n: usize) {
        self.n_node_max = self.n_node_max.max(n.next_multiple_of(Tree::STRIDE));
    }

    /// Reads the prompt `ids`, with the soft tokens after the first, and then `drafts`. Gives the
    /// logits of the first token, `[n_vocab]`, and of the one after each draft.
    ///
    /// # Panics
    /// If there are fewer than two ids, one is not a row of the embedding, or there are as many drafts
    /// as the longest motion has tokens.
    pub fn prefill(&mut self, ids: &[u32], soft: &State, drafts: &[u32]) -> Result<Vec<Vec<f32>>> {
        assert!(ids.len() > 1, "a prompt is BOS and more");
        assert!(drafts.len() < self.n_token_max, "more drafts than the longest motion has tokens");
        let all = device_ids(&[ids, drafts].concat(), self.model.config.n_vocab);
        let suits = |graphs: &PromptGraphs| {
            graphs.n_id == ids.len() && graphs.n_ctx - graphs.n_row >= self.n_node_max
        };
        if !self.graphs.as_ref().is_some_and(suits) {
            self.graphs = None; // gives its memory back before the next takes some
            let n_row = ids.len() + soft.shape()[1];
            let n_new = [self.n_token_max, self.n_node_max];
            self.graphs = Some(self.model.graphs(ids.len(), n_row, n_new)?);
        }
        let graphs = self.graphs.as_mut().expect("built above");
        let n_row = graphs.n_row + drafts.len();
        let pass = match graphs.prefills.entry(drafts.len()) {
            Entry::Occupied(pass) => pass.into_mut(),
            Entry::Vacant(place) => {
                let n_out = 1 + drafts.len();
                let size = Size { n_id: all.len(), n_row, n_kv: n_row, n_out, scattered: false };
                let pass = self.model.pass(&self.backend, &graphs.cache, size, Some(soft))?;
                let n_soft = soft.shape()[1];
                // The order of `Model::embed`: soft tokens, BOS, the rest.
                pass.set_positions((1..=n_soft).chain([0]).chain(n_soft + 1..n_row));
                place.insert(pass)
            }
        };
        graphs.n_past = n_row;
        pass.run(&all)
    }

    /// Appends tokens and gives the logits after each, `[n_vocab]`.
    ///
    /// # Panics
    /// Without a prefill before, without tokens, with more than the longest motion has left, or if
    /// one is not a row of the embedding.
    pub fn step(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        let (n, all) = (tokens.len(), device_ids(tokens, self.model.config.n_vocab));
        let graphs = self.graphs.as_mut().expect("a prefill comes first");
        assert!(n > 0, "a step is a token or more");
        assert!(graphs.n_past + n <= graphs.n_ctx, "more steps than the longest motion has tokens");
        let pass = match graphs.steps.entry(n) {
            Entry::Occupied(pass) => pass.into_mut(),
            Entry::Vacant(place) => {
                let size =
                    Size { n_id: n, n_row: n, n_kv: graphs.n_ctx, n_out: n, scattered: false };
                place.insert(self.model.pass(&self.backend, &graphs.cache, size, None)?)
            }
        };
        pass.set_positions(graphs.n_past..graphs.n_past + n);
        graphs.n_past += n;
        pass.run(&all)
    }

    /// The logits after each node of a tree of the prompt's, `[n_vocab]`. What was read before stays.
    ///
    /// # Panics
    /// Without a prefill before, or with more nodes than there is room for.
    pub fn branch(&mut self, tree: &Tree) -> Result<Vec<Vec<f32>>> {
        let graphs = self.graphs.as_mut().expect("a prefill comes first");
        let (n_soft, n_past, n_ctx) = (graphs.n_row - graphs.n_id, graphs.n_past, graphs.n_ctx);
        let n = tree.nodes().len().next_multiple_of(Tree::STRIDE);
        assert!(n_past + n <= n_ctx, "a tree has as many nodes as there is room for");
        let pass = match graphs.trees.entry(n) {
            Entry::Occupied(pass) => pass.into_mut(),
            Entry::Vacant(place) => {
                let size = Size { n_id: n, n_row: n, n_kv: n_ctx, n_out: n, scattered: true };
                place.insert(self.model.pass(&self.backend, &graphs.cache, size, None)?)
            }
        };
        // What fills the pass up looks at BOS, and nobody at it.
        let filler = Node { id: 0, depth: 0, parent: None };
        let nodes: Vec<_> = tree.nodes().iter().cloned().chain(repeat_n(filler, n)).collect();
        let (nodes, mut mask) = (&nodes[..n], Vec::with_capacity(n * n_ctx));
        for (i, node) in nodes.iter().enumerate() {
            let (begun, path) = tree.path(node);
            // Of the prompt, BOS, the soft tokens, and its other ids so far; then the nodes before it, and itself.
            let mut row = mask_row(n_soft + begun, n_ctx);
            path.into_iter().chain([i]).for_each(|at| row[n_past + at] = SEEN);
            mask.extend(row);
        }
        let positions: Vec<_> = nodes.iter().map(|node| (n_soft + node.depth) as i32).collect();
        let places: Vec<_> = (n_past..n_past + n).map(|row| row as i32).collect();
        pass.set_rows(&positions, &places, &mask);
        let ids: Vec<_> = nodes.iter().map(|node| node.id).collect();
        let mut logits = pass.run(&device_ids(&ids, self.model.config.n_vocab))?;
        logits.truncate(tree.nodes().len());
        Ok(logits)
    }

    /// Takes the last `n` rows back: tokens that were drafted wrongly.
    ///
    /// # Panics
    /// If there are fewer after the prompt.
    pub fn forget(&mut self, n: usize) {
        let graphs = self.graphs.as_mut().expect("a prefill comes first");
        assert!(graphs.n_past - graphs.n_row >= n, "the prompt is never forgotten");
        graphs.n_past -= n;
    }
}

/// Rows of a cache that so many are to be written of: whole vectors of 32; ggml's kernels like them, and few lengths
/// need a new cache.
fn n_ctx(n_row: usize) -> usize {
    n_row.next_multiple_of(32)
}

/// Ids as the device has them.
///
/// # Panics
/// If one is not a row of the embedding.
pub(crate) fn device_ids(ids: &[u32], n_vocab: usize) -> Vec<i32> {
    let check = |id: &u32| {
        assert!((*id as usize) < n_vocab, "id {id} in a vocabulary of {n_vocab}");
        *id as i32
    };
    ids.iter().map(check).collect()
}

impl Pass {
    /// Its rows are at these positions.
    fn set_positions(&self, at: impl Iterator<Item = usize> + Clone) {
        self.inputs.values().for_each(|inputs| inputs.set_positions(at.clone()));
    }

    /// The same of rows that may go anywhere: `[n_row]`, `[n_row]` and `[n_kv, n_row]`.
    fn set_rows(&self, at: &[i32], places: &[i32], mask: &[u16]) {
        self.inputs.values().for_each(|inputs| inputs.set_rows(at, places, mask));
    }

    /// Returns the logits of the last rows, `[n_vocab]` each.
    fn run(&mut self, ids: &[i32]) -> Result<Vec<Vec<f32>>> {
        self.ids.write(ids);
        self.graph.compute()?;
        let rows = self.logits.read();
        Ok(rows.chunks(self.logits.shape()[0]).map(<[f32]>::to_vec).collect())
    }
}

struct Model {
    config: LlamaConfig,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: LmHead,
}

/// The matrix that gives logits.
pub(crate) struct LmHead {
    weight: Weight,
    /// Its rows for `actions` once more, of a better type.
    action_weight: Weight,
    actions: Range<usize>,
}

impl LmHead {
    pub fn load(w: &mut Weights, config: &Config) -> Result<Self> {
        let (c, actions) = (&config.llama, config.actions.rows());
        Ok(Self {
            weight: w.take("output.weight", shape(&[c.dim, c.n_vocab]))?,
            action_weight: w.take("action_head.weight", shape(&[c.dim, actions.len()]))?,
            actions,
        })
    }

    /// The matrix for all ids.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Ids that it gives logits of.
    pub fn n_vocab(&self) -> usize {
        self.weight.shape()[1]
    }

    /// Stores the logits of rows `x [dim, n]`: `[n_vocab, n]`.
    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>, logits: &State) {
        let (logits, action_weight) = (g.state(logits), g.weight(&self.action_weight));
        g.compute_in(g.weight(&self.weight).mul_mat(x), logits);
        let actions = logits.slice(0, self.actions.start, self.actions.len());
        let n = x.shape()[1];
        if n == 1 || n > Llama::MAX_ROWS || g.has_gpu() {
            return g.compute_in(action_weight.mul_mat(x), actions);
        }
        // Of floats, which it is, ggml sums a product of several columns in another order than of one: row by row,
        // a row's logits are the same in any company.
        for i in 0..n {
            g.compute_in(action_weight.mul_mat(x.slice(1, i, 1)), actions.slice(1, i, 1));
        }
    }
}

/// All layers'.
type Cache = Vec<LayerCache>;

impl Model {
    fn load(w: &mut Weights, config: &Config) -> Result<Self> {
        let c = &config.llama;
        Ok(Self {
            config: c.clone(),
            embedding: w.take(TABLES[0], shape(&[c.dim, c.n_vocab]))?,
            layers: (0..c.n_layer).map(|i| Layer::load(w, c, i)).collect::<Result<_>>()?,
            norm: RmsNorm::load(w, "output_norm", c.dim, c.eps)?,
            head: LmHead::load(w, config)?,
        })
    }

    /// Makes room for prompts of `n_id` ids and `n_row` rows, and for a motion or a tree of so many rows after.
    fn graphs(&self, n_id: usize, n_row: usize, n_new: [usize; 2]) -> Result<PromptGraphs> {
        let (c, [n_token, n_node]) = (&self.config, n_new);
        c.check_rows(n_row + n_token)?;
        let n_ctx = n_ctx(n_row + n_token.max(n_node));
        let cache = self.cache(n_ctx)?;
        let (prefills, steps, trees) = Default::default();
        Ok(PromptGraphs { cache, n_ctx, n_id, n_row, n_past: 0, prefills, steps, trees })
    }

    /// Builds the graph of a pass; the soft tokens' rows come after its first id's.
    fn pass(
        &self,
        backend: &Arc<Backend>,
        cache: &Cache,
        size: Size,
        soft: Option<&State>,
    ) -> Result<Pass> {
        let c = &self.config;
        let ids = State::ids(backend, DType::I32, size.n_id, c.n_vocab)?;
        let inputs = Inputs::by_device(&self.layers, cache, &size)?;
        let shape = shape(&[c.n_vocab, size.n_out]);
        let logits = State::beside(self.head.weight(), DType::F32, shape)?;
        let max_nodes = 64 + Layer::MAX_NODES * c.n_layer + 8 * size.n_out;
        let graph = Graph::build(backend, max_nodes, |g| {
            let x = self.embed(g, g.state(&ids), soft.map(|soft| g.state(soft)));
            let last = self.build(g, x, &inputs, cache, size.n_out);
            self.head.build(g, last, &logits);
        })?;
        Ok(Pass { graph, ids, inputs, logits })
    }

    /// Those of the layers, and the head's for all ids.
    fn matrices(&self) -> impl Iterator<Item = &Weight> {
        self.layers.iter().flat_map(Layer::matrices).chain([self.head.weight()])
    }

    /// A cache of `n_ctx` rows.
    fn cache(&self, n_ctx: usize) -> Result<Cache> {
        let dtype = self.cache_dtype();
        self.layers.iter().map(|layer| layer.cache(&self.config, n_ctx, dtype)).collect()
    }

    /// Half precision, as everybody's caches; full for full-precision files, whose point is to
    /// give the reference's numbers.
    fn cache_dtype(&self) -> DType {
        match self.layers[0].keys().dtype() {
            DType::F32 => DType::F32,
            _ => DType::F16,
        }
    }

    /// Soft tokens if there are any, then the ids' embeddings: `[dim, n_row]`. BOS is first by its position alone, so
    /// that one launch looks up all ids and another puts them behind the soft tokens.
    fn embed<'g>(&self, g: &'g Builder, ids: Tensor<'g>, soft: Option<Tensor<'g>>) -> Tensor<'g> {
        let rows = g.weight(&self.embedding).get_rows(ids);
        soft.map_or(rows, |soft| soft.concat(rows, 1))
    }

    /// Runs rows `x` through all layers, and gives what the head multiplies of the last `n`: `[dim, n]`
    fn build<'g>(
        &self,
        g: &'g Builder,
        x: Tensor<'g>,
        inputs: &BTreeMap<usize, Inputs>,
        cache: &Cache,
        n: usize,
    ) -> Tensor<'g> {
        let c = &self.config;
        let n_row = x.shape()[1];
        let rows: BTreeMap<_, _> =
            inputs.iter().map(|(device, inputs)| (*device, inputs.rows(g, x))).collect();
        let mut n_out = vec![n_row; c.n_layer];
        n_out[c.n_layer - 1] = n;
        let layers = self.layers.iter().zip(cache).zip(n_out);
        let x = layers.fold(x, |x, ((layer, cache), n)| {
            layer.build(g, &Rows { x, ..rows[&layer.keys().device()] }, cache, n, c)
        });
        self.norm.build(g, x)
    }
}
