//! Parts of the model in plain f64, row by row, with the weights of a case.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use crate::subject::Case;

/// A linear layer of the file on one row, in f64.
pub fn linear(case: &Case, name: &str, x: &[f64]) -> Vec<f64> {
    let (weight, bias) = (case.data(&format!("{name}.weight")), case.data(&format!("{name}.bias")));
    let row = |(row, bias): (&[f32], &f32)| {
        row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>() + f64::from(*bias)
    };
    weight.chunks(x.len()).zip(bias).map(row).collect()
}

/// `x/2 · (1 + erf(x/√2))`, the error function by its series of positive terms.
pub fn gelu(x: f64) -> f64 {
    let t = (x * FRAC_1_SQRT_2).min(6.0);
    if t < -6.0 {
        return 0.0;
    }
    let mut term = t * FRAC_2_SQRT_PI * (-t * t).exp();
    let mut erf = term;
    for n in 1..200 {
        term *= 2.0 * t * t / f64::from(2 * n + 1);
        erf += term;
    }
    0.5 * x * (1.0 + erf)
}

/// The form that many engines use instead.
pub fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + (FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (x + 0.044715 * x.powi(3))).tanh())
}

/// LayerNorm of the file on one row.
pub fn layer_norm(case: &Case, name: &str, x: &[f64], eps: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + eps).sqrt();
    let (weight, bias) = (case.data(&format!("{name}.weight")), case.data(&format!("{name}.bias")));
    let affine = weight.iter().zip(bias).map(|(w, b)| (f64::from(*w), f64::from(*b)));
    x.iter().zip(affine).map(|(x, (w, b))| (x - mean) / deviation * w + b).collect()
}

/// The largest of some differences; NaN is the largest of all.
pub fn worst(differences: impl Iterator<Item = f64>) -> f64 {
    differences.map(f64::abs).max_by(f64::total_cmp).expect("some")
}

/// How far a stage is from what was computed by hand, patch by patch.
pub fn off(got: &[f32], want: impl Iterator<Item = Vec<f64>>) -> f64 {
    let want: Vec<f64> = want.flatten().collect();
    assert_eq!(got.len(), want.len());
    worst(got.iter().zip(want).map(|(got, want)| f64::from(*got) - want))
}

pub fn rows(data: &[f32], n: usize) -> impl Iterator<Item = Vec<f64>> {
    data.chunks(n).map(|row| row.iter().map(|x| f64::from(*x)).collect())
}
