//! Packed weights to bytes, scales and minimums: one format for each type.
//!
//! The blocks of `MR` rows are interleaved in words of four bytes, as `pack` leaves them: the first word of all
//! rows, then their second, and so on; an f16 that is left over comes last. So a vector has the same word of
//! several rows, and what a format does to a byte is done to all of them.

use super::activations::ActivationQuant;
use super::format::{Format, ScalePosition, Slab};
use super::simd::Simd;
use crate::DType;

/// ggml's `kvalues_iq4nl`.
const STEPS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// How far before they are needed weights are fetched from memory.
const PREFETCH_BYTES: usize = 8 << 10;

/// Word `w` of half of the rows.
#[inline(always)]
fn words<S: Simd>(s: S, block: &[u8], w: usize, half: usize) -> S::I {
    let bytes = &block[4 * (S::MR * w + S::LANES * half)..][..4 * S::LANES];
    s.prefetch(bytes.as_ptr().wrapping_add(PREFETCH_BYTES));
    s.load_words(bytes)
}

/// The f16 of half of the rows, which come after `n_word` words.
#[inline(always)]
fn scales<S: Simd>(s: S, block: &[u8], n_word: usize, half: usize) -> S::F {
    s.load_f16(&block[4 * S::MR * n_word + 2 * S::LANES * half..][..2 * S::LANES])
}

/// The lower and the upper f16 of each word.
#[inline(always)]
fn two_f16<S: Simd>(s: S, words: S::I) -> [S::F; 2] {
    [s.f16_of_words(words), s.f16_of_words(s.shift_right(words, 16))]
}

/// The lower and the upper four bits of each byte.
#[inline(always)]
fn nibbles<S: Simd>(s: S, words: S::I) -> [S::I; 2] {
    let mask = s.splat_word(0x0f0f_0f0f);
    [s.and(words, mask), s.and(s.shift_right(words, 4), mask)]
}

/// `count` bits of each word from bit `from` on.
#[inline(always)]
fn bits<S: Simd>(s: S, words: S::I, from: usize, count: u32) -> S::I {
    s.and(s.shift_right(words, from), s.splat_word((1 << count) - 1))
}

/// `count` bits of each byte from bit `from` on, moved to bit 4, added to four bits.
#[inline(always)]
fn with_upper<S: Simd>(s: S, four: S::I, words: S::I, from: usize, count: u32) -> S::I {
    let mask = s.splat_word(((1 << count) - 1) * 0x0101_0101);
    s.or(four, s.shift_left(s.and(s.shift_right(words, from), mask), 4))
}

/// Four bits, and two more above them.
#[inline(always)]
fn six_bits<S: Simd>(s: S, four: S::I, two: S::I) -> S::I {
    s.or(four, s.shift_left(two, 4))
}

/// Scales and minimums of Q4_K and Q5_K: six bits each in three words, times two f16.
#[inline(always)]
fn scales_and_mins<S: Simd>(s: S, block: &[u8], slab: &mut Slab<S>) {
    for half in 0..2 {
        let [d, d_min] = two_f16(s, words(s, block, 0, half));
        let low = words(s, block, 1, half);
        let min = words(s, block, 2, half);
        let both = words(s, block, 3, half);
        for j in 0..4 {
            let at = 8 * j;
            slab.scale[j][half] = s.mul(s.to_f32(bits(s, low, at, 6)), d);
            slab.min[j][half] = s.mul(s.to_f32(bits(s, min, at, 6)), d_min);
            let scale = six_bits(s, bits(s, both, at, 4), bits(s, low, at + 6, 2));
            slab.scale[j + 4][half] = s.mul(s.to_f32(scale), d);
            let min = six_bits(s, bits(s, both, at + 4, 4), bits(s, min, at + 6, 2));
            slab.min[j + 4][half] = s.mul(s.to_f32(min), d_min);
        }
    }
}

/// Eight words of the lower bits, then eight of the upper ones, for each eight packed words.
pub(crate) struct Q4K;

impl Format for Q4K {
    const DTYPE: DType = DType::Q4_K;
    const SCALE: ScalePosition = ScalePosition::InWords;
    const QUANT: ActivationQuant = ActivationQuant::Q8K;
    const BITS: u32 = 4;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<S: Simd>(s: S, block: &[u8], slab: &mut Slab<S>) {
        assert_eq!(block.len(), 144 * S::MR, "a block");
        scales_and_mins(s, block, slab);
        for w in 0..32 {
            let at = w / 8 * 16 + w % 8;
            for half in 0..2 {
                let [low, high] = nibbles(s, words(s, block, 4 + w, half));
                slab.words[at][half] = low;
                slab.words[at + 8][half] = high;
            }
        }
    }
}

/// As Q4_K, with a fifth bit for 64 numbers in two bits of one byte of every 32.
pub(crate) struct Q5K;

impl Format for Q5K {
    const DTYPE: DType = DType::Q5_K;
    const SCALE: ScalePosition = ScalePosition::InWords;
    const QUANT: ActivationQuant = ActivationQuant::Q8K;
    const BITS: u32 = 5;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<S: Simd>(s: S, block: &[u8], slab: &mut Slab<S>) {
        assert_eq!(block.len(), 176 * S::MR, "a block");
        scales_and_mins(s, block, slab);
        for w in 0..32 {
            let at = w / 8 * 16 + w % 8;
            for half in 0..2 {
                let [low, high] = nibbles(s, words(s, block, 12 + w, half));
                let fifth = words(s, block, 4 + w % 8, half);
                slab.words[at][half] = with_upper(s, low, fifth, w / 8 * 2, 1);
                slab.words[at + 8][half] = with_upper(s, high, fifth, w / 8 * 2 + 1, 1);
            }
        }
    }
}

/// For each half of the block, 16 words have four bits and eight have two more. Scales are signed bytes.
pub(crate) struct Q6K;

impl Format for Q6K {
    const DTYPE: DType = DType::Q6_K;
    const SCALE: ScalePosition = ScalePosition::Last;
    const QUANT: ActivationQuant = ActivationQuant::Q8K;
    const BLOCK: usize = 16;
    const BITS: u32 = 6;
    const OFFSET: Option<u32> = Some(5);

    #[inline(always)]
    fn unpack<S: Simd>(s: S, block: &[u8], slab: &mut Slab<S>) {
        assert_eq!(block.len(), 210 * S::MR, "a block");
        for half in 0..2 {
            let d = scales(s, block, 52, half);
            for j in 0..16 {
                let four = words(s, block, 48 + j / 4, half);
                let scale = s.sign_extend(s.shift_right(four, j % 4 * 8));
                slab.scale[j][half] = s.mul(s.to_f32(scale), d);
            }
        }
        for w in 0..32 {
            let (at, from) = (w / 16 * 32 + w % 16, w % 16 / 8 * 2);
            for half in 0..2 {
                let [low, high] = nibbles(s, words(s, block, w, half));
                let two = words(s, block, 32 + w / 16 * 8 + w % 8, half);
                slab.words[at][half] = with_upper(s, low, two, from, 2);
                slab.words[at + 16][half] = with_upper(s, high, two, from + 4, 2);
            }
        }
    }
}

/// Signed bytes.
#[allow(non_camel_case_types)]
pub(crate) struct Q8_0;

impl Format for Q8_0 {
    const DTYPE: DType = DType::Q8_0;
    const SCALE: ScalePosition = ScalePosition::First;
    const QUANT: ActivationQuant = ActivationQuant::Q8_0;
    const BITS: u32 = 8;

    #[inline(always)]
    fn unpack<S: Simd>(s: S, blocks: &[u8], slab: &mut Slab<S>) {
        for (b, block) in blocks.chunks_exact(34 * S::MR).enumerate() {
            for half in 0..2 {
                slab.scale[b][half] = scales(s, block, 8, half);
                for w in 0..8 {
                    slab.words[8 * b + w][half] = s.offset_8_bits(words(s, block, w, half));
                }
            }
        }
    }
}

/// Four words of the lower bits, then four of the upper ones.
#[allow(non_camel_case_types)]
pub(crate) struct Q4_0;

impl Format for Q4_0 {
    const DTYPE: DType = DType::Q4_0;
    const SCALE: ScalePosition = ScalePosition::First;
    const QUANT: ActivationQuant = ActivationQuant::Q8_0;
    const BITS: u32 = 4;
    const OFFSET: Option<u32> = Some(3);

    #[inline(always)]
    fn unpack<S: Simd>(s: S, blocks: &[u8], slab: &mut Slab<S>) {
        for (b, block) in blocks.chunks_exact(18 * S::MR).enumerate() {
            for half in 0..2 {
                slab.scale[b][half] = scales(s, block, 4, half);
                for w in 0..4 {
                    let [low, high] = nibbles(s, words(s, block, w, half));
                    slab.words[8 * b + w][half] = low;
                    slab.words[8 * b + 4 + w][half] = high;
                }
            }
        }
    }
}

/// As Q4_0, with uneven steps.
pub(crate) struct Iq4Nl;

impl Format for Iq4Nl {
    const DTYPE: DType = DType::IQ4_NL;
    const SCALE: ScalePosition = ScalePosition::First;
    const QUANT: ActivationQuant = ActivationQuant::Q8_0;
    const BITS: u32 = 8;

    #[inline(always)]
    fn unpack<S: Simd>(s: S, blocks: &[u8], slab: &mut Slab<S>) {
        for (b, block) in blocks.chunks_exact(18 * S::MR).enumerate() {
            for half in 0..2 {
                slab.scale[b][half] = scales(s, block, 4, half);
                for w in 0..4 {
                    let [low, high] = nibbles(s, words(s, block, w, half));
                    slab.words[8 * b + w][half] = s.offset_8_bits(s.lookup(STEPS, low));
                    slab.words[8 * b + 4 + w][half] = s.offset_8_bits(s.lookup(STEPS, high));
                }
            }
        }
    }
}

/// Numbers as IQ4_NL's, with scales of six bits: four in one word, two in the other.
pub(crate) struct Iq4Xs;

impl Format for Iq4Xs {
    const DTYPE: DType = DType::IQ4_XS;
    const SCALE: ScalePosition = ScalePosition::InWords;
    const QUANT: ActivationQuant = ActivationQuant::Q8K;
    const BITS: u32 = 8;

    #[inline(always)]
    fn unpack<S: Simd>(s: S, block: &[u8], slab: &mut Slab<S>) {
        assert_eq!(block.len(), 136 * S::MR, "a block");
        for half in 0..2 {
            let first = words(s, block, 0, half);
            let [d, _] = two_f16(s, first);
            let fours = words(s, block, 1, half);
            for b in 0..8 {
                let scale = six_bits(s, bits(s, fours, 4 * b, 4), bits(s, first, 16 + 2 * b, 2));
                let scale = s.add_words(scale, s.splat_word(-32));
                slab.scale[b][half] = s.mul(s.to_f32(scale), d);
            }
        }
        for w in 0..32 {
            let at = w / 4 * 8 + w % 4;
            for half in 0..2 {
                let [low, high] = nibbles(s, words(s, block, 2 + w, half));
                slab.words[at][half] = s.offset_8_bits(s.lookup(STEPS, low));
                slab.words[at + 4][half] = s.offset_8_bits(s.lookup(STEPS, high));
            }
        }
    }
}
