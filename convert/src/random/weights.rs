//! Random weights in any type, as fast as a disk can write: quantizing is the slow part, so a pool of
//! blocks is quantized once for each type and distribution, and every matrix consists of blocks picked
//! from it.
//!
//! Means and deviations are those of the example checkpoint's tensors, so that activations stay finite
//! and logits differ. The same seed makes the same bytes with any number of threads.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::Result;
use openvla_kernels::{DType, parallel_for_each};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::model::{Segment, Tensor};
use super::normal::deviates;
use crate::interrupt;
use crate::mapper::MappedTensor;
use crate::plan::PlannedTensor;
use crate::weights::TensorSource;

/// Numbers in a pool: enough that blocks seldom repeat within a row of a matrix, and few enough to be
/// quantized quickly and to stay in a core's cache.
const POOL: usize = 1 << 18;
/// Numbers that are picked at a time, unless a type's blocks are longer.
const PICK: usize = 32;
/// Picks that one thread makes from one stream of random words.
const PICKS_AT_A_TIME: usize = 1 << 16;

/// The weights of a random checkpoint that is never written.
pub struct RandomWeights {
    /// By name.
    tensors: BTreeMap<String, Tensor>,
    deviates: Vec<f32>,
    /// The pools quantized so far.
    pools: RefCell<BTreeMap<PoolKey, Rc<[u8]>>>,
    seed: u64,
    n_threads: usize,
}

/// Type, and the bits of mean and deviation.
type PoolKey = (DType, [u32; 2]);

impl RandomWeights {
    /// Draws the numbers that the pools are made of from `seed`.
    pub fn new(tensors: Vec<Tensor>, seed: u64, n_threads: usize) -> Self {
        let tensors = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        let (deviates, pools) = (deviates(seed, 0, POOL), RefCell::default());
        Self { tensors, deviates, pools, seed, n_threads }
    }

    /// The segments of a tensor: whole rows, or single numbers if it is one row. Columns that pad a
    /// matrix are random too, since their inputs are zero.
    fn segments(&self, tensor: &MappedTensor) -> Vec<Segment> {
        let is_row = tensor.shape[1..] == [1, 1, 1];
        let length = if is_row { 1 } else { tensor.shape[0] };
        let mut skip = tensor.first_row * length;
        let mut left = tensor.shape.iter().product();
        let mut segments = Vec::new();
        for tensor in tensor.sources.iter().map(|name| &self.tensors[name]) {
            let row = if is_row { 1 } else { *tensor.shape.last().expect("not a scalar") };
            for run in &tensor.segments {
                let n = run.n / row * length;
                let skipped = n.min(skip);
                skip -= skipped;
                let n = (n - skipped).min(left);
                left -= n;
                segments.push(Segment { n, mean: run.mean, std: run.std });
            }
        }
        segments.push(Segment { n: left, mean: 0.0, std: 0.0 });
        segments.retain(|segment| segment.n > 0);
        segments
    }

    /// The pool of a type with a segment's distribution.
    fn pool(&self, dtype: DType, segment: &Segment) -> Rc<[u8]> {
        let Segment { mean, std, .. } = segment;
        let encode = || {
            let numbers: Vec<f32> = self.deviates.iter().map(|x| mean + std * x).collect();
            let mut pool = vec![0; dtype.row_bytes(POOL).expect("a power of two, as are blocks")];
            dtype.encode(&numbers, POOL, None, &mut pool);
            pool.into()
        };
        let key = (dtype, [mean, std].map(|x| x.to_bits()));
        self.pools.borrow_mut().entry(key).or_insert_with(encode).clone()
    }

    /// Fills `bytes` with picks from `pool`, of `pick` bytes each.
    fn pick(&self, stream: u64, pool: &[u8], pick: usize, bytes: &mut [u8]) -> Result<()> {
        let &Self { seed, n_threads, .. } = self;
        let chunks = bytes.chunks_mut(PICKS_AT_A_TIME * pick).enumerate();
        parallel_for_each(n_threads, chunks, |(i, chunk)| {
            interrupt::check()?;
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream);
            random.set_word_pos((i * PICKS_AT_A_TIME) as u128);
            for out in chunk.chunks_mut(pick) {
                let n = pool.len() / pick; // a power of two
                let at = random.next_u32() as usize % n * pick;
                out.copy_from_slice(&pool[at..][..out.len()]);
            }
            Ok(())
        })
    }
}

impl TensorSource for RandomWeights {
    fn fill(&self, planned: &PlannedTensor, mut bytes: &mut [u8]) -> Result<()> {
        let PlannedTensor { tensor, dtype } = planned;
        let size = |n| dtype.row_bytes(n).expect("segments are whole rows");
        let pick = size(PICK.max(dtype.block()));
        let stream = openvla::checksum(tensor.name.as_bytes()); // its own for each tensor
        for (i, segment) in (0..).zip(self.segments(tensor)) {
            let (own, others) = bytes.split_at_mut(size(segment.n));
            self.pick(stream.wrapping_add(i), &self.pool(*dtype, &segment), pick, own)?;
            bytes = others;
        }
        Ok(())
    }
}
