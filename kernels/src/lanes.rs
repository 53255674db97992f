//! Sums of products in f32 on AVX-512: 32 lanes, each times the same eight numbers.

use std::arch::x86_64::*;

/// Numbers that lie side by side in two vectors.
pub(crate) const LANES: usize = 32;
/// Numbers that they are multiplied by at once.
pub(crate) const BY: usize = 8;

/// A number for each lane.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub [f32; LANES]);

impl Lanes {
    pub const ZERO: Self = Self([0.0; LANES]);

    #[target_feature(enable = "avx512f")]
    pub fn load(&self) -> [__m512; 2] {
        // SAFETY: reads 16 numbers each, which are aligned.
        unsafe { [_mm512_load_ps(self.0.as_ptr()), _mm512_load_ps(self.0[16..].as_ptr())] }
    }

    #[target_feature(enable = "avx512f")]
    pub fn store(&mut self, x: [__m512; 2]) {
        // SAFETY: writes 16 numbers each, which are aligned.
        unsafe {
            _mm512_store_ps(self.0.as_mut_ptr(), x[0]);
            _mm512_store_ps(self.0[16..].as_mut_ptr(), x[1]);
        }
    }
}

/// `Σ lanes[i] · by[i][r]` for each of eight `r`: 16 vectors of sums, which stay in registers.
#[target_feature(enable = "avx512f")]
pub(crate) fn products(lanes: &[Lanes], by: &[[f32; BY]]) -> [[__m512; 2]; BY] {
    let mut sums = [[_mm512_setzero_ps(); 2]; BY];
    for (lanes, by) in lanes.iter().zip(by) {
        let [a, b] = lanes.load();
        for (sum, x) in sums.iter_mut().zip(by) {
            let x = _mm512_set1_ps(*x);
            *sum = [_mm512_fmadd_ps(a, x, sum[0]), _mm512_fmadd_ps(b, x, sum[1])];
        }
    }
    sums
}
