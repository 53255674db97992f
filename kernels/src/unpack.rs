//! Packed weights to bytes, scales and minimums: one function per type.
//!
//! Blocks of 32 rows are interleaved in words of four bytes, as `panel` says: word `w` of the 32
//! blocks, then word `w + 1`; a half that is left over comes last. So a vector holds the same word of
//! 16 rows, and what a format does to a byte is done to 64.

use std::arch::x86_64::*;

use crate::vnni::{ROWS, Slab};

/// ggml's `kvalues_iq4nl`, plus 128.
const STEPS: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// How far before they are needed weights are fetched from memory, in bytes.
const AHEAD: usize = 8 << 10;

/// Word `w` of 16 rows.
#[target_feature(enable = "avx512f")]
fn words(block: &[u8], w: usize, half: usize) -> __m512i {
    let bytes: &[u8; 64] = block[128 * w + 64 * half..][..64].try_into().expect("64 bytes");
    let ahead = bytes.as_ptr().wrapping_add(AHEAD);
    // SAFETY: reads 64 bytes; fetching ahead does nothing where there is no memory.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        _mm512_loadu_si512(bytes.as_ptr().cast())
    }
}

/// The halves of 16 rows behind `n` words.
#[target_feature(enable = "avx512f")]
fn halves(block: &[u8], n: usize, half: usize) -> __m512 {
    let bytes: &[u8; 32] = block[128 * n + 32 * half..][..32].try_into().expect("32 bytes");
    // SAFETY: reads 32 bytes.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}

/// The lower and the upper half of each word, in f32.
#[target_feature(enable = "avx512f")]
fn two_halves(words: __m512i) -> [__m512; 2] {
    [words, _mm512_srli_epi32::<16>(words)].map(|w| _mm512_cvtph_ps(_mm512_cvtepi32_epi16(w)))
}

/// The lower and the upper four bits of each byte.
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(words: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    [_mm512_and_si512(words, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(words), mask)]
}

/// `count` bits of each word from bit `from` on.
#[target_feature(enable = "avx512f")]
fn bits(words: __m512i, from: usize, count: u32) -> __m512i {
    let shifted = _mm512_srl_epi32(words, _mm_cvtsi32_si128(from as i32));
    _mm512_and_si512(shifted, _mm512_set1_epi32((1 << count) - 1))
}

/// The bits of a mask of each byte, from bit `from` on, moved to bit 4.
#[target_feature(enable = "avx512f,avx512bw")]
fn upper(words: __m512i, from: usize, mask: i8) -> __m512i {
    let low = _mm512_srl_epi16(words, _mm_cvtsi32_si128(from as i32));
    _mm512_slli_epi16::<4>(_mm512_and_si512(low, _mm512_set1_epi8(mask)))
}

/// Scales and minimums of Q4_K and Q5_K: six bits each in three words, times two halves.
#[target_feature(enable = "avx512f,avx512bw")]
fn scales_and_mins(block: &[u8], half: usize, slab: &mut Slab) {
    let [d, d_min] = two_halves(words(block, 0, half));
    let [low, min, both] = [1, 2, 3].map(|w| words(block, w, half));
    for j in 0..4 {
        let at = 8 * j;
        let join = |four, two| _mm512_or_si512(four, _mm512_slli_epi32::<4>(two));
        let pairs = [
            (bits(low, at, 6), bits(min, at, 6)),
            (
                join(bits(both, at, 4), bits(low, at + 6, 2)),
                join(bits(both, at + 4, 4), bits(min, at + 6, 2)),
            ),
        ];
        for (i, (scale, min)) in pairs.into_iter().enumerate() {
            slab.scale[j + 4 * i][half] = _mm512_mul_ps(_mm512_cvtepi32_ps(scale), d);
            slab.min[j + 4 * i][half] = _mm512_mul_ps(_mm512_cvtepi32_ps(min), d_min);
        }
    }
}

/// 8 groups of the lower bits, then 8 of the upper, per 8 words.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn q4_k(block: &[u8], slab: &mut Slab) {
    let block: &[u8; 144 * ROWS] = block.try_into().expect("a block");
    (0..2).for_each(|half| scales_and_mins(block, half, slab));
    for w in 0..32 {
        let at = w / 8 * 16 + w % 8;
        for half in 0..2 {
            let [low, high] = nibbles(words(block, 4 + w, half));
            slab.q[at][half] = low;
            slab.q[at + 8][half] = high;
        }
    }
}

/// As Q4_K, with a fifth bit for 64 places in two bits of one byte of every 32.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn q5_k(block: &[u8], slab: &mut Slab) {
    let block: &[u8; 176 * ROWS] = block.try_into().expect("a block");
    (0..2).for_each(|half| scales_and_mins(block, half, slab));
    for w in 0..32 {
        let at = w / 8 * 16 + w % 8;
        for half in 0..2 {
            let [low, high] = nibbles(words(block, 12 + w, half));
            let fifth = words(block, 4 + w % 8, half);
            slab.q[at][half] = _mm512_or_si512(low, upper(fifth, w / 8 * 2, 1));
            slab.q[at + 8][half] = _mm512_or_si512(high, upper(fifth, w / 8 * 2 + 1, 1));
        }
    }
}

/// Stored with an offset of 32. Per half of the block, 16 words have four bits, 8 two more.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn q6_k(block: &[u8], slab: &mut Slab) {
    let block: &[u8; 210 * ROWS] = block.try_into().expect("a block");
    for half in 0..2 {
        let d = halves(block, 52, half);
        for j in 0..16 {
            let scale = bits(words(block, 48 + j / 4, half), j % 4 * 8, 8);
            let scale = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(scale));
            slab.scale[j][half] = _mm512_mul_ps(_mm512_cvtepi32_ps(scale), d);
        }
    }
    for w in 0..32 {
        let (at, from) = (w / 16 * 32 + w % 16, w % 16 / 8 * 2);
        for half in 0..2 {
            let [low, high] = nibbles(words(block, w, half));
            let two = words(block, 32 + w / 16 * 8 + w % 8, half);
            slab.q[at][half] = _mm512_or_si512(low, upper(two, from, 3));
            slab.q[at + 16][half] = _mm512_or_si512(high, upper(two, from + 4, 3));
        }
    }
}

/// Adds 128: the sign bit turned around.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn q8_0(blocks: &[u8], slab: &mut Slab) {
    for (b, block) in blocks.as_chunks::<{ 34 * ROWS }>().0.iter().enumerate() {
        (0..2).for_each(|half| slab.scale[b][half] = halves(block, 8, half));
        for w in 0..8 {
            for half in 0..2 {
                let sign = _mm512_set1_epi8(i8::MIN);
                slab.q[8 * b + w][half] = _mm512_xor_si512(words(block, w, half), sign);
            }
        }
    }
}

/// Four groups of the lower bits, then four of the upper. Stored with an offset of 8.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn q4_0(blocks: &[u8], slab: &mut Slab) {
    for (b, block) in blocks.as_chunks::<{ 18 * ROWS }>().0.iter().enumerate() {
        (0..2).for_each(|half| slab.scale[b][half] = halves(block, 4, half));
        for w in 0..4 {
            for half in 0..2 {
                let [low, high] = nibbles(words(block, w, half));
                slab.q[8 * b + w][half] = low;
                slab.q[8 * b + 4 + w][half] = high;
            }
        }
    }
}

/// As Q4_0, but for uneven steps.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn iq4_nl(blocks: &[u8], slab: &mut Slab) {
    let steps = steps();
    for (b, block) in blocks.as_chunks::<{ 18 * ROWS }>().0.iter().enumerate() {
        (0..2).for_each(|half| slab.scale[b][half] = halves(block, 4, half));
        for w in 0..4 {
            for half in 0..2 {
                let [low, high] = nibbles(words(block, w, half));
                slab.q[8 * b + w][half] = _mm512_shuffle_epi8(steps, low);
                slab.q[8 * b + 4 + w][half] = _mm512_shuffle_epi8(steps, high);
            }
        }
    }
}

/// Blocks as IQ4_NL's, with scales of six bits: four in one word, two in the other.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn iq4_xs(block: &[u8], slab: &mut Slab) {
    let block: &[u8; 136 * ROWS] = block.try_into().expect("a block");
    let steps = steps();
    for half in 0..2 {
        let first = words(block, 0, half);
        let [d, _] = two_halves(first);
        for b in 0..8 {
            let four = bits(words(block, 1, half), 4 * b, 4);
            let two = bits(first, 16 + 2 * b, 2);
            let scale = _mm512_or_si512(four, _mm512_slli_epi32::<4>(two));
            let scale = _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
            slab.scale[b][half] = _mm512_mul_ps(_mm512_cvtepi32_ps(scale), d);
        }
    }
    for w in 0..32 {
        let at = w / 4 * 8 + w % 4;
        for half in 0..2 {
            let [low, high] = nibbles(words(block, 2 + w, half));
            slab.q[at][half] = _mm512_shuffle_epi8(steps, low);
            slab.q[at + 4][half] = _mm512_shuffle_epi8(steps, high);
        }
    }
}

#[target_feature(enable = "avx512f")]
fn steps() -> __m512i {
    // SAFETY: reads 16 bytes.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(STEPS.as_ptr().cast()) })
}
