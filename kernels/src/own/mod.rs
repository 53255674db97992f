//! Our own kernels for a CPU: four calls, each of which returns `None` where ggml's kernel is to be taken.
//!
//! | file | what is in it |
//! |---|---|
//! | `simd` | what kernels need of an instruction set: the trait that they are generic over |
//! | `avx512`, `avx2`, `neon` | one file for each instruction set, with its proof that the CPU has it |
//! | `isa` | which of them this CPU has |
//! | `format`, `unpack` | quantized types: how their blocks are unpacked |
//! | `activations` | activations in 8 bits |
//! | `pack` | weights in panels, when a model is loaded |
//! | `tile` | the product of a panel and some columns |
//! | `product` | the product of a matrix: its two nodes, and what each thread does |
//! | `lanes`, `floats` | products in f32 |
//! | `functions` | GELU and SwiGLU |
//! | `attention` | attention of many queries |

pub(crate) mod activations;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod floats;
mod format;
pub(crate) mod functions;
pub(crate) mod isa;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod pack;
mod product;
mod simd;
mod tile;
mod unpack;

use crate::builder::Tensor;
use functions::Function;
use isa::Task;
use simd::Simd;

/// `weight [k, m] · x [k, …]`, contiguous: if the weight is packed, or it has floats and `x` many columns.
pub(crate) fn mul_mat<'g>(weight: Tensor<'g>, x: Tensor<'g>) -> Option<Tensor<'g>> {
    struct MulMat<'g>(Tensor<'g>, Tensor<'g>);

    impl<'g> Task for MulMat<'g> {
        type Output = Tensor<'g>;

        fn run<S: Simd>(self, s: S) -> Tensor<'g> {
            let Self(weight, x) = self;
            if weight.is_packed_weight() {
                product::mul_mat(s, weight, x)
            } else {
                floats::mul_mat(s, weight, x)
            }
        }
    }

    let isa = if weight.is_packed_weight() {
        weight.builder.isa_of_weights()
    } else {
        weight.builder.isa().filter(|_| floats::suits(weight, x))
    };
    isa.map(|isa| isa.dispatch(MulMat(weight, x)))
}

/// GELU in its exact form, of rows of f32 without gaps.
pub(crate) fn gelu_erf(x: Tensor<'_>) -> Option<Tensor<'_>> {
    function(Function::Gelu, &[x])
}

/// `silu(gate) · up`, of rows of f32 without gaps.
pub(crate) fn swiglu<'g>(gate: Tensor<'g>, up: Tensor<'g>) -> Option<Tensor<'g>> {
    function(Function::SwiGlu, &[gate, up])
}

fn function<'g>(function: Function, operands: &[Tensor<'g>]) -> Option<Tensor<'g>> {
    struct Apply<'a, 'g>(Function, &'a [Tensor<'g>]);

    impl<'g> Task for Apply<'_, 'g> {
        type Output = Tensor<'g>;

        fn run<S: Simd>(self, s: S) -> Tensor<'g> {
            functions::node(s, self.0, self.1)
        }
    }

    let builder = operands[0].builder;
    let values = builder.isa()?.dispatch(Apply(function, operands));
    builder.activations.borrow_mut().note_function(values, function, operands);
    Some(values)
}

/// Attention of many queries, as [`Tensor::flash_attention`] says.
pub(crate) fn attention<'g>(
    [q, k, v]: [Tensor<'g>; 3],
    mask: Option<Tensor<'g>>,
    scale: f32,
) -> Option<Tensor<'g>> {
    struct Attention<'g>([Tensor<'g>; 3], Option<Tensor<'g>>, f32);

    impl<'g> Task for Attention<'g> {
        type Output = Tensor<'g>;

        fn run<S: Simd>(self, s: S) -> Tensor<'g> {
            let Self(qkv, mask, scale) = self;
            attention::attention(s, qkv, mask, scale)
        }
    }

    let isa = q.builder.isa().filter(|_| attention::suits(q));
    isa.map(|isa| isa.dispatch(Attention([q, k, v], mask, scale)))
}
