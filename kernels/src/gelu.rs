//! GELU in its exact form on AVX-512, and the exponential that it is made of.

use std::arch::x86_64::*;
use std::ffi::{c_int, c_void};

use llama_cpp_sys_2 as sys;

use crate::custom::{node, share};
use crate::{DType, Tensor};

/// `(exp(r) - 1 - r) / r²` for `|r| <= ln(2) / 2`, to 3e-9: a polynomial of least largest error.
const EXP: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_712, 0.001_381_462_7];

/// `ln(erfc(t) · exp(t²)) / t` for `0 <= t <= 6`, such that erfc is right to 2e-8: likewise.
const ERFC: [f32; 9] = [
    -1.128_380_5,
    0.363_406_6,
    -0.102_939_07,
    0.019_615_505,
    -0.000_541_667_34,
    -0.001_072_001_8,
    0.000_352_418_17,
    -4.954_133e-5,
    2.671_993e-6,
];

#[target_feature(enable = "avx512f")]
fn polynomial<const N: usize>(x: __m512, of: [f32; N]) -> __m512 {
    let powers = of.into_iter().map(|c| _mm512_set1_ps(c)).rev();
    powers.reduce(|sum, c| _mm512_fmadd_ps(sum, x, c)).expect("a polynomial has a term")
}

/// `exp(x)` of numbers below 88; that of -inf is 0.
#[target_feature(enable = "avx512f")]
pub(crate) fn exp(x: __m512) -> __m512 {
    // What is NaN stays so.
    let x = _mm512_max_ps(_mm512_set1_ps(-110.0), x);
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    // ln(2) in two numbers.
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(std::f32::consts::LN_2), x);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.904_654_3e-9), r);
    let one = _mm512_add_ps(_mm512_set1_ps(1.0), r);
    let y = _mm512_fmadd_ps(polynomial(r, EXP), _mm512_mul_ps(r, r), one);
    _mm512_scalef_ps(y, n)
}

/// `x · (1 + erf(x / √2)) / 2`, of which the second factor is `erfc(|x| / √2)`, or 2 less that.
#[target_feature(enable = "avx512f")]
fn gelu(x: __m512) -> __m512 {
    let t = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(std::f32::consts::FRAC_1_SQRT_2));
    let near = _mm512_min_ps(_mm512_set1_ps(6.0), t);
    let exponent = _mm512_fnmadd_ps(t, t, _mm512_mul_ps(near, polynomial(near, ERFC)));
    let erfc = exp(exponent);
    let is_positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_setzero_ps());
    let factor = _mm512_mask_sub_ps(erfc, is_positive, _mm512_set1_ps(2.0), erfc);
    _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5)), factor)
}

/// GELU of contiguous f32, on a machine that has AVX-512.
pub(crate) fn gelu_erf(x: Tensor<'_>) -> Tensor<'_> {
    // SAFETY: `compute` is for nodes of this shape, with this source.
    unsafe { node(DType::F32, x.shape(), &[x], compute, std::ptr::null_mut()) }
}

/// Numbers that a thread takes together.
const PIECE: usize = 16;

extern "C" fn compute(to: *mut sys::ggml_tensor, i: c_int, n_thread: c_int, _: *mut c_void) {
    // SAFETY: `gelu_erf` made the node; node and source are contiguous f32 of as many elements, and
    // each thread writes its own share. `custom::node` asserted the instructions.
    unsafe {
        let (to, from) = (&*to, &*(*to).src[0]);
        let n = sys::ggml_nelements(to) as usize;
        let (to, from) = (to.data.cast::<f32>(), from.data.cast::<f32>());
        for at in share(n.div_ceil(PIECE), i, n_thread).map(|piece| piece * PIECE) {
            let mask = u16::MAX >> (PIECE - (n - at).min(PIECE));
            let x = _mm512_maskz_loadu_ps(mask, from.add(at));
            _mm512_mask_storeu_ps(to.add(at), mask, gelu(x));
        }
    }
}
