//! Quantized types of weights that we have a product for: how their blocks are packed, and what a product does
//! with them.

use super::activations::{ActivationQuant, DEPTH};
use super::simd::Simd;
use crate::DType;

/// Where a block has two bytes, an f16, that are not part of a word of four.
#[derive(Clone, Copy)]
pub(crate) enum ScalePosition {
    /// Nowhere.
    InWords,
    First,
    Last,
}

/// Unpacked weights: `MR` rows of 256 numbers.
pub(crate) struct Slab<S: Simd> {
    /// By word, four bytes of each row: unsigned, or as [`Simd::offset_8_bits`] leaves them.
    pub words: [[S::I; 2]; DEPTH / 4],
    /// By block.
    pub scale: [[S::F; 2]; DEPTH / 16],
    /// By block of 32, for types that have it.
    pub min: [[S::F; 2]; DEPTH / 32],
}

/// A type of weights. Its blocks are unpacked to unsigned bytes.
pub(crate) trait Format {
    const DTYPE: DType;
    const SCALE: ScalePosition;
    const QUANT: ActivationQuant;
    /// Numbers that have a scale in common: 32 or 16.
    const BLOCK: usize = 32;
    /// Bits of an unpacked number. Those of 8 bits are shifted as [`Simd::OFFSET_OF_8_BITS`] says.
    const BITS: u32;
    /// What unpacked numbers of fewer bits are too large by: 1 shifted by this.
    const OFFSET: Option<u32> = None;
    /// Whether blocks have a minimum, which is subtracted.
    const HAS_MIN: bool = false;

    /// Unpacks the blocks of `MR` rows. Must be `#[inline(always)]`.
    ///
    /// # Panics
    /// If it is not a whole number of blocks, or more than a slab holds.
    fn unpack<S: Simd>(s: S, packed: &[u8], slab: &mut Slab<S>);
}
