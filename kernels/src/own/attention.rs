//! Attention of many rows: `MR` queries at a time, each of which is a lane of two vectors.
//!
//! ```text
//! for each head                                 (threads have their ranges of heads and tiles)
//!     keys, values -> f32, interleaved by NR
//!     for each tile of MR queries
//!         scores [MR, n_kv] = Σ channel: queries [MR, channel] · scale · keys [channel, NR at a time]
//!         weights = exp(scores - largest), and 0 for keys that a query's mask hides
//!         out [MR, d] = Σ key: weights [MR, key] · values [key, NR at a time], over Σ weights
//! ```
//!
//! Both sums are of one kind, see `lanes`. Scores never leave the cache of their core, and keys that the mask
//! hides from all queries of a tile are left out.

use llama_cpp_sys_2 as sys;

use super::functions::exp;
use super::lanes::products;
use super::simd::{Op, Simd, elements, elements_mut};
use crate::DType;
use crate::builder::Tensor;
use crate::custom::{self, Job};

/// Channels that are read together.
const CHANNELS: usize = 8;
/// With fewer queries than this ggml's kernel is faster.
const MIN_QUERIES: usize = 32;

/// Whether sizes suit.
pub(crate) fn suits(q: Tensor<'_>) -> bool {
    let [d, n, ..] = q.shape();
    d.is_multiple_of(CHANNELS) && n >= MIN_QUERIES
}

/// [`Tensor::flash_attention`] where [`suits`] says so.
pub(crate) fn attention<'g, S: Simd>(
    s: S,
    [q, k, v]: [Tensor<'g>; 3],
    mask: Option<Tensor<'g>>,
    scale: f32,
) -> Tensor<'g> {
    let [d, n, n_head, _] = q.shape();
    let args: Vec<_> = [q, k, v].into_iter().chain(mask).collect();
    let shape = [d, n_head, n, 1];
    // SAFETY: `compute` is for such nodes.
    unsafe { custom::node(DType::F32, shape, &args, move |job| compute(s, job, scale)) }
}

/// A source of the node: rows of numbers, somewhere in memory.
#[derive(Clone, Copy)]
struct Rows {
    data: *const u8,
    /// From row to row, and from head to head.
    strides: [usize; 2],
    d: usize,
    n: usize,
    n_head: usize,
    dtype: u32,
}

impl Rows {
    /// # Safety
    /// The tensor must be live, with as much data as its sizes and strides say, as long as this is, and rows of
    /// f16 or f32 without gaps.
    unsafe fn new(tensor: &sys::ggml_tensor) -> Self {
        let [d, n, n_head, _] = tensor.ne.map(|n| n as usize);
        let [_, row, head, _] = tensor.nb;
        let data = tensor.data.cast::<u8>().cast_const();
        Self { data, strides: [row, head], d, n, n_head, dtype: tensor.type_ }
    }

    /// Eight numbers from a channel on.
    #[inline(always)]
    fn load8<S: Simd>(&self, s: S, head: usize, row: usize, channel: usize) -> [f32; CHANNELS] {
        let inside = head < self.n_head && row < self.n && channel + CHANNELS <= self.d;
        assert!(inside, "channels of a row");
        // SAFETY: the row and its channels are there; types are f32 and f16.
        unsafe {
            let row = self.data.add(row * self.strides[0] + head * self.strides[1]);
            if self.dtype == sys::GGML_TYPE_F16 {
                s.f16_to_f32(&row.cast::<[u16; CHANNELS]>().byte_add(2 * channel).read_unaligned())
            } else {
                row.cast::<[f32; CHANNELS]>().byte_add(4 * channel).read_unaligned()
            }
        }
    }
}

/// What a thread needs for a head and a tile.
struct Scratch<S: Simd> {
    d: usize,
    n_kv: usize,
    /// `[NR, d, n_kv / NR]`: the first channels of `NR` keys, their second ones, …; filled up with zeros.
    keys: Vec<f32>,
    /// `[NR, n_kv, d / NR]`: the first `NR` channels of all values, the second ones, …; filled up with zeros.
    values: Vec<f32>,
    /// Queries times the scale, by channel.
    queries: Vec<[S::F; 2]>,
    /// Scores, then weights, by key.
    scores: Vec<[S::F; 2]>,
    /// Each query's first key of those behind the last that the mask shows it.
    visible: Vec<i32>,
    /// Scores of keys before those that it hides.
    holes: Vec<usize>,
}

impl<S: Simd> Scratch<S> {
    fn new(s: S, d: usize, n_kv: usize) -> Self {
        let n_kv = n_kv.next_multiple_of(S::NR);
        Self {
            d,
            n_kv,
            keys: vec![0.0; n_kv * d],
            values: vec![0.0; d.next_multiple_of(S::NR) * n_kv],
            queries: vec![[s.zero(); 2]; d],
            scores: vec![[s.zero(); 2]; n_kv],
            visible: vec![0; S::MR],
            holes: Vec::new(),
        }
    }
}

/// Takes the keys and values of a head.
struct ReadHead<'a, S: Simd> {
    k: Rows,
    v: Rows,
    head: usize,
    to: &'a mut Scratch<S>,
}

impl<S: Simd> Op<S> for ReadHead<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { k, v, head, to } = self;
        for row in 0..k.n {
            for channel in (0..to.d).step_by(CHANNELS) {
                let block = &mut to.keys[(row / S::NR * to.d + channel) * S::NR..][..8 * S::NR];
                for (c, x) in k.load8(s, head, row, channel).into_iter().enumerate() {
                    block[c * S::NR + row % S::NR] = x;
                }
                for (c, x) in v.load8(s, head, row, channel).into_iter().enumerate() {
                    let channel = channel + c;
                    let at = (channel / S::NR * to.n_kv + row) * S::NR + channel % S::NR;
                    to.values[at] = x;
                }
            }
        }
    }
}

/// Takes the queries of a tile: up to `MR` rows from `first` on, times the scale.
struct ReadQueries<'a, S: Simd> {
    q: Rows,
    head: usize,
    first: usize,
    n_row: usize,
    scale: f32,
    to: &'a mut Scratch<S>,
}

impl<S: Simd> Op<S> for ReadQueries<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let to = elements_mut::<S>(&mut self.to.queries);
        for lane in 0..self.n_row {
            for channel in (0..self.q.d).step_by(CHANNELS) {
                let x = self.q.load8(s, self.head, self.first + lane, channel);
                for (c, x) in x.into_iter().enumerate() {
                    to[(channel + c) * S::MR + lane] = x * self.scale;
                }
            }
        }
    }
}

/// Turns a tile's queries into weights of the keys. Returns the number of keys that have any, a multiple of `NR`,
/// and the inverse of the weights' sums.
struct SoftmaxScores<'a, S: Simd>(&'a mut Scratch<S>);

impl<S: Simd> Op<S> for SoftmaxScores<'_, S> {
    type Output = (usize, [S::F; 2]);

    #[inline(always)]
    fn run(self, s: S) -> (usize, [S::F; 2]) {
        let Scratch { d, keys, queries, scores, visible, holes, .. } = self.0;
        let (mut least, mut most) = (visible[0], visible[0]);
        for n in &*visible {
            (least, most) = (least.min(*n), most.max(*n));
        }
        let n_key = (most as usize).next_multiple_of(S::NR);
        let limits = [0, S::LANES].map(|at| s.load_ints(&visible[at..][..S::LANES]));
        let hidden = s.splat(f32::NEG_INFINITY);
        let mut largest = [hidden; 2];
        let blocks = keys.chunks_exact(*d * S::NR).zip(scores.chunks_exact_mut(S::NR));
        for (b, (keys, scores)) in blocks.take(n_key / S::NR).enumerate() {
            let sums = products(s, queries, keys);
            for r in 0..S::NR {
                let (key, mut sum) = ((b * S::NR + r) as i32, sums[r]);
                for half in 0..2 {
                    if key >= least {
                        let key = s.splat_word(key);
                        sum[half] = s.select_at_most(limits[half], key, hidden, sum[half]);
                    }
                    largest[half] = s.max(largest[half], sum[half]);
                }
                scores[r] = sum;
            }
        }
        if !holes.is_empty() {
            let elements = elements_mut::<S>(scores);
            holes.iter().for_each(|at| elements[*at] = f32::NEG_INFINITY);
            largest = [hidden; 2];
            for score in &scores[..n_key] {
                (0..2).for_each(|half| largest[half] = s.max(largest[half], score[half]));
            }
        }
        let mut total = [s.zero(); 2];
        for score in &mut scores[..n_key] {
            for half in 0..2 {
                score[half] = exp(s, s.sub(score[half], largest[half]));
                total[half] = s.add(total[half], score[half]);
            }
        }
        (n_key, [s.div(s.splat(1.0), total[0]), s.div(s.splat(1.0), total[1])])
    }
}

/// The sum of values of `NR` channels by their weights: a vector pair for each channel.
struct WeightedValues<'a, S: Simd> {
    weights: &'a [[S::F; 2]],
    values: &'a [f32],
    scale: [S::F; 2],
    to: &'a mut [[S::F; 2]],
}

impl<S: Simd> Op<S> for WeightedValues<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let sums = products(s, self.weights, self.values);
        for (to, sum) in self.to.iter_mut().zip(sums) {
            *to = [s.mul(sum[0], self.scale[0]), s.mul(sum[1], self.scale[1])];
        }
    }
}

/// Computes heads of tiles of the node.
fn compute<S: Simd>(s: S, job: &Job, scale: f32) {
    let source = |i| job.source(i).expect("queries, keys and values");
    // SAFETY: queries, keys and values are live and of the sizes that `Tensor::flash_attention` asserted.
    let [q, k, v] = unsafe { [Rows::new(source(0)), Rows::new(source(1)), Rows::new(source(2))] };
    let ([d, n_head, ..], n_group) = (job.shape(), q.n_head / k.n_head);
    // SAFETY: a mask is contiguous f16, `[n_kv, n]`.
    let mask = job.source(3).map(|_| unsafe { job.slice::<u16>(3, k.n * q.n) });
    let shown = |row: usize| mask.map(|mask| &mask[row * k.n..][..k.n]);
    // Most masks show the first keys and hide the others.
    let end = |row| {
        shown(row).map_or(k.n, |keys| keys.iter().rposition(|x| *x == 0).map_or(0, |i| i + 1))
    };
    let has_holes = |(row, end): (usize, &usize)| {
        shown(row).is_some_and(|keys| keys[..*end].iter().any(|x| *x != 0))
    };
    let ends: Vec<usize> = (0..q.n).map(end).collect();
    let with_holes: Vec<bool> = ends.iter().enumerate().map(has_holes).collect();
    let n_tile = q.n.div_ceil(S::MR);
    let mut scratch = Scratch::new(s, d, k.n);
    let mut results = vec![[s.zero(); 2]; S::NR];
    let mut head_in_scratch = None;
    for at in job.thread_range(n_head * n_tile) {
        let (head, first) = (at / n_tile, at % n_tile * S::MR);
        let n_row = S::MR.min(q.n - first);
        if head_in_scratch != Some(head / n_group) {
            s.vectorize(ReadHead { k, v, head: head / n_group, to: &mut scratch });
            head_in_scratch = Some(head / n_group);
        }
        scratch.holes.clear();
        for lane in 0..S::MR {
            let row = first + lane.min(n_row - 1);
            scratch.visible[lane] = ends[row] as i32;
            if let Some(keys) = shown(row).filter(|_| with_holes[row]) {
                let hidden = (0..ends[row]).filter(|key| keys[*key] != 0);
                scratch.holes.extend(hidden.map(|key| key * S::MR + lane));
            }
        }
        s.vectorize(ReadQueries { q, head, first, n_row, scale, to: &mut scratch });
        let (n_key, scale) = s.vectorize(SoftmaxScores(&mut scratch));
        let weights = &scratch.scores[..n_key];
        let blocks = scratch.values.chunks_exact(scratch.n_kv * S::NR);
        for (values, channel) in blocks.zip((0..d).step_by(S::NR)) {
            let values = &values[..n_key * S::NR];
            s.vectorize(WeightedValues { weights, values, scale, to: &mut results });
            let results = elements::<S>(&results);
            for lane in 0..n_row {
                for c in 0..S::NR.min(d - channel) {
                    // SAFETY: only this thread writes this head of these rows of the node's `[d, n_head, n]`.
                    unsafe {
                        let to = job.out::<f32>().add(((first + lane) * n_head + head) * d);
                        to.add(channel + c).write(results[c * S::MR + lane]);
                    }
                }
            }
        }
    }
}
