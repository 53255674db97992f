//! The Llama-2 decoder: one prefill over `[BOS] + soft tokens + prompt`, then one row per token.
//!
//! in   prompt ids, and `[4096, n_patch]` soft tokens that follow the first of them
//! out  `[32064]` logits of the last row
//!
//! Graphs have fixed shapes and are kept: one prefill per prompt length, one step for every token.
//! A step looks at the whole cache, of which a mask hides what is not written yet.
//!
//! ref: transformers 4.40.1 `LlamaModel.forward`, `PrismaticForConditionalGeneration.forward`

use std::ops::Range;
use std::sync::Arc;

use openvla_kernels::{Backend, Builder, DType, Graph, State, Tensor, Weight, Weights, shape};

use crate::Result;
use crate::config::{Config, LlamaConfig};
use crate::layers::RmsNorm;

/// Tensors that rows are looked up in.
pub(crate) const TABLES: [&str; 1] = ["token_embd.weight"];

pub(crate) struct Llama {
    model: Model,
    backend: Arc<Backend>,
    /// Rows to keep free for the tokens of the longest motion.
    n_token_max: usize,
    run: Option<Run>,
}

/// What is built for one prompt length.
struct Run {
    prefill: Graph,
    step: Graph,
    ids: State,
    token: Row,
    logits: State,
    cache_bytes: usize,
    n_ctx: usize,
    /// Rows written so far: the position of the next.
    n_past: usize,
}

/// The inputs of a step.
struct Row {
    id: State,
    position: State,
    place: State,
    mask: State,
}

/// f16 zero and minus infinity: what a mask is made of.
const SEEN: u16 = 0x0000;
const HIDDEN: u16 = 0xFC00;

impl Llama {
    pub fn load(w: &mut Weights, c: &Config, backend: &Arc<Backend>) -> Result<Self> {
        let model = Model::load(w, c)?;
        let n_token_max = c.statistics.longest();
        Ok(Self { model, backend: backend.clone(), n_token_max, run: None })
    }

    /// Reads the prompt `ids`, with the soft tokens after the first, and gives the logits of the
    /// first token, `[n_vocab]`.
    ///
    /// # Panics
    /// If there are fewer than two ids, or one is no row of the embedding.
    pub fn prefill(&mut self, ids: &[u32], soft: &State) -> Result<Vec<f32>> {
        assert!(ids.len() > 1, "a prompt is BOS and more");
        ids.iter().for_each(|id| self.check(*id));
        let n_row = ids.len() + soft.shape()[1];
        if self.run.as_ref().is_none_or(|run| run.ids.shape()[0] != ids.len()) {
            self.run = None; // gives its memory back before the next takes some
            self.run = Some(self.model.run(&self.backend, ids.len(), soft, self.n_token_max)?);
        }
        let run = self.run.as_mut().expect("built above");
        run.ids.write(&ids.iter().map(|id| *id as i32).collect::<Vec<_>>());
        run.prefill.compute()?;
        run.n_past = n_row;
        Ok(run.logits.read())
    }

    /// Appends one token and gives the logits of the next, `[n_vocab]`.
    ///
    /// # Panics
    /// Without a prefill before, after more tokens than the longest motion has, or if the token is
    /// no row of the embedding.
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>> {
        self.check(token);
        let run = self.run.as_mut().expect("a prefill comes first");
        assert!(run.n_past < run.n_ctx, "more steps than the longest motion has tokens");
        let position = run.n_past;
        run.token.id.write(&[token as i32]);
        run.token.position.write(&[position as i32]);
        run.token.place.write(&[position as i64]);
        run.token.mask.write(&mask_row(position, run.n_ctx));
        run.step.compute()?;
        run.n_past += 1;
        Ok(run.logits.read())
    }

    /// Bytes of keys and values, and between the operations of a prefill and of a step.
    pub fn memory(&self) -> [usize; 3] {
        let of = |run: &Run| [run.cache_bytes, run.prefill.bytes(), run.step.bytes()];
        self.run.as_ref().map_or([0; 3], of)
    }

    /// ggml would abort the process.
    fn check(&self, id: u32) {
        let n_vocab = self.model.config.n_vocab;
        assert!((id as usize) < n_vocab, "id {id} in a vocabulary of {n_vocab}");
    }
}

/// What the row at `position` may look at, of `n_kv` rows.
pub(crate) fn mask_row(position: usize, n_kv: usize) -> Vec<u16> {
    (0..n_kv).map(|at| if at <= position { SEEN } else { HIDDEN }).collect()
}

struct Model {
    config: LlamaConfig,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Weight,
    /// The head's rows for `actions` once more, of a better type.
    action_head: Weight,
    actions: Range<usize>,
}

pub(crate) struct Layer {
    attn_norm: RmsNorm,
    q: Weight,
    k: Weight,
    v: Weight,
    out: Weight,
    ffn_norm: RmsNorm,
    gate: Weight,
    up: Weight,
    down: Weight,
}

/// Keys and values of all rows and layers, both `[n_head_kv · head_dim, n_ctx, n_layer]`.
pub(crate) struct Cache {
    k: State,
    v: State,
}

/// Rows to run: what they are, where they stand, and what they may look at.
pub(crate) struct Rows<'g> {
    pub x: Tensor<'g>,
    pub positions: Tensor<'g>,
    pub places: Tensor<'g>,
    pub mask: Tensor<'g>,
}

impl Model {
    fn load(w: &mut Weights, config: &Config) -> Result<Self> {
        let (c, actions) = (&config.llama, config.actions.rows());
        Ok(Self {
            config: c.clone(),
            embedding: w.take(TABLES[0], shape(&[c.dim, c.n_vocab]))?,
            layers: (0..c.n_layer).map(|i| Layer::load(w, c, i)).collect::<Result<_>>()?,
            norm: RmsNorm::load(w, "output_norm", c.dim, c.eps)?,
            head: w.take("output.weight", shape(&[c.dim, c.n_vocab]))?,
            action_head: w.take("action_head.weight", shape(&[c.dim, actions.len()]))?,
            actions,
        })
    }

    /// Builds both graphs for prompts of `n_id` ids.
    fn run(&self, backend: &Arc<Backend>, n_id: usize, soft: &State, n_new: usize) -> Result<Run> {
        let c = &self.config;
        let n_row = n_id + soft.shape()[1];
        c.check_rows(n_row + n_new)?;
        // Whole vectors of 32 rows; ggml's kernels like them, and few lengths need a new cache.
        let n_ctx = (n_row + n_new).next_multiple_of(32);
        let state = |dtype, dims: &[usize]| State::zeros(backend, dtype, shape(dims));
        let cache = Cache::new(backend, self.cache_dtype(), c, n_ctx)?;
        let cache_bytes = cache.k.bytes() + cache.v.bytes();
        let ids = state(DType::I32, &[n_id])?;
        let positions = state(DType::I32, &[n_row])?;
        let places = state(DType::I64, &[n_row])?;
        let mask = state(DType::F16, &[n_row, n_row])?;
        positions.write(&(0..n_row as i32).collect::<Vec<_>>());
        places.write(&(0..n_row as i64).collect::<Vec<_>>());
        mask.write(&(0..n_row).flat_map(|row| mask_row(row, n_row)).collect::<Vec<_>>());
        let token = Row {
            id: state(DType::I32, &[1])?,
            position: state(DType::I32, &[1])?,
            place: state(DType::I64, &[1])?,
            mask: state(DType::F16, &[n_ctx, 1])?,
        };
        let logits = state(DType::F32, &[c.n_vocab])?;
        let max_nodes = 64 + Layer::MAX_NODES * c.n_layer;
        let prefill = Graph::build(backend, max_nodes, |g| {
            let x = self.embed_prompt(g, g.state(&ids), g.state(soft));
            let (positions, places) = (g.state(&positions), g.state(&places));
            let rows = Rows { x, positions, places, mask: g.state(&mask) };
            g.store(self.build(g, rows, &cache), &logits);
        })?;
        let step = Graph::build(backend, max_nodes, |g| {
            let x = g.weight(&self.embedding).get_rows(g.state(&token.id));
            let (positions, places) = (g.state(&token.position), g.state(&token.place));
            let rows = Rows { x, positions, places, mask: g.state(&token.mask) };
            g.store(self.build(g, rows, &cache), &logits);
        })?;
        Ok(Run { prefill, step, ids, token, logits, cache_bytes, n_ctx, n_past: 0 })
    }

    /// Half precision, as everybody's caches; full for full-precision files, whose point is to
    /// give the reference's numbers.
    fn cache_dtype(&self) -> DType {
        match self.layers[0].q.dtype() {
            DType::F32 => DType::F32,
            _ => DType::F16,
        }
    }

    /// `[emb(BOS)] + soft tokens + emb(the other ids)`: `[dim, n_row]`
    fn embed_prompt<'g>(&self, g: &'g Builder, ids: Tensor<'g>, soft: Tensor<'g>) -> Tensor<'g> {
        let (table, n_id) = (g.weight(&self.embedding), ids.shape()[0]);
        let bos = table.get_rows(ids.slice(0, 0, 1));
        let rest = table.get_rows(ids.slice(0, 1, n_id - 1));
        bos.concat(soft, 1).concat(rest, 1)
    }

    /// Runs rows through all layers, and the last of them through the head: `[n_vocab]`
    fn build<'g>(&self, g: &'g Builder, rows: Rows<'g>, cache: &Cache) -> Tensor<'g> {
        let c = &self.config;
        let n_row = rows.x.shape()[1];
        let layers = self.layers.iter().enumerate();
        let x =
            layers.fold(rows.x, |x, (i, layer)| layer.build(g, &Rows { x, ..rows }, cache, i, c));
        let last = self.norm.build(g, x.slice(1, n_row - 1, 1));
        let logits = g.weight(&self.head).mul_mat(last); // [n_vocab]
        let actions = g.weight(&self.action_head).mul_mat(last); // [256]
        let Range { start, end } = self.actions;
        let (before, after) = (logits.slice(0, 0, start), logits.slice(0, end, c.n_vocab - end));
        before.concat(actions, 0).concat(after, 0)
    }
}

impl Layer {
    /// More than the graph nodes that [`Layer::build`] makes.
    pub const MAX_NODES: usize = 48;

    pub fn load(w: &mut Weights, c: &LlamaConfig, i: usize) -> Result<Self> {
        let name = |part: &str| format!("blk.{i}.{part}");
        let (dim, kv) = (c.dim, c.n_head_kv * c.head_dim());
        let mut matrix = |part: &str, n_in, n_out| w.take(&name(part), shape(&[n_in, n_out]));
        Ok(Self {
            q: matrix("attn_q.weight", dim, dim)?,
            k: matrix("attn_k.weight", dim, kv)?,
            v: matrix("attn_v.weight", dim, kv)?,
            out: matrix("attn_output.weight", dim, dim)?,
            gate: matrix("ffn_gate.weight", dim, c.n_ff)?,
            up: matrix("ffn_up.weight", dim, c.n_ff)?,
            down: matrix("ffn_down.weight", c.n_ff, dim)?,
            attn_norm: RmsNorm::load(w, &name("attn_norm"), dim, c.eps)?,
            ffn_norm: RmsNorm::load(w, &name("ffn_norm"), dim, c.eps)?,
        })
    }

    /// `[dim, n_row] → [dim, n_row]`; writes the rows' keys and values into layer `i` of the cache.
    pub fn build<'g>(
        &self,
        g: &'g Builder,
        rows: &Rows<'g>,
        cache: &Cache,
        i: usize,
        c: &LlamaConfig,
    ) -> Tensor<'g> {
        let x = rows.x + self.attention(g, rows, cache, i, c);
        let y = self.ffn_norm.build(g, x);
        let gate = g.weight(&self.gate).mul_mat(y); // [n_ff, n_row]
        let up = g.weight(&self.up).mul_mat(y); // [n_ff, n_row]
        x + g.weight(&self.down).mul_mat(gate.swiglu(up))
    }

    /// Every row looks at the cached rows that its mask shows. `[dim, n_row] → [dim, n_row]`
    fn attention<'g>(
        &self,
        g: &'g Builder,
        rows: &Rows<'g>,
        cache: &Cache,
        i: usize,
        c: &LlamaConfig,
    ) -> Tensor<'g> {
        let ([dim, n_row, ..], n_kv) = (rows.x.shape(), rows.mask.shape()[0]);
        let (head_dim, n_head_kv) = (c.head_dim(), c.n_head_kv);
        let turn = |x: Tensor<'g>, n_head| {
            x.reshape(&[head_dim, n_head, n_row]).rope(rows.positions, c.rope_base)
        };
        let y = self.attn_norm.build(g, rows.x);
        let q = turn(g.weight(&self.q).mul_mat(y), c.n_head); // [head_dim, n_head, n_row]
        let k = turn(g.weight(&self.k).mul_mat(y), n_head_kv);
        let v = g.weight(&self.v).mul_mat(y); // [n_head_kv · head_dim, n_row]
        let (k_cache, v_cache) = (cache.layer(g, &cache.k, i), cache.layer(g, &cache.v, i));
        k_cache.set_rows(k.reshape(&[n_head_kv * head_dim, n_row]), rows.places);
        v_cache.set_rows(v, rows.places);
        let seen = |cache: Tensor<'g>| {
            let rows = cache.slice(1, 0, n_kv).reshape(&[head_dim, n_head_kv, n_kv]);
            rows.permute([0, 2, 1, 3]) // [head_dim, n_kv, n_head_kv]
        };
        let scale = (head_dim as f32).sqrt().recip();
        let q = q.permute([0, 2, 1, 3]); // [head_dim, n_row, n_head]
        let y = q.flash_attention(seen(k_cache), seen(v_cache), Some(rows.mask), scale);
        g.weight(&self.out).mul_mat(y.reshape(&[dim, n_row]))
    }
}

impl Cache {
    /// Zeroed, for `n_ctx` rows of every layer.
    pub fn new(
        backend: &Arc<Backend>,
        dtype: DType,
        c: &LlamaConfig,
        n_ctx: usize,
    ) -> Result<Self> {
        let shape = [c.n_head_kv * c.head_dim(), n_ctx, c.n_layer, 1];
        let state = || State::zeros(backend, dtype, shape);
        Ok(Self { k: state()?, v: state()? })
    }

    /// `[n_head_kv · head_dim, n_ctx]`
    fn layer<'g>(&self, g: &'g Builder, cache: &State, i: usize) -> Tensor<'g> {
        g.state(cache).slice(2, i, 1)
    }
}
