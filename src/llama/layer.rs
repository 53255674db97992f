//! One layer of the Llama: attention over a KV cache, and the MLP.

use std::ops::Range;

use openvla_kernels::{Builder, DType, Shape, State, Tensor, Weight, Weights, shape};

use crate::Result;
use crate::config::LlamaConfig;
use crate::layers::{Products, RmsNorm};

/// f16 zero and minus infinity: what a mask is made of.
pub(crate) const SEEN: u16 = 0x0000;
pub(super) const HIDDEN: u16 = 0xFC00;

/// What the row at `position` may look at, of `n_kv` rows.
pub(crate) fn mask_row(position: usize, n_kv: usize) -> Vec<u16> {
    (0..n_kv).map(|at| if at <= position { SEEN } else { HIDDEN }).collect()
}

pub(crate) struct Layer {
    attn_norm: RmsNorm,
    k: Weight,
    qkv: Products<3>,
    out: Weight,
    ffn_norm: RmsNorm,
    gate_up: [Weight; 2],
    gate_and_up: Products<2>,
    down: Weight,
}

pub(crate) struct LayerCache {
    /// Keys and values, side by side: `[2 · n_head_kv · head_dim, n_ctx]`.
    kv: State,
    /// A single row's queries, keys and values, `[dim + 2 · n_head_kv · head_dim]`, where several products compute them.
    single: Option<State>,
}

/// Rows to run: their embeddings, positions, where in the cache they go, and what they may look at.
pub(crate) struct Rows<'g> {
    pub x: Tensor<'g>,
    pub positions: Tensor<'g>,
    pub places: Tensor<'g>,
    pub mask: Tensor<'g>,
}

impl Layer {
    /// Its matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &Weight> {
        self.qkv.matrices().chain(self.gate_and_up.matrices()).chain([&self.out, &self.down])
    }

    /// What gives the keys: the cache is on its device.
    pub fn keys(&self) -> &Weight {
        &self.k
    }

    /// A cache on its device.
    pub fn cache(&self, c: &LlamaConfig, n_ctx: usize, dtype: DType) -> Result<LayerCache> {
        let zeros = |dtype, shape| Ok(State::beside(&self.k, dtype, shape)?);
        let cache = LayerCache::new(c, n_ctx, |shape| zeros(dtype, shape))?;
        let n = c.dim + 2 * c.n_head_kv * c.head_dim();
        let single = self.qkv.is_several().then(|| zeros(DType::F32, shape(&[n])));
        Ok(LayerCache { single: single.transpose()?, ..cache })
    }

    /// More than the graph nodes that [`Layer::build`] makes.
    pub const MAX_NODES: usize = 48;

    pub fn load(w: &mut Weights, c: &LlamaConfig, i: usize) -> Result<Self> {
        let name = |part: &str| format!("blk.{i}.{part}");
        let (dim, kv) = (c.dim, c.n_head_kv * c.head_dim());
        let mut matrix = |part: &str, n_in, n_out| w.take(&name(part), shape(&[n_in, n_out]));
        let qkv = [
            matrix("attn_q.weight", dim, dim)?,
            matrix("attn_k.weight", dim, kv)?,
            matrix("attn_v.weight", dim, kv)?,
        ];
        let out = matrix("attn_output.weight", dim, dim)?;
        let gate_up =
            [matrix("ffn_gate.weight", dim, c.n_ff)?, matrix("ffn_up.weight", dim, c.n_ff)?];
        let down = matrix("ffn_down.weight", c.n_ff, dim)?;
        Ok(Self {
            attn_norm: RmsNorm::load(w, &name("attn_norm"), dim, c.eps)?,
            qkv: Products::new(&qkv),
            k: qkv[1].clone(),
            out,
            ffn_norm: RmsNorm::load(w, &name("ffn_norm"), dim, c.eps)?,
            gate_and_up: Products::new(&gate_up),
            gate_up,
            down,
        })
    }

    /// `[dim, n_row] → [dim, n]`, of the last `n` rows; writes all rows' keys and values into the
    /// cache.
    pub fn build<'g>(
        &self,
        g: &'g Builder,
        rows: &Rows<'g>,
        cache: &LayerCache,
        n: usize,
        c: &LlamaConfig,
    ) -> Tensor<'g> {
        let x = rows.x + self.attention(g, rows, cache, c);
        self.mlp(g, x.slice(1, x.shape()[1] - n, n))
    }

    /// What the queries of the last `n` rows make of the cached keys that the mask is for: `[n_kv, n, n_head]`, before the
    /// scale, the mask and the softmax. For [`super::Llama::attention`] alone, which computes the products again.
    pub fn scores<'g>(
        &self,
        g: &'g Builder,
        rows: &Rows<'g>,
        cache: &LayerCache,
        n: usize,
        c: &LlamaConfig,
    ) -> Tensor<'g> {
        let ([_, n_row, ..], n_kv) = (rows.x.shape(), rows.mask.shape()[0]);
        let (head_dim, kv) = (c.head_dim(), c.n_head_kv * c.head_dim());
        let (q, ..) = self.rotated(g, rows.x, rows.positions, None, c);
        let q = q.slice(2, n_row - n, n).permute([0, 2, 1, 3]).contiguous(); // [head_dim, n, n_head]
        let keys = g.state(&cache.kv).slice(0, 0, kv).slice(1, 0, n_kv).heads(head_dim);
        keys.permute([0, 2, 1, 3]).contiguous().mul_mat(q)
    }

    /// [`Layer::build`] without a cache, and every row looks at every other: `[dim, n_row] → [dim, n]`, of the rows `taken`.
    pub fn build_bidirectional<'g>(
        &self,
        g: &'g Builder,
        x: Tensor<'g>,
        positions: Tensor<'g>,
        taken: Range<usize>,
        c: &LlamaConfig,
    ) -> Tensor<'g> {
        let (head_dim, start, n) = (c.head_dim(), taken.start, taken.len());
        let (q, k, v) = self.rotated(g, x, positions, None, c);
        let (k, v) = match v {
            Some(v) => (k, v),
            None => {
                let kv = k.as_attention_reads();
                let n = kv.shape()[0] / 2;
                (kv.slice(0, 0, n), kv.slice(0, n, n))
            }
        };
        // [head_dim, n_head, n_row] → [head_dim, n_row, n_head]
        let [q, k, v] = [q.slice(2, start, n), k.heads(head_dim), v.heads(head_dim)]
            .map(|heads| heads.permute([0, 2, 1, 3]));
        let y = q.flash_attention(k, v, None, (head_dim as f32).sqrt().recip());
        let y = g.weight(&self.out).mul_mat(y.reshape(&[c.dim, n]));
        self.mlp(g, x.slice(1, start, n) + y)
    }

    /// `[dim, n] → [dim, n]`
    fn mlp<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        let y = self.ffn_norm.build(g, x);
        // Of a single row, CUDA multiplies by both and gates in one kernel.
        let [gate, up] = match x.shape()[1] {
            1 => self.gate_up.each_ref().map(|weight| g.weight(weight).mul_mat(y)),
            _ => self.gate_and_up.build(g, y),
        }; // [n_ff, n]
        x + g.weight(&self.down).mul_mat(gate.swiglu(up))
    }

    /// Queries by heads, `[head_dim, n_head, n_row]`; and rows of keys and values, `[kv, n_row]` each. Where all are
    /// slices of one product, the keys' rows are `[2 · kv, n_row]` and have the values behind: one launch rotates,
    /// and one writes the cache. So too where the products of a single row are computed into `single`.
    fn rotated<'g>(
        &self,
        g: &'g Builder,
        x: Tensor<'g>,
        positions: Tensor<'g>,
        single: Option<&State>,
        c: &LlamaConfig,
    ) -> (Tensor<'g>, Tensor<'g>, Option<Tensor<'g>>) {
        let (dim, head_dim, kv) = (c.dim, c.head_dim(), c.n_head_kv * c.head_dim());
        let [q, k, v] = self.qkv.build(g, self.attn_norm.build(g, x));
        let (mut all, two) = (Tensor::side_by_side(&[q, k, v]), Tensor::side_by_side(&[q, k]));
        if let (None, Some(two), Some(single), 1) = (all, two, single, x.shape()[1]) {
            let row = g.state(single);
            g.compute_in(two, row.slice(0, 0, dim + kv));
            g.compute_in(v, row.slice(0, dim + kv, kv));
            all = Some(row);
        }
        let Some(x) = all.or(two) else {
            let [q, k] = [q, k].map(|x| x.heads(head_dim).rope(positions, c.rope_base));
            return (q, k.heads_as_rows(), Some(v));
        };
        let x = x.rope_first(dim + kv, head_dim, positions, c.rope_base);
        let apart = if all.is_none() { Some(v) } else { None };
        (x.slice(0, 0, dim).heads(head_dim), x.slice(0, dim, x.shape()[0] - dim), apart)
    }

    /// Every row looks at the cached rows that its mask shows. `[dim, n_row] → [dim, n_row]`
    fn attention<'g>(
        &self,
        g: &'g Builder,
        rows: &Rows<'g>,
        cache: &LayerCache,
        c: &LlamaConfig,
    ) -> Tensor<'g> {
        let ([dim, n_row, ..], n_kv) = (rows.x.shape(), rows.mask.shape()[0]);
        let (head_dim, kv) = (c.head_dim(), c.n_head_kv * c.head_dim());
        let (q, k, v) = self.rotated(g, rows.x, rows.positions, cache.single.as_ref(), c);
        let cache = g.state(&cache.kv);
        let (keys, values) = (cache.slice(0, 0, kv), cache.slice(0, kv, kv));
        match v {
            Some(v) => {
                keys.set_rows(k, rows.places);
                values.set_rows(v, rows.places);
            }
            None => cache.set_rows(k, rows.places),
        }
        let seen = |x: Tensor<'g>| {
            let rows = x.slice(1, 0, n_kv).heads(head_dim); // [head_dim, n_head_kv, n_kv]
            rows.permute([0, 2, 1, 3]) // [head_dim, n_kv, n_head_kv]
        };
        let scale = (head_dim as f32).sqrt().recip();
        let q = q.permute([0, 2, 1, 3]); // [head_dim, n_row, n_head]
        let y = q.flash_attention(seen(keys), seen(values), Some(rows.mask), scale);
        g.weight(&self.out).mul_mat(y.reshape(&[dim, n_row]))
    }
}

impl LayerCache {
    /// Rows that it has room for.
    pub fn n_ctx(&self) -> usize {
        self.kv.shape()[1]
    }

    /// Copies its first `n` rows to those of another from `at` on.
    pub fn copy(&self, g: &Builder, n: usize, to: &Self, at: usize) {
        g.store_in(g.state(&self.kv).slice(1, 0, n), g.state(&to.kv).slice(1, at, n));
    }

    /// For `n_ctx` rows, of zeroed states.
    pub fn new(
        c: &LlamaConfig,
        n_ctx: usize,
        zeros: impl Fn(Shape) -> Result<State>,
    ) -> Result<Self> {
        let kv = c.n_head_kv * c.head_dim();
        Ok(Self { kv: zeros(shape(&[2 * kv, n_ctx]))?, single: None })
    }
}
