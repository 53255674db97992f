//! Activations as our products take them.

use std::collections::BTreeMap;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::functions::Function;
use super::simd::{Op, Simd};
use crate::builder::Tensor;

type Raw = NonNull<sys::ggml_tensor>;

/// What a graph's builder knows of activations.
#[derive(Default)]
pub(crate) struct Activations {
    /// The node that packs a node in some way.
    packed: BTreeMap<(Raw, PackedActivations), Raw>,
    /// What nodes are a function of.
    functions: BTreeMap<Raw, (Function, Vec<Raw>)>,
}

impl Activations {
    /// `x`, packed: by `make`, unless that was made before and `x` cannot have changed since.
    pub fn packed_once<'g>(
        &mut self,
        x: Tensor<'g>,
        how: PackedActivations,
        make: impl FnOnce() -> Tensor<'g>,
    ) -> Tensor<'g> {
        if x.is_leaf() {
            return make();
        }
        let raw = *self.packed.entry((x.raw, how)).or_insert_with(|| make().raw);
        Tensor { raw, ..x }
    }

    /// `values` is this function of these operands.
    pub fn note_function(&mut self, values: Tensor<'_>, function: Function, of: &[Tensor<'_>]) {
        let operands = of.iter().map(|operand| operand.raw).collect();
        self.functions.insert(values.raw, (function, operands));
    }

    /// What `x` is a function of, if its values may as well be computed where they are needed: nobody asked for them
    /// as an output, and the operands cannot change.
    pub fn function_of<'g>(&self, x: Tensor<'g>) -> Option<(Function, Vec<Tensor<'g>>)> {
        let (function, operands) = self.functions.get(&x.raw)?;
        let operands: Vec<_> = operands.iter().map(|raw| Tensor { raw: *raw, ..x }).collect();
        let may_change = x.is_leaf() || operands.iter().any(|operand| operand.is_leaf());
        (!may_change && !x.is_output()).then_some((*function, operands))
    }
}

/// Numbers of a row that are unpacked and multiplied together: the longest block of any type.
pub(crate) const DEPTH: usize = 256;

/// How activations are quantized to 8 bits: as ggml does for a type of weights on x86-64. On aarch64 it rounds a few of
/// them otherwise.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ActivationQuant {
    /// One scale in f32 for 256 numbers.
    Q8K,
    /// One scale in f16 for 32 numbers.
    Q8_0,
}

/// How a node's numbers are packed for products.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PackedActivations {
    /// To [`Column`]s, those of a function's values without the values.
    Quantized(ActivationQuant, Option<Function>),
    /// In f32, a few columns side by side.
    Interleaved,
}

/// 256 numbers of a column of activations in 8 bits.
#[repr(C)]
pub(crate) struct Column {
    /// Four signed bytes each.
    pub words: [i32; DEPTH / 4],
    /// Minus the sums of 16 numbers each.
    pub minus16: [i32; DEPTH / 16],
    /// Minus the sums of 32 numbers each.
    pub minus32: [i32; DEPTH / 32],
    /// One for each 32 numbers, or the first for all.
    pub scale: [f32; DEPTH / 32],
}

/// Words of four bytes in a [`Column`].
pub(crate) const COLUMN_WORDS: usize = size_of::<Column>() / 4;

/// Adding it to a number below 2^22 rounds that to an integer, ties to even, and leaves it in the lower bits.
const ROUND: f32 = 12_582_912.0;

/// Quantizes up to 256 numbers, a whole number of blocks, to a column. If one is not finite, so is the scale.
pub(crate) struct Quantize<'a> {
    pub x: &'a [f32],
    pub quant: ActivationQuant,
    pub to: &'a mut Column,
}

impl<S: Simd> Op<S> for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { x, quant, to } = self;
        let block = match quant {
            ActivationQuant::Q8K => DEPTH,
            ActivationQuant::Q8_0 => 32,
        };
        for (b, x) in x.chunks_exact(block).enumerate() {
            // As integers, so that infinity is above all numbers, and NaN above infinity.
            let mut largest = 0;
            for x in x {
                largest = (x.to_bits() as i32 & i32::MAX).max(largest);
            }
            let largest = f32::from_bits(largest as u32);
            let by = if largest == 0.0 { 0.0 } else { 127.0 / largest };
            to.scale[b] = match quant {
                _ if !largest.is_finite() => f32::NAN,
                ActivationQuant::Q8K if largest == 0.0 => 0.0,
                ActivationQuant::Q8K => 1.0 / by,
                ActivationQuant::Q8_0 => s.round_to_f16(largest / 127.0),
            };
            for (i, x) in x.as_chunks::<16>().0.iter().enumerate() {
                let at = b * block / 16 + i;
                let mut q = [0_i8; 16];
                let mut sum = 0;
                for (q, x) in q.iter_mut().zip(x) {
                    *q = (x * by + ROUND).to_bits() as i8;
                    sum += i32::from(*q);
                }
                to.minus16[at] = -sum;
                for (word, q) in to.words[4 * at..][..4].iter_mut().zip(q.as_chunks::<4>().0) {
                    *word = i32::from_ne_bytes(q.map(|q| q as u8));
                }
            }
            for at in b * block / 32..(b + 1) * block / 32 {
                to.minus32[at] = to.minus16[2 * at] + to.minus16[2 * at + 1];
            }
        }
    }
}
