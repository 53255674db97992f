//! What the towers, the projector and the Llama share.

use openvla_kernels::{Builder, DType, State, Tensor, Weight, Weights, shape};

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

    /// Its matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        g.weight(&self.weight).mul_mat(x) + g.weight(&self.bias)
    }
}

/// Matrices `[n_in, n_i]` that are multiplied by the same rows: in as few products as their types and
/// places in memory allow.
pub(crate) struct Products<const N: usize> {
    /// Each with the number of matrices that it is made of.
    stacks: Vec<(Weight, usize)>,
    /// The rows of each matrix.
    rows: [usize; N],
}

impl<const N: usize> Products<N> {
    pub fn new(matrices: &[Weight; N]) -> Self {
        let (mut stacks, mut start) = (Vec::new(), 0);
        while start < N {
            let stack = |end| {
                let parts: Vec<_> = matrices[start..end].iter().collect();
                Some((Weight::stacked(&parts)?, end - start))
            };
            let stack = (start + 2..=N).rev().find_map(stack);
            let (weight, n) = stack.unwrap_or_else(|| (matrices[start].clone(), 1));
            stacks.push((weight, n));
            start += n;
        }
        Self { stacks, rows: matrices.each_ref().map(|matrix| matrix.shape()[1]) }
    }

    /// `x [n_in, n] → [n_i, n]`, with gaps between rows.
    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> [Tensor<'g>; N] {
        let mut rows = self.rows.iter();
        let products = self.stacks.iter().flat_map(|(weight, n)| {
            let (product, mut start) = (g.weight(weight).mul_mat(x), 0);
            let slices = rows.by_ref().take(*n).map(move |rows| {
                start += rows;
                if *n == 1 { product } else { product.slice(0, start - rows, *rows) }
            });
            slices.collect::<Vec<_>>()
        });
        let products: Vec<_> = products.collect();
        products.try_into().unwrap_or_else(|_| unreachable!("one for each matrix"))
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
        self.scaled(g, x) + g.weight(&self.bias)
    }

    /// Without its bias.
    fn scaled<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        x.norm(self.eps) * g.weight(&self.weight)
    }
}

/// A LayerNorm and the linear layer that alone reads it: `x [n_in, n] → W·norm(x) + b [n_out, n]`
pub(crate) struct NormedLinear {
    norm: LayerNorm,
    linear: Linear,
    /// Of the joint bias: where it is, and its first element.
    joint: Option<(State, usize)>,
}

impl NormedLinear {
    /// [`LayerNorm::load`] and [`Linear::load`].
    pub fn load(
        w: &mut Weights,
        [norm, linear]: [&str; 2],
        [n_in, n_out]: [usize; 2],
        eps: f32,
    ) -> Result<Self> {
        let norm = LayerNorm::load(w, norm, n_in, eps)?;
        Ok(Self { norm, linear: Linear::load(w, linear, n_in, n_out)?, joint: None })
    }

    /// The matrix' type.
    pub fn dtype(&self) -> DType {
        self.linear.weight.dtype()
    }

    /// Elements of its bias.
    pub fn n_out(&self) -> usize {
        self.linear.weight.shape()[1]
    }

    /// What LayerNorm's bias becomes behind the matrix, with the linear layer's own: a sum less in every pass.
    pub fn joint_bias<'g>(&self, g: &'g Builder) -> Tensor<'g> {
        let [weight, bias, beta] = [&self.linear.weight, &self.linear.bias, &self.norm.bias]
            .map(|weight| g.weight(weight));
        weight.mul_mat(beta) + bias
    }

    /// From now on takes its joint bias from `biases`, where it begins at `start`.
    pub fn join(&mut self, biases: &State, start: usize) {
        self.joint = Some((biases.clone(), start));
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        let Some((biases, start)) = &self.joint else {
            return self.linear.build(g, self.norm.build(g, x));
        };
        let bias = g.state(biases).slice(0, *start, self.n_out());
        g.weight(&self.linear.weight).mul_mat(self.norm.scaled(g, x)) + bias
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
