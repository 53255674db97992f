//! AVX2, without and with VNNI: 256 bits.
//!
//! VNNI's `vpdpbusd` adds four products of bytes to each of eight integers at once. Without it, `vpmaddubsw` adds
//! two such products to 16 bits, which saturate, so weights of few bits are summed there only as long as they
//! cannot, and then widened. The largest sum of a pair is 2 · 127 · (2^bits - 1):
//!
//! | bits | pairs that 16 bits have room for |
//! |---|---|
//! | 4 | 8 |
//! | 5 | 4 |
//! | 6 | 2 |
//! | 8 | none if unsigned; of signed numbers, whose size is at most 128 and is multiplied by the activation with the number's sign, 1 |

use std::arch::x86_64::*;

use super::simd::{Op, Simd, intrinsics};

/// The proof that this CPU has AVX2, and AVX-VNNI if `VNNI` says so.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>(());

fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

impl Avx2<false> {
    pub fn detect() -> Option<Self> {
        has_avx2().then_some(Self(()))
    }
}

impl Avx2<true> {
    pub fn detect() -> Option<Self> {
        (has_avx2() && is_x86_feature_detected!("avxvnni")).then_some(Self(()))
    }
}

/// # Safety
/// The CPU must have the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run<S, O: Op<S>>(isa: S, op: O) -> O::Output {
    op.run(isa)
}

/// # Safety
/// The CPU must have the instructions.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn run_vnni<S, O: Op<S>>(isa: S, op: O) -> O::Output {
    op.run(isa)
}

// SAFETY: the vectors are eight elements of four bytes, and only `detect` makes a value.
unsafe impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = __m256;
    type I = __m256i;
    const LANES: usize = 8;
    const NR: usize = 6;
    const OFFSET_OF_8_BITS: Option<u32> = if VNNI { Some(7) } else { None };

    // What was fastest on Zen 5. Without VNNI, words that are summed in 16 bits take registers too.
    fn tile_columns(bits: u32) -> usize {
        if VNNI || bits == 4 { 6 } else { 4 }
    }

    fn vectorize<O: Op<Self>>(self, op: O) -> O::Output {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe { if VNNI { run_vnni(self, op) } else { run(self, op) } }
    }

    intrinsics! {
        zero() -> __m256 { _mm256_setzero_ps() }
        splat(x: f32) -> __m256 { _mm256_set1_ps(x) }
        add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        sub(a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
        mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        div(a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        neg_mul_add(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fnmadd_ps(a, b, c) }
        min(a: __m256, b: __m256) -> __m256 { _mm256_min_ps(a, b) }
        max(a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
        abs(x: __m256) -> __m256 { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) }
        round(x: __m256) -> __m256 {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        }
        // In two steps, the first of which is exact: the power may be below the smallest normal number.
        scale_by_power(x: __m256, n: __m256) -> __m256 {
            let n = _mm256_cvtps_epi32(n);
            let first = _mm256_srai_epi32::<1>(n);
            let power = |n| {
                let exponent = _mm256_add_epi32(n, _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
            };
            let x = _mm256_mul_ps(x, power(first));
            _mm256_mul_ps(x, power(_mm256_sub_epi32(n, first)))
        }
        select_positive(x: __m256, a: __m256, b: __m256) -> __m256 {
            _mm256_blendv_ps(b, a, _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_setzero_ps()))
        }
        select_at_most(a: __m256i, b: __m256i, x: __m256, y: __m256) -> __m256 {
            _mm256_blendv_ps(x, y, _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)))
        }
        round_to_f16(x: f32) -> f32 {
            let half = _mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(x));
            _mm_cvtss_f32(_mm_cvtph_ps(half))
        }
        zero_words() -> __m256i { _mm256_setzero_si256() }
        splat_word(x: i32) -> __m256i { _mm256_set1_epi32(x) }
        f16_of_words(words: __m256i) -> __m256 {
            let lower = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
            let [a, b] = [_mm256_castsi256_si128(lower), _mm256_extracti128_si256::<1>(lower)];
            _mm256_cvtph_ps(_mm_packus_epi32(a, b))
        }
        to_f32(words: __m256i) -> __m256 { _mm256_cvtepi32_ps(words) }
        and(a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        or(a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
        add_words(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        shift_right(words: __m256i, n: usize) -> __m256i {
            _mm256_srl_epi32(words, _mm_cvtsi32_si128(n as i32))
        }
        shift_left(words: __m256i, n: usize) -> __m256i {
            _mm256_sll_epi32(words, _mm_cvtsi32_si128(n as i32))
        }
        sign_extend(words: __m256i) -> __m256i {
            _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(words))
        }
        offset_8_bits(bytes: __m256i) -> __m256i {
            if VNNI { _mm256_xor_si256(bytes, _mm256_set1_epi8(i8::MIN)) } else { bytes }
        }
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> __m256 {
        let x: &[f32; 8] = x.try_into().expect("8 numbers");
        // SAFETY: `self` proves that the CPU has the instructions; reads eight numbers.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, x: __m256, to: &mut [f32]) {
        let to: &mut [f32; 8] = to.try_into().expect("8 numbers");
        // SAFETY: `self` proves that the CPU has the instructions; writes eight numbers.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn f16_to_f32(self, x: &[u16; 8]) -> [f32; 8] {
        let mut numbers = [0.0; 8];
        // SAFETY: `self` proves that the CPU has the instructions; reads and writes eight numbers.
        unsafe {
            let read = _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_storeu_ps(numbers.as_mut_ptr(), read);
        }
        numbers
    }

    #[inline(always)]
    fn load_ints(self, x: &[i32]) -> __m256i {
        let x: &[i32; 8] = x.try_into().expect("8 integers");
        // SAFETY: `self` proves that the CPU has the instructions; reads eight integers.
        unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_words(self, bytes: &[u8]) -> __m256i {
        let bytes: &[u8; 32] = bytes.try_into().expect("8 words");
        // SAFETY: `self` proves that the CPU has the instructions; reads 32 bytes.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8]) -> __m256 {
        let bytes: &[u8; 16] = bytes.try_into().expect("8 numbers");
        // SAFETY: `self` proves that the CPU has the instructions; reads 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn lookup(self, table: [i8; 16], bytes: __m256i) -> __m256i {
        // SAFETY: `self` proves that the CPU has the instructions; reads 16 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, bytes)
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: prefetching an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn dot<const N: usize>(
        self,
        bits: u32,
        w: &[[__m256i; 2]],
        x: [&[i32]; N],
        dots: &mut [[__m256i; 2]; N],
    ) {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            match (VNNI, bits) {
                (true, _) => dot_vnni(w, x, dots),
                (false, 4) => dot_unsigned::<N, 8>(w, x, dots),
                (false, 5) => dot_unsigned::<N, 4>(w, x, dots),
                (false, 6) => dot_unsigned::<N, 2>(w, x, dots),
                (false, _) => dot_signed(w, x, dots),
            }
        }
    }
}

/// # Safety
/// The CPU must have AVX-VNNI.
#[inline(always)]
unsafe fn dot_vnni<const N: usize>(
    w: &[[__m256i; 2]],
    x: [&[i32]; N],
    dots: &mut [[__m256i; 2]; N],
) {
    for (g, w) in w.iter().enumerate() {
        for c in 0..N {
            // SAFETY: the caller's promise; they touch no memory.
            unsafe {
                let x = _mm256_set1_epi32(x[c][g]);
                dots[c][0] = _mm256_dpbusd_avx_epi32(dots[c][0], w[0], x);
                dots[c][1] = _mm256_dpbusd_avx_epi32(dots[c][1], w[1], x);
            }
        }
    }
}

/// Of unsigned weights, of which `RUN` words are summed in 16 bits.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn dot_unsigned<const N: usize, const RUN: usize>(
    w: &[[__m256i; 2]],
    x: [&[i32]; N],
    dots: &mut [[__m256i; 2]; N],
) {
    for (run, w) in w.chunks(RUN).enumerate() {
        // SAFETY: the caller's promise; they touch no memory.
        unsafe {
            let mut pairs = [[_mm256_setzero_si256(); 2]; N];
            for (g, w) in w.iter().enumerate() {
                for c in 0..N {
                    let x = _mm256_set1_epi32(x[c][run * RUN + g]);
                    for half in 0..2 {
                        let products = _mm256_maddubs_epi16(w[half], x);
                        pairs[c][half] = _mm256_add_epi16(pairs[c][half], products);
                    }
                }
            }
            for c in 0..N {
                for half in 0..2 {
                    let sums = _mm256_madd_epi16(pairs[c][half], _mm256_set1_epi16(1));
                    dots[c][half] = _mm256_add_epi32(dots[c][half], sums);
                }
            }
        }
    }
}

/// Of signed weights of 8 bits.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn dot_signed<const N: usize>(
    w: &[[__m256i; 2]],
    x: [&[i32]; N],
    dots: &mut [[__m256i; 2]; N],
) {
    for (g, w) in w.iter().enumerate() {
        for c in 0..N {
            for half in 0..2 {
                // SAFETY: the caller's promise; they touch no memory.
                unsafe {
                    let x = _mm256_sign_epi8(_mm256_set1_epi32(x[c][g]), w[half]);
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[half]), x);
                    let sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                    dots[c][half] = _mm256_add_epi32(dots[c][half], sums);
                }
            }
        }
    }
}
