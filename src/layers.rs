//! What the towers, the projector and the Llama share.

use openvla_kernels::{Builder, State, Tensor, Weight, Weights, shape};

use crate::Result;

/// `x [n_in, n] → W·x + b [n_out, n]`
pub(crate) struct Linear {
    weight: Weight,
    bias: Weight,
    joint: Option<Joint>,
}

/// A bias with what else is constant behind its matrix: where it is, and its first element.
type Joint = (State, usize);

impl Linear {
    /// `NAME.weight [n_in, n_out]` of any type and `NAME.bias [n_out]` in f32.
    pub fn load(w: &mut Weights, name: &str, n_in: usize, n_out: usize) -> Result<Self> {
        Ok(Self {
            weight: w.take(&format!("{name}.weight"), shape(&[n_in, n_out]))?,
            bias: w.take_f32(&format!("{name}.bias"), shape(&[n_out]))?,
            joint: None,
        })
    }

    /// Its matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Elements of its bias.
    pub fn n_out(&self) -> usize {
        self.weight.shape()[1]
    }

    /// From now on takes its bias from `biases`, where it begins at `start`: a [`JointBias`].
    pub fn join(&mut self, biases: &State, start: usize) {
        self.joint = Some((biases.clone(), start));
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        self.product(g, x) + self.bias(g)
    }

    /// Without its bias.
    fn product<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        g.weight(&self.weight).mul_mat(x)
    }

    fn bias<'g>(&self, g: &'g Builder) -> Tensor<'g> {
        match &self.joint {
            Some((biases, start)) => g.state(biases).slice(0, *start, self.n_out()),
            None => g.weight(&self.bias),
        }
    }
}

/// A linear layer with a neighbor whose constant part may become part of its bias: a sum or a product less in every
/// pass.
pub(crate) trait JointBias {
    /// The linear layer.
    fn linear(&mut self) -> &mut Linear;

    /// What its bias becomes, `[n_out]`.
    fn joint_bias<'g>(&self, g: &'g Builder) -> Tensor<'g>;
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

    /// What is multiplied: each is one of them or several.
    pub fn matrices(&self) -> impl Iterator<Item = &Weight> {
        self.stacks.iter().map(|(weight, _)| weight)
    }

    /// Whether they are more than one product.
    pub fn is_several(&self) -> bool {
        self.stacks.len() > 1
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
        Ok(Self { norm, linear: Linear::load(w, linear, n_in, n_out)? })
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        let normed = match self.linear.joint {
            Some(_) => self.norm.scaled(g, x),
            None => self.norm.build(g, x),
        };
        self.linear.build(g, normed)
    }
}

impl JointBias for NormedLinear {
    fn linear(&mut self) -> &mut Linear {
        &mut self.linear
    }

    /// With LayerNorm's bias behind the matrix.
    fn joint_bias<'g>(&self, g: &'g Builder) -> Tensor<'g> {
        let beta = g.weight(&self.norm.bias);
        self.linear.product(g, beta) + g.weight(&self.linear.bias)
    }
}

/// The linear layer at the end of a branch, LayerScale if there is one, and the sum with what the branch began with:
/// `x [n_in, n], residual [n_out, n] → residual + scale·(W·x + b) [n_out, n]`
pub(crate) struct ResidualLinear {
    linear: Linear,
    scale: Option<Weight>,
}

impl ResidualLinear {
    pub fn new(linear: Linear, scale: Option<Weight>) -> Self {
        Self { linear, scale }
    }

    /// Whether there is a neighbor that may be joined with the bias.
    pub fn is_scaled(&self) -> bool {
        self.scale.is_some()
    }

    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>, residual: Tensor<'g>) -> Tensor<'g> {
        let (product, linear) = (self.linear.product(g, x), &self.linear);
        let product = match &self.scale {
            Some(scale) if linear.joint.is_some() => product * g.weight(scale),
            Some(scale) => return residual + (product + linear.bias(g)) * g.weight(scale),
            None => product,
        };
        product.sum_with_bias(residual, linear.bias(g))
    }
}

impl JointBias for ResidualLinear {
    fn linear(&mut self) -> &mut Linear {
        &mut self.linear
    }

    /// Scaled.
    fn joint_bias<'g>(&self, g: &'g Builder) -> Tensor<'g> {
        let bias = g.weight(&self.linear.bias);
        self.scale.as_ref().map_or(bias, |scale| bias * g.weight(scale))
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
