//! The product of a panel of quantized weights and columns of activations.
//!
//! ```text
//! slab = MR rows of weights × 256 numbers of each, unpacked to unsigned bytes in the L1 cache
//! for each slab along the rows                         (each thread has its own panels)
//!     for each tile of columns of activations          (of the same 256 numbers)
//!         for each block of 32 or 16 numbers           (which has one scale per row)
//!             dot = -offset · Σ activations            (unpacked weights are too large by the offset)
//!             for each word, which is four numbers
//!                 dot += MR rows × word · word of each column                   Simd::dot
//!             sum += dot · scale  - min · Σ activations                      in f32
//!         result += sum · the activations' scale
//! ```
//!
//! All sums over a block are integers, and those of ggml: results differ from its own in the order of the sums of
//! blocks alone, and are the same bits with every instruction set.

use super::activations::{ActivationQuant, Column, DEPTH};
use super::format::{Format, Slab};
use super::simd::{Op, Simd};

/// Columns whose sums are kept between slabs: 64 KB on the stack.
pub(crate) const MAX_COLUMNS: usize = 512;

/// What a thread needs besides its operands.
pub(crate) struct Scratch<S: Simd> {
    slab: Slab<S>,
    /// By column, a number for each row.
    pub sums: [[S::F; 2]; MAX_COLUMNS],
}

impl<S: Simd> Scratch<S> {
    pub fn new(s: S) -> Self {
        let (zero, none) = ([s.zero(); 2], [s.zero_words(); 2]);
        let slab = Slab { words: [none; _], scale: [zero; _], min: [zero; _] };
        Self { slab, sums: [zero; _] }
    }
}

/// `MR` rows of packed weights times some columns.
pub(crate) struct Panel<'a> {
    pub packed: &'a [u8],
    /// By slab, the columns of all, of which `first` is the first that is wanted.
    pub columns: &'a [Column],
    pub n_all: usize,
    pub first: usize,
    /// At most [`MAX_COLUMNS`].
    pub n_column: usize,
}

impl Panel<'_> {
    /// Leaves the results in `scratch.sums`.
    pub fn multiply<S: Simd, F: Format>(&self, s: S, scratch: &mut Scratch<S>) {
        let (block, bytes) = (F::DTYPE.block(), S::MR * F::DTYPE.block_bytes());
        let sums = &mut scratch.sums[..self.n_column];
        sums.fill([s.zero(); 2]);
        let slabs = self.packed.chunks(DEPTH / block * bytes);
        for (packed, columns) in slabs.zip(self.columns.chunks_exact(self.n_all)) {
            let slab = &mut scratch.slab;
            s.vectorize(Unpack::<S, F> { packed, slab, _format: std::marker::PhantomData });
            let n_block = packed.len() / bytes * block / F::BLOCK;
            let columns = &columns[self.first..][..self.n_column];
            multiply_slab::<S, F>(s, &scratch.slab, n_block, columns, sums);
        }
    }
}

struct Unpack<'a, S: Simd, F> {
    packed: &'a [u8],
    slab: &'a mut Slab<S>,
    _format: std::marker::PhantomData<F>,
}

impl<S: Simd, F: Format> Op<S> for Unpack<'_, S, F> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        F::unpack(s, self.packed, self.slab);
    }
}

/// Multiplies a slab's first blocks by columns, and adds that to their sums.
fn multiply_slab<S: Simd, F: Format>(
    s: S,
    slab: &Slab<S>,
    n_block: usize,
    columns: &[Column],
    sums: &mut [[S::F; 2]],
) {
    assert!(n_block <= DEPTH / F::BLOCK, "a slab");
    let n = S::tile_columns(F::BITS);
    for (columns, sums) in columns.chunks(n).zip(sums.chunks_mut(n)) {
        match columns.len() {
            1 => tile::<S, F, 1>(s, slab, n_block, columns, sums),
            2 => tile::<S, F, 2>(s, slab, n_block, columns, sums),
            3 => tile::<S, F, 3>(s, slab, n_block, columns, sums),
            4 => tile::<S, F, 4>(s, slab, n_block, columns, sums),
            5 => tile::<S, F, 5>(s, slab, n_block, columns, sums),
            6 => tile::<S, F, 6>(s, slab, n_block, columns, sums),
            n => unreachable!("a tile of {n} columns"),
        }
    }
}

fn tile<S: Simd, F: Format, const N: usize>(
    s: S,
    slab: &Slab<S>,
    n_block: usize,
    columns: &[Column],
    sums: &mut [[S::F; 2]],
) {
    let columns = columns.try_into().expect("a tile");
    let sums = sums.try_into().expect("a tile");
    let _format = std::marker::PhantomData;
    s.vectorize(Tile::<S, F, N> { slab, n_block, columns, sums, _format });
}

struct Tile<'a, S: Simd, F, const N: usize> {
    slab: &'a Slab<S>,
    n_block: usize,
    columns: &'a [Column; N],
    sums: &'a mut [[S::F; 2]; N],
    _format: std::marker::PhantomData<F>,
}

impl<S: Simd, F: Format, const N: usize> Op<S> for Tile<'_, S, F, N> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { slab, columns, .. } = self;
        let has_scale_by_block = F::QUANT == ActivationQuant::Q8_0;
        let offset = if F::BITS == 8 { S::OFFSET_OF_8_BITS } else { F::OFFSET };
        let n_word = F::BLOCK / 4;
        let mut sum = [[s.zero(); 2]; N];
        for b in 0..self.n_block {
            // Unrolled for a whole slab, the loop would not fit the cache of decoded instructions.
            let b = std::hint::black_box(b);
            let mut dot = [[s.zero_words(); 2]; N];
            if let Some(offset) = offset {
                for c in 0..N {
                    let minus =
                        if F::BLOCK == 16 { columns[c].minus16[b] } else { columns[c].minus32[b] };
                    dot[c] = [s.shift_left(s.splat_word(minus), offset as usize); 2];
                }
            }
            let w = &slab.words[b * n_word..][..n_word];
            let mut x = [&columns[0].words[..n_word]; N];
            for c in 0..N {
                x[c] = &columns[c].words[b * n_word..][..n_word];
            }
            s.dot(F::BITS, w, x, &mut dot);
            for c in 0..N {
                for half in 0..2 {
                    let mut dot = s.to_f32(dot[c][half]);
                    if has_scale_by_block {
                        dot = s.mul(dot, s.splat(columns[c].scale[b]));
                    }
                    sum[c][half] = s.mul_add(dot, slab.scale[b][half], sum[c][half]);
                    if F::HAS_MIN {
                        let minus = s.to_f32(s.splat_word(columns[c].minus32[b]));
                        sum[c][half] = s.mul_add(minus, slab.min[b][half], sum[c][half]);
                    }
                }
            }
        }
        for c in 0..N {
            let scale = if has_scale_by_block { 1.0 } else { columns[c].scale[0] };
            for (all, sum) in self.sums[c].iter_mut().zip(sum[c]) {
                *all = s.mul_add(sum, s.splat(scale), *all);
            }
        }
    }
}
