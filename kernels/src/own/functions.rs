//! Functions of single elements: GELU in its exact form and SwiGLU, with the exponential that both are made of.
//!
//! A product of packed weights computes the results that it is multiplied by while it quantizes them; where nothing
//! else reads them, no tensor holds them.

use super::activations::DEPTH;
use super::simd::{Op, Simd};
use crate::DType;
use crate::builder::Tensor;
use crate::custom::{self, Job};

/// What is computed of elements that are at the same place in one or two tensors.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Function {
    /// `x · (1 + erf(x / √2)) / 2`
    Gelu,
    /// `gate / (1 + exp(-gate)) · up`
    SwiGlu,
}

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

/// `gate / (1 + exp(-gate)) · up`, from `exp(-|gate|)`, which is never too large. What is not finite stays so.
#[inline(always)]
fn swiglu<S: Simd>(s: S, gate: S::F, up: S::F) -> S::F {
    let (one, e) = (s.splat(1.0), exp(s, s.sub(s.zero(), s.abs(gate))));
    let silu = s.div(s.mul(gate, s.select_positive(gate, one, e)), s.add(one, e));
    s.mul(silu, up)
}

/// A node of the function's values: of f32 tensors of one shape, whose rows have no gaps.
pub(crate) fn node<'g, S: Simd>(s: S, function: Function, operands: &[Tensor<'g>]) -> Tensor<'g> {
    let shape = operands[0].shape();
    // SAFETY: `compute` is for nodes of this shape, with such sources.
    unsafe { custom::node(DType::F32, shape, operands, move |job| compute(s, function, job)) }
}

fn compute<S: Simd>(s: S, function: Function, job: &Job) {
    let [k, rest @ ..] = job.shape();
    let n_slab = k.div_ceil(DEPTH);
    for at in job.thread_range(n_slab * rest.iter().product::<usize>()) {
        let (row, start) = (at / n_slab, at % n_slab * DEPTH);
        let n = DEPTH.min(k - start);
        // SAFETY: the node is contiguous f32, and these elements are this thread's.
        let to =
            unsafe { std::slice::from_raw_parts_mut(job.out::<f32>().add(row * k + start), n) };
        apply(s, function, job, row, start, to);
    }
}

/// Writes the function's values for elements of a row from `start` on.
///
/// # Panics
/// If they are not in the row.
pub(crate) fn apply<S: Simd>(
    s: S,
    function: Function,
    job: &Job,
    row: usize,
    start: usize,
    to: &mut [f32],
) {
    // SAFETY: `node` and `product` have the functions of f32 tensors whose rows have no gaps.
    let of = |i| unsafe { &job.row::<f32>(i, row)[start..start + to.len()] };
    let last = match function {
        Function::Gelu => 0,
        Function::SwiGlu => 1,
    };
    s.vectorize(Apply { function, operands: [of(0), of(last)], to });
}

/// Writes the function's values of all numbers. A function of one operand has it twice.
struct Apply<'a> {
    function: Function,
    operands: [&'a [f32]; 2],
    to: &'a mut [f32],
}

impl<S: Simd> Op<S> for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { function, operands: [x, y], to } = self;
        // A function, since a closure would not be inlined, and its vectors would go through memory.
        #[inline(always)]
        fn value<S: Simd>(s: S, function: Function, x: &[f32], y: &[f32]) -> S::F {
            match function {
                Function::Gelu => gelu(s, s.load(x)),
                Function::SwiGlu => swiglu(s, s.load(x), s.load(y)),
            }
        }
        let whole = to.len() / S::LANES * S::LANES;
        let operands = x.chunks_exact(S::LANES).zip(y.chunks_exact(S::LANES));
        for ((x, y), to) in operands.zip(to.chunks_exact_mut(S::LANES)) {
            s.store(value(s, function, x, y), to);
        }
        let (x, y, to) = (&x[whole..], &y[whole..], &mut to[whole..]);
        let [mut a, mut b] = [[0.0; MAX_LANES]; 2];
        a[..x.len()].copy_from_slice(x);
        b[..y.len()].copy_from_slice(y);
        let last = value(s, function, &a[..S::LANES], &b[..S::LANES]);
        s.store(last, &mut a[..S::LANES]);
        to.copy_from_slice(&a[..to.len()]);
    }
}

/// No vector has more elements.
const MAX_LANES: usize = 16;
