//! Attention of many rows on AVX-512: 32 queries at a time, which lie side by side in two vectors.
//!
//! ```text
//! for each head                                 (threads have their shares of heads and tiles)
//!     keys, values -> f32, by eights
//!     for each tile of 32 queries
//!         scores [32, n_kv] = Σ channel: queries [32, channel] · scale · keys [channel, 8 at a time]
//!         weights = exp(scores - largest), and 0 for keys that a query does not see
//!         out [32, d] = Σ key: weights [32, key] · values [key, 8 at a time], over Σ weights
//! ```
//!
//! Both sums are of one kind, see `lanes`. No score is written but to the cache of its core, and keys that
//! no query of a tile sees are left out.

use std::arch::x86_64::*;
use std::ffi::{c_int, c_void};

use llama_cpp_sys_2 as sys;

use crate::custom::{node, share};
use crate::gelu::exp;
use crate::lanes::{BY, LANES, Lanes, products};
use crate::{DType, Tensor};

/// Whether sizes suit: channels by eights, and enough queries to fill a tile.
pub(crate) fn suits(q: Tensor<'_>) -> bool {
    let [d, n, ..] = q.shape();
    d.is_multiple_of(BY) && n >= LANES
}

/// [`Tensor::flash_attention`] where [`suits`] says so, on a machine that has AVX-512.
pub(crate) fn attention<'g>(
    q: Tensor<'g>,
    k: Tensor<'g>,
    v: Tensor<'g>,
    mask: Option<Tensor<'g>>,
    scale: f32,
) -> Tensor<'g> {
    let [d, n, n_head, _] = q.shape();
    let args: Vec<_> = [q, k, v].into_iter().chain(mask).collect();
    let scale = std::ptr::without_provenance_mut(scale.to_bits() as usize);
    // SAFETY: `compute` is for such nodes, and its `data` is the bits of a number.
    unsafe { node(DType::F32, [d, n_head, n, 1], &args, compute, scale) }
}

/// A source of the node: rows of numbers, somewhere in memory.
#[derive(Clone, Copy)]
struct Rows {
    data: *const u8,
    /// From row to row, and from head to head.
    strides: [usize; 2],
    n: usize,
    n_head: usize,
    dtype: u32,
}

impl Rows {
    /// # Safety
    /// The tensor must be live, with as much data as its sizes and strides say, as long as this is.
    unsafe fn new(tensor: &sys::ggml_tensor) -> Self {
        let [_, n, n_head, _] = tensor.ne.map(|n| n as usize);
        let [_, row, head, _] = tensor.nb;
        let data = tensor.data.cast::<u8>().cast_const();
        Self { data, strides: [row, head], n, n_head, dtype: tensor.type_ }
    }

    /// Eight numbers from a channel on.
    #[target_feature(enable = "avx512f,avx512vl,f16c")]
    fn eight(&self, head: usize, row: usize, channel: usize) -> [f32; BY] {
        assert!(head < self.n_head && row < self.n, "a row");
        let mut x = [0.0; BY];
        // SAFETY: the row is there, and channels come by eights; types are f32 and f16.
        unsafe {
            let row = self.data.add(row * self.strides[0] + head * self.strides[1]);
            let read = match self.dtype {
                sys::GGML_TYPE_F16 => _mm256_cvtph_ps(_mm_loadu_si128(row.add(2 * channel).cast())),
                _ => _mm256_loadu_ps(row.add(4 * channel).cast()),
            };
            _mm256_storeu_ps(x.as_mut_ptr(), read);
        }
        x
    }
}

/// What a thread needs for a head and a tile.
struct Scratch {
    d: usize,
    /// Keys, filled up to whole eights: eight keys' first channels, their second ones, …
    keys: Vec<[f32; BY]>,
    /// The first eight channels of all values, the second ones, …
    values: Vec<[f32; BY]>,
    /// Queries times the scale, by channel.
    queries: Vec<Lanes>,
    /// Scores, then weights, by key.
    scores: Vec<Lanes>,
    /// How many keys each query sees.
    seen: [i32; LANES],
}

impl Scratch {
    fn new(d: usize, n_kv: usize) -> Self {
        let padded = n_kv.next_multiple_of(BY);
        Self {
            d,
            keys: vec![[0.0; BY]; padded / BY * d],
            values: vec![[0.0; BY]; d / BY * padded],
            queries: vec![Lanes::ZERO; d],
            scores: vec![Lanes::ZERO; padded],
            seen: [0; LANES],
        }
    }

    /// Takes the keys and values of a head.
    #[target_feature(enable = "avx512f,avx512vl,f16c")]
    fn take(&mut self, k: Rows, v: Rows, head: usize) {
        let (d, padded) = (self.d, self.scores.len());
        for row in 0..k.n {
            for channel in (0..d).step_by(BY) {
                let keys = &mut self.keys[row / BY * d + channel..][..BY];
                for (place, x) in keys.iter_mut().zip(k.eight(head, row, channel)) {
                    place[row % BY] = x;
                }
                self.values[channel / BY * padded + row] = v.eight(head, row, channel);
            }
        }
    }

    /// Weights of the tile's queries, and the inverse of their sums. Gives the number of keys that
    /// have any, in whole eights.
    #[target_feature(enable = "avx512f")]
    fn weigh(&mut self) -> (usize, [__m512; 2]) {
        let most = self.seen.into_iter().max().unwrap_or(0) as usize;
        let least = self.seen.into_iter().min().unwrap_or(0) as usize;
        let seen = most.next_multiple_of(BY);
        // SAFETY: reads 16 numbers each.
        let limits = unsafe {
            [&self.seen[..16], &self.seen[16..]].map(|x| _mm512_loadu_si512(x.as_ptr().cast()))
        };
        let mut largest = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
        let blocks = self.keys.chunks_exact(self.d).zip(self.scores.chunks_exact_mut(BY));
        for (b, (keys, scores)) in blocks.take(seen / BY).enumerate() {
            let sums = products(&self.queries, keys);
            for (r, (score, mut sum)) in scores.iter_mut().zip(sums).enumerate() {
                let key = b * BY + r;
                for half in 0..2 {
                    if key >= least {
                        let key = _mm512_set1_epi32(key as i32);
                        let hidden = _mm512_cmple_epi32_mask(limits[half], key);
                        let never = _mm512_set1_ps(f32::NEG_INFINITY);
                        sum[half] = _mm512_mask_mov_ps(sum[half], hidden, never);
                    }
                    largest[half] = _mm512_max_ps(largest[half], sum[half]);
                }
                score.store(sum);
            }
        }
        let mut total = [_mm512_setzero_ps(); 2];
        for score in &mut self.scores[..seen] {
            let mut weight = score.load();
            for half in 0..2 {
                weight[half] = exp(_mm512_sub_ps(weight[half], largest[half]));
                total[half] = _mm512_add_ps(total[half], weight[half]);
            }
            score.store(weight);
        }
        (seen, total.map(|total| _mm512_div_ps(_mm512_set1_ps(1.0), total)))
    }

    /// Results of the tile: eight channels from each `channel` on.
    #[target_feature(enable = "avx512f")]
    fn attend(&mut self, mut out: impl FnMut(usize, &[Lanes; BY])) {
        let (seen, scale) = self.weigh();
        let values = self.values.chunks_exact(self.scores.len());
        for (values, channel) in values.zip((0..self.d).step_by(BY)) {
            let sums = products(&self.scores[..seen], &values[..seen]);
            let mut results = [Lanes::ZERO; BY];
            for (result, sum) in results.iter_mut().zip(sums) {
                result.store([_mm512_mul_ps(sum[0], scale[0]), _mm512_mul_ps(sum[1], scale[1])]);
            }
            out(channel, &results);
        }
    }
}

/// Computes heads of tiles of the node.
extern "C" fn compute(to: *mut sys::ggml_tensor, i: c_int, n_thread: c_int, scale: *mut c_void) {
    let scale = f32::from_bits(scale.addr() as u32);
    // SAFETY: `attention` made the node, whose first sources are queries, keys and values, live and
    // of the sizes that `Tensor::flash_attention` asserted.
    let (to, [q, k, v], mask) = unsafe {
        let to = &*to;
        let rows = [0, 1, 2].map(|i| Rows::new(&*to.src[i]));
        (to, rows, to.src[3].as_ref())
    };
    let (d, n_head) = (to.ne[0] as usize, q.n_head);
    // SAFETY: a mask is contiguous f16, `[n_kv, n]`.
    let mask = mask.map(|mask| unsafe {
        std::slice::from_raw_parts(mask.data.cast::<u16>().cast_const(), k.n * q.n)
    });
    // A mask shows the first keys and hides the others.
    let seen = |row: usize| match mask {
        Some(mask) => mask[row * k.n..][..k.n].partition_point(|shown| *shown == 0),
        None => k.n,
    };
    let out = to.data.cast::<f32>();
    let n_tile = q.n.div_ceil(LANES);
    let mut scratch = Scratch::new(d, k.n);
    let mut taken = None;
    for at in share(n_head * n_tile, i, n_thread) {
        let (head, first) = (at / n_tile, at % n_tile * LANES);
        let head_kv = head / (n_head / k.n_head);
        let rows = LANES.min(q.n - first);
        for lane in 0..LANES {
            scratch.seen[lane] = seen(first + lane.min(rows - 1)) as i32;
        }
        // SAFETY: `custom::node` asserted the instructions. Only this thread writes this head of these rows
        // of the node's `[d, n_head, n]`.
        unsafe {
            if taken != Some(head_kv) {
                scratch.take(k, v, head_kv);
                taken = Some(head_kv);
            }
            for (lane, channel) in (0..rows).flat_map(|l| (0..d).step_by(BY).map(move |c| (l, c))) {
                let x = q.eight(head, first + lane, channel);
                let places = &mut scratch.queries[channel..][..BY];
                places.iter_mut().zip(x).for_each(|(place, x)| place.0[lane] = x * scale);
            }
            scratch.attend(|channel, results| {
                for lane in 0..rows {
                    let to = out.add(((first + lane) * n_head + head) * d + channel);
                    to.cast::<[f32; BY]>().write(results.each_ref().map(|result| result.0[lane]));
                }
            });
        }
    }
}
