//! GELU in its exact form, and the exponential that it is made of.

use super::simd::{Op, Simd};
use crate::DType;
use crate::builder::Tensor;
use crate::custom::{self, Job};

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

#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, coefficients: [f32; N]) -> S::F {
    let mut sum = s.splat(coefficients[N - 1]);
    for i in (0..N - 1).rev() {
        sum = s.mul_add(sum, x, s.splat(coefficients[i]));
    }
    sum
}

/// `exp(x)` of numbers below 88; that of -inf is 0.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.splat(-110.0), x); // NaN stays NaN
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln(2) in two numbers.
    let r = s.neg_mul_add(n, s.splat(std::f32::consts::LN_2), x);
    let r = s.neg_mul_add(n, s.splat(-1.904_654_3e-9), r);
    let one = s.add(s.splat(1.0), r);
    let y = s.mul_add(polynomial(s, r, EXP), s.mul(r, r), one);
    s.scale_by_power(y, n)
}

/// `x · (1 + erf(x / √2)) / 2`, of which the second factor is `erfc(|x| / √2)`, or 2 less that.
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let t = s.mul(s.abs(x), s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let near = s.min(s.splat(6.0), t);
    let exponent = s.neg_mul_add(t, t, s.mul(near, polynomial(s, near, ERFC)));
    let erfc = exp(s, exponent);
    let factor = s.select_positive(x, s.sub(s.splat(2.0), erfc), erfc);
    s.mul(s.mul(x, s.splat(0.5)), factor)
}

/// GELU of contiguous f32.
pub(crate) fn gelu_erf<S: Simd>(s: S, x: Tensor<'_>) -> Tensor<'_> {
    // SAFETY: `compute` is for nodes of this shape, with this source.
    unsafe { custom::node(DType::F32, x.shape(), &[x], move |job| compute(s, job)) }
}

fn compute<S: Simd>(s: S, job: &Job) {
    let n: usize = job.shape().iter().product();
    let vectors = job.thread_range(n.div_ceil(S::LANES));
    let range = vectors.start * S::LANES..n.min(vectors.end * S::LANES);
    // SAFETY: node and source are contiguous f32 of as many elements, and each thread writes its own.
    let (from, to) = unsafe {
        let to = job.out::<f32>().add(range.start);
        (&job.slice::<f32>(0, n)[range.clone()], std::slice::from_raw_parts_mut(to, range.len()))
    };
    s.vectorize(Gelu { from, to });
}

/// Writes the GELU of all numbers.
struct Gelu<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
}

impl<S: Simd> Op<S> for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (from, to) = (self.from.chunks_exact(S::LANES), self.to.chunks_exact_mut(S::LANES));
        let (last, mut whole) = (from.remainder(), [0.0; MAX_LANES]);
        let whole = &mut whole[..S::LANES];
        let mut to = to;
        for (from, to) in from.zip(&mut to) {
            s.store(gelu(s, s.load(from)), to);
        }
        whole[..last.len()].copy_from_slice(last);
        let results = gelu(s, s.load(whole));
        s.store(results, whole);
        to.into_remainder().copy_from_slice(&whole[..last.len()]);
    }
}

/// No vector has more elements.
const MAX_LANES: usize = 16;
