//! The matrix product on AVX-512 VNNI, whose `vpdpbusd` adds four products of bytes to each of 16
//! numbers at once.
//!
//! ```text
//! slab = 32 rows of weights × 256 columns of theirs, unpacked to unsigned bytes in the L1 cache
//! for each slab along a row                            (each thread has its own rows)
//!     for each tile of 6 columns of activations        (of the same 256 places)
//!         for each block of 32 or 16 places            (which has one scale per row)
//!             dot = -offset · Σ activations            (weights are stored as theirs + offset)
//!             for each group of 4 places
//!                 dot += 32 rows × 4 bytes · 4 bytes of each column          vpdpbusd
//!             sum += dot · scale  - min · Σ activations                      in f32
//!         result += sum · the activations' scale
//! ```
//!
//! Two vectors of weights meet six columns, so 12 vectors of `dot` and 12 of `sum` stay in registers,
//! and a load feeds 1.5 multiplications. All sums over a block are integers, and those of ggml:
//! results differ from its own in the order of the sums of blocks alone.

use std::arch::x86_64::*;

/// Rows of weights that are multiplied together: two vectors of 16.
pub(crate) const ROWS: usize = 32;
/// Places of a row that are unpacked together: the longest block of any type.
pub(crate) const DEPTH: usize = 256;
/// Columns whose sums are kept between slabs: 64 KB on the stack.
const WIDTH: usize = 512;
/// Columns of a tile: more would not fit the registers.
const TILE: usize = 6;

/// Whether this machine has the instructions.
pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("f16c")
}

/// Unpacked weights: 32 rows of 256 places.
#[repr(C, align(64))]
pub(crate) struct Slab {
    /// Per group of four places, four bytes of each row.
    pub q: [[__m512i; 2]; DEPTH / 4],
    /// Per block.
    pub scale: [[__m512; 2]; DEPTH / 16],
    /// Per block of 32, for types that have it.
    pub min: [[__m512; 2]; DEPTH / 32],
}

/// 256 places of one column of activations, in 8 bits.
#[repr(C)]
pub(crate) struct Column {
    q: [i8; DEPTH],
    /// Minus the sums of 16 places each.
    minus16: [i32; DEPTH / 16],
    /// Minus the sums of 32 places each.
    minus32: [i32; DEPTH / 32],
    /// One per 32 places, or the first for all.
    scale: [f32; DEPTH / 32],
}

/// How activations are rounded to 8 bits: as ggml does for a type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rounding {
    /// One scale in f32 per 256 places: ggml's Q8_K.
    By256,
    /// One scale in f16 per 32 places: ggml's Q8_0.
    By32,
}

impl Column {
    /// Rounds up to 256 numbers, a whole number of blocks. If one is not finite, so is the scale.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn round(&mut self, x: &[f32], rounding: Rounding) {
        let block = match rounding {
            Rounding::By256 => DEPTH,
            Rounding::By32 => 32,
        };
        for (b, x) in x.chunks_exact(block).enumerate() {
            // As integers, so that infinity is above all numbers, and NaN above infinity.
            let (x, _) = x.as_chunks::<16>();
            let bits = |x: &[f32; 16]| {
                // SAFETY: reads 16 numbers.
                let x = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
                _mm512_and_si512(x, _mm512_set1_epi32(i32::MAX))
            };
            let largest =
                x.iter().fold(_mm512_setzero_si512(), |a, x| _mm512_max_epi32(a, bits(x)));
            let largest = f32::from_bits(_mm512_reduce_max_epi32(largest) as u32);
            let by = match largest {
                0.0 => 0.0,
                _ => 127.0 / largest,
            };
            let scale = match rounding {
                _ if !largest.is_finite() => f32::NAN,
                Rounding::By256 if largest == 0.0 => 0.0,
                Rounding::By256 => 1.0 / by,
                Rounding::By32 => through_f16(largest / 127.0),
            };
            for (i, x) in x.iter().enumerate() {
                let at = b * block / 16 + i;
                // SAFETY: reads 16 numbers, and writes 16 bytes: `at` is below 16.
                let q = unsafe {
                    let x = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), _mm512_set1_ps(by));
                    let q = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
                    _mm_storeu_si128(self.q[16 * at..][..16].as_mut_ptr().cast(), q);
                    _mm512_cvtepi8_epi32(q)
                };
                self.minus16[at] = -_mm512_reduce_add_epi32(q);
            }
            for at in b * block / 32..(b + 1) * block / 32 {
                self.minus32[at] = self.minus16[2 * at] + self.minus16[2 * at + 1];
            }
            self.scale[b] = scale;
        }
    }
}

/// The nearest half.
#[target_feature(enable = "avx512f")]
fn through_f16(x: f32) -> f32 {
    let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_set1_ps(x));
    _mm512_cvtss_f32(_mm512_cvtph_ps(half))
}

/// Results of one column: a number per row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums([__m512; 2]);

/// Unpacks the blocks of 32 rows that lie in a slab.
pub(crate) type Unpack = unsafe fn(&[u8], &mut Slab);

/// Multiplies a slab's first blocks of 32 places by columns, and adds that to their sums.
pub(crate) type Sweep = unsafe fn(&Slab, usize, &[Column], &mut [Sums]);

/// For types of `BLOCK` places that are stored with an offset of `1 << OFFSET`, or none if that is
/// 0; `MIN` says whether blocks have minimums, `EACH` whether each block of activations has a scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn sweep<const BLOCK: usize, const OFFSET: u32, const MIN: bool, const EACH: bool>(
    slab: &Slab,
    n_block: usize,
    columns: &[Column],
    sums: &mut [Sums],
) {
    let (mut tiles, mut to) = (columns.chunks_exact(TILE), sums.chunks_exact_mut(TILE));
    for (columns, sums) in (&mut tiles).zip(&mut to) {
        tile::<6, BLOCK, OFFSET, MIN, EACH>(slab, n_block, columns, sums);
    }
    let (columns, sums) = (tiles.remainder(), to.into_remainder());
    match columns.len() {
        1 => tile::<1, BLOCK, OFFSET, MIN, EACH>(slab, n_block, columns, sums),
        2 => tile::<2, BLOCK, OFFSET, MIN, EACH>(slab, n_block, columns, sums),
        3 => tile::<3, BLOCK, OFFSET, MIN, EACH>(slab, n_block, columns, sums),
        4 => tile::<4, BLOCK, OFFSET, MIN, EACH>(slab, n_block, columns, sums),
        5 => tile::<5, BLOCK, OFFSET, MIN, EACH>(slab, n_block, columns, sums),
        _ => {}
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<
    const N: usize,
    const BLOCK: usize,
    const OFFSET: u32,
    const MIN: bool,
    const EACH: bool,
>(
    slab: &Slab,
    n_block: usize,
    columns: &[Column],
    sums: &mut [Sums],
) {
    let columns: &[Column; N] = columns.try_into().expect("a tile");
    let sums: &mut [Sums; N] = sums.try_into().expect("a tile");
    assert!(n_block <= DEPTH / 32, "a slab");
    let mut sum = [[_mm512_setzero_ps(); 2]; N];
    for b in 0..n_block * (32 / BLOCK) {
        let mut dot = [[_mm512_setzero_si512(); 2]; N];
        if OFFSET > 0 {
            for c in 0..N {
                let minus = match BLOCK {
                    16 => columns[c].minus16[b],
                    _ => columns[c].minus32[b],
                };
                dot[c] = [_mm512_slli_epi32::<OFFSET>(_mm512_set1_epi32(minus)); 2];
            }
        }
        for g in b * (BLOCK / 4)..(b + 1) * (BLOCK / 4) {
            let w = &slab.q[g];
            for c in 0..N {
                // SAFETY: `b` is a block of 256 places, so `g` one of their 64 groups of four.
                let x = unsafe { columns[c].q.as_ptr().cast::<i32>().add(g).read_unaligned() };
                let x = _mm512_set1_epi32(x);
                dot[c][0] = _mm512_dpbusd_epi32(dot[c][0], w[0], x);
                dot[c][1] = _mm512_dpbusd_epi32(dot[c][1], w[1], x);
            }
        }
        for c in 0..N {
            for half in 0..2 {
                let mut dot = _mm512_cvtepi32_ps(dot[c][half]);
                if EACH {
                    dot = _mm512_mul_ps(dot, _mm512_set1_ps(columns[c].scale[b]));
                }
                sum[c][half] = _mm512_fmadd_ps(dot, slab.scale[b][half], sum[c][half]);
                if MIN {
                    let minus = _mm512_cvtepi32_ps(_mm512_set1_epi32(columns[c].minus32[b]));
                    sum[c][half] = _mm512_fmadd_ps(minus, slab.min[b][half], sum[c][half]);
                }
            }
        }
    }
    for c in 0..N {
        let scale = _mm512_set1_ps(if EACH { 1.0 } else { columns[c].scale[0] });
        for (all, sum) in sums[c].0.iter_mut().zip(sum[c]) {
            *all = _mm512_fmadd_ps(sum, scale, *all);
        }
    }
}

/// 32 rows of packed weights, and what they are multiplied by.
pub(crate) struct Panel<'a> {
    pub packed: &'a [u8],
    /// Places of a block, and bytes of a block of each row together.
    pub block: (usize, usize),
    /// Per slab, all columns.
    pub columns: &'a [Column],
    pub n_column: usize,
}

/// What a thread needs beside its operands.
pub(crate) struct Scratch {
    slab: Slab,
    sums: [Sums; WIDTH],
}

impl Scratch {
    #[target_feature(enable = "avx512f")]
    pub fn new() -> Self {
        let (zero, none) = (_mm512_setzero_ps(), _mm512_setzero_si512());
        let (q, scale, min) = ([[none; 2]; 64], [[zero; 2]; 16], [[zero; 2]; 8]);
        Self { slab: Slab { q, scale, min }, sums: [Sums([zero; 2]); WIDTH] }
    }
}

impl Panel<'_> {
    /// Gives `out` the number of each column, and its results.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn multiply(
        &self,
        unpack: Unpack,
        sweep: Sweep,
        scratch: &mut Scratch,
        mut out: impl FnMut(usize, &[f32; ROWS]),
    ) {
        let (block, bytes) = self.block;
        for start in (0..self.n_column).step_by(WIDTH) {
            let end = self.n_column.min(start + WIDTH);
            let sums = &mut scratch.sums[..end - start];
            sums.fill(Sums([_mm512_setzero_ps(); 2]));
            let slabs = self.packed.chunks(DEPTH / block * bytes);
            for (packed, columns) in slabs.zip(self.columns.chunks_exact(self.n_column)) {
                let n_block = packed.len() / bytes * block / 32;
                // SAFETY: both need no other instructions than this function has.
                unsafe {
                    unpack(packed, &mut scratch.slab);
                    sweep(&scratch.slab, n_block, &columns[start..end], sums);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                // SAFETY: two vectors of 16 numbers are 32 numbers.
                out(start + i, unsafe { std::mem::transmute::<&Sums, &[f32; ROWS]>(sums) });
            }
        }
    }
}
