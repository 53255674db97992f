//! Sums of products in f32: a row in each lane, times the same few numbers.

use super::simd::{MAX_NR, Simd};

/// `Σ i: lanes[i] · by[i][r]` for each `r` below `NR`, which stay in registers. `by` has `NR` numbers for each `i`.
#[inline(always)]
pub(crate) fn products<S: Simd>(s: S, lanes: &[[S::F; 2]], by: &[f32]) -> [[S::F; 2]; MAX_NR] {
    let mut sums = [[s.zero(); 2]; MAX_NR];
    for (lanes, by) in lanes.iter().zip(by.chunks_exact(S::NR)) {
        for r in 0..S::NR {
            let x = s.splat(by[r]);
            sums[r] = [s.mul_add(lanes[0], x, sums[r][0]), s.mul_add(lanes[1], x, sums[r][1])];
        }
    }
    sums
}
