//! What a kernel needs of an instruction set: two vectors, of 32-bit integers and of f32, and the operations on
//! them. Kernels are generic over it, so they are written once for all sets.
//!
//! A value of such a type is the proof that the CPU has the instructions: only detection makes one. That is why
//! the operations, which take it, are safe.
//!
//! Kernels are `#[inline(always)]` functions below an [`Op`], which [`Simd::vectorize`] runs in a function that
//! is compiled for the instruction set. Elsewhere the same code is right but slow, since intrinsics are not
//! inlined into functions that lack their feature.

/// No instruction set multiplies by more numbers at once than this.
pub(crate) const MAX_NR: usize = 8;

/// An instruction set that the CPU has.
///
/// # Safety
/// `F` and `I` must be `LANES` elements of four bytes in memory order, valid whatever their bits; and a value
/// must not exist where the CPU lacks the instructions.
pub(crate) unsafe trait Simd: Copy + Send + Sync + 'static {
    /// f32 elements.
    type F: Copy;
    /// i32 elements, or four times as many bytes.
    type I: Copy;
    /// Elements of a vector.
    const LANES: usize;
    /// Rows that are multiplied together: those of two vectors.
    const MR: usize = 2 * Self::LANES;
    /// Columns of a tile of a product of floats, at most [`MAX_NR`].
    const NR: usize;
    /// The bits that weights of 8 bits are shifted by to be unsigned for [`Simd::dot`]: 128 is added, which is
    /// `1 << 7`, or nothing.
    const OFFSET_OF_8_BITS: Option<u32>;

    /// Columns of a tile of a product of weights of so many bits: at most six.
    fn tile_columns(bits: u32) -> usize;

    /// Runs an operation in a function that is compiled for these instructions.
    fn vectorize<O: Op<Self>>(self, op: O) -> O::Output;

    fn zero(self) -> Self::F;
    fn splat(self, x: f32) -> Self::F;
    /// # Panics
    /// If there are not `LANES` numbers.
    fn load(self, x: &[f32]) -> Self::F;
    /// # Panics
    /// If there is not room for `LANES` numbers exactly.
    fn store(self, x: Self::F, to: &mut [f32]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a · b`, rounded once.
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The smaller, or `b` if one is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger, or `b` if one is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, x: Self::F) -> Self::F;
    /// The nearest integers, ties to even.
    fn round(self, x: Self::F) -> Self::F;
    /// `x · 2^n`, rounded once, for integers `-160 <= n < 128` and `1/2 < x < 2`.
    fn scale_by_power(self, x: Self::F, n: Self::F) -> Self::F;
    /// `a` where `x > 0`, else `b`.
    fn select_positive(self, x: Self::F, a: Self::F, b: Self::F) -> Self::F;
    /// `x` where `a <= b`, else `y`.
    fn select_at_most(self, a: Self::I, b: Self::I, x: Self::F, y: Self::F) -> Self::F;
    /// From f16.
    fn f16_to_f32(self, x: &[u16; 8]) -> [f32; 8];
    /// The nearest f16.
    fn round_to_f16(self, x: f32) -> f32;

    fn zero_words(self) -> Self::I;
    fn splat_word(self, x: i32) -> Self::I;
    /// # Panics
    /// If there are not `LANES` integers.
    fn load_ints(self, x: &[i32]) -> Self::I;
    /// # Panics
    /// If there are not `LANES` words.
    fn load_words(self, bytes: &[u8]) -> Self::I;
    /// `LANES` f16.
    ///
    /// # Panics
    /// If there are not as many.
    fn load_f16(self, bytes: &[u8]) -> Self::F;
    /// The f16 in the lower half of each word.
    fn f16_of_words(self, words: Self::I) -> Self::F;
    fn to_f32(self, words: Self::I) -> Self::F;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn add_words(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bits from bit `n` on of each word, as unsigned numbers.
    fn shift_right(self, words: Self::I, n: usize) -> Self::I;
    fn shift_left(self, words: Self::I, n: usize) -> Self::I;
    /// The lowest byte of each word, as a signed number.
    fn sign_extend(self, words: Self::I) -> Self::I;
    /// The entries of a table that bytes below 16 name.
    fn lookup(self, table: [i8; 16], bytes: Self::I) -> Self::I;
    /// Signed bytes, plus [`Simd::OFFSET_OF_8_BITS`].
    fn offset_8_bits(self, bytes: Self::I) -> Self::I;
    /// Asks for memory that is needed soon. It may be none of the program's.
    fn prefetch(self, at: *const u8);

    /// Adds, for each of `N` columns, `Σ w · x` to `dots`: words of `w` are four numbers of so many bits of a
    /// row, words of `x` the four signed bytes of the column that those are multiplied by.
    ///
    /// `w` has a multiple of four words, as every block has.
    ///
    /// # Panics
    /// If a column has fewer words than a row.
    fn dot<const N: usize>(
        self,
        bits: u32,
        w: &[[Self::I; 2]],
        x: [&[i32]; N],
        dots: &mut [[Self::I; 2]; N],
    );
}

/// Methods of [`Simd`] that access no memory, for a type that proves that the CPU has their instructions.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident: $type:ty),*) -> $result:ty { $($body:tt)* })*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $result {
            // SAFETY: `self` proves that the CPU has the instructions, and they touch no memory.
            unsafe { $($body)* }
        }
    )*};
}
pub(super) use intrinsics;

/// Something to compute with an instruction set.
pub(crate) trait Op<S> {
    type Output;

    /// Must be `#[inline(always)]`.
    fn run(self, s: S) -> Self::Output;
}

/// The elements of vectors.
pub(crate) fn elements<S: Simd>(vectors: &[[S::F; 2]]) -> &[f32] {
    // SAFETY: the trait says that `F` is `LANES` numbers.
    unsafe { std::slice::from_raw_parts(vectors.as_ptr().cast(), vectors.len() * S::MR) }
}

/// As [`elements`].
pub(crate) fn elements_mut<S: Simd>(vectors: &mut [[S::F; 2]]) -> &mut [f32] {
    // SAFETY: the trait says that `F` is `LANES` numbers, whatever their bits.
    unsafe { std::slice::from_raw_parts_mut(vectors.as_mut_ptr().cast(), vectors.len() * S::MR) }
}
