//! What the towers, the projector and the Llama share.

use openvla_kernels::{Builder, Tensor, Weight, Weights, shape};

use crate::Result;

/// `x [n_in, n] → W·x + b [n_out, n]`
pub(crate) struct Linear {
    weight: Weight,
    bias: Weight,
}

impl Linear {
    /// `NAME.weight [n_in, n_out]` of any type and `NAME.bias [n_out]` in f32.
    pub fn load(w: &mut Weights, name: &str, n_in: usize, n_out: usize) -> Result<Self> {
        Ok(Self {
            weight: w.take(&format!("{name}.weight"), shape(&[n_in, n_out]))?,
            bias: w.take_f32(&format!("{name}.bias"), shape(&[n_out]))?,
        })
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        g.weight(&self.weight).mul_mat(x) + g.weight(&self.bias)
    }
}

/// LayerNorm with its affine part, over rows `[dim, n]`.
pub(crate) struct LayerNorm {
    weight: Weight,
    bias: Weight,
    eps: f32,
}

impl LayerNorm {
    /// `NAME.weight` and `NAME.bias`, both `[dim]` in f32.
    pub fn load(w: &mut Weights, name: &str, dim: usize, eps: f32) -> Result<Self> {
        Ok(Self {
            weight: w.take_f32(&format!("{name}.weight"), shape(&[dim]))?,
            bias: w.take_f32(&format!("{name}.bias"), shape(&[dim]))?,
            eps,
        })
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        x.norm(self.eps) * g.weight(&self.weight) + g.weight(&self.bias)
    }
}

/// RMSNorm with its scale, over rows `[dim, n]`.
pub(crate) struct RmsNorm {
    weight: Weight,
    eps: f32,
}

impl RmsNorm {
    /// `NAME.weight [dim]` in f32.
    pub fn load(w: &mut Weights, name: &str, dim: usize, eps: f32) -> Result<Self> {
        Ok(Self { weight: w.take_f32(&format!("{name}.weight"), shape(&[dim]))?, eps })
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        x.rms_norm(self.eps) * g.weight(&self.weight)
    }
}
