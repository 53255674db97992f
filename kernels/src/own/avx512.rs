//! AVX-512 with VNNI: `vpdpbusd` adds four products of bytes to each of 16 integers at once.
//!
//! A tile of six columns takes 12 registers for integers and 12 for their sums in f32, and a load feeds one and a
//! half multiplications.

use std::arch::x86_64::*;

use super::simd::{Op, Simd, intrinsics};

/// The proof that this CPU has the instructions.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let has_all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("fma");
        has_all.then_some(Self(()))
    }
}

/// # Safety
/// The CPU must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
unsafe fn run<O: Op<Avx512>>(isa: Avx512, op: O) -> O::Output {
    op.run(isa)
}

// SAFETY: the vectors are 16 elements of four bytes, and only `detect` makes a value.
unsafe impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const LANES: usize = 16;
    const NR: usize = 8;
    const OFFSET_OF_8_BITS: Option<u32> = Some(7);

    fn tile_columns(_: u32) -> usize {
        6
    }

    fn vectorize<O: Op<Self>>(self, op: O) -> O::Output {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe { run(self, op) }
    }

    intrinsics! {
        zero() -> __m512 { _mm512_setzero_ps() }
        splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
        add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fnmadd_ps(a, b, c) }
        min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        abs(x: __m512) -> __m512 { _mm512_abs_ps(x) }
        round(x: __m512) -> __m512 { _mm512_roundscale_ps::<0>(x) }
        scale_by_power(x: __m512, n: __m512) -> __m512 { _mm512_scalef_ps(x, n) }
        select_positive(x: __m512, a: __m512, b: __m512) -> __m512 {
            _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_setzero_ps()), a)
        }
        select_at_most(a: __m512i, b: __m512i, x: __m512, y: __m512) -> __m512 {
            _mm512_mask_mov_ps(y, _mm512_cmple_epi32_mask(a, b), x)
        }
        round_to_f16(x: f32) -> f32 {
            let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_set1_ps(x));
            _mm512_cvtss_f32(_mm512_cvtph_ps(half))
        }
        zero_words() -> __m512i { _mm512_setzero_si512() }
        splat_word(x: i32) -> __m512i { _mm512_set1_epi32(x) }
        f16_of_words(words: __m512i) -> __m512 { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)) }
        to_f32(words: __m512i) -> __m512 { _mm512_cvtepi32_ps(words) }
        and(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        add_words(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        shift_right(words: __m512i, n: usize) -> __m512i {
            _mm512_srl_epi32(words, _mm_cvtsi32_si128(n as i32))
        }
        shift_left(words: __m512i, n: usize) -> __m512i {
            _mm512_sll_epi32(words, _mm_cvtsi32_si128(n as i32))
        }
        sign_extend(words: __m512i) -> __m512i {
            _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(words))
        }
        offset_8_bits(bytes: __m512i) -> __m512i {
            _mm512_xor_si512(bytes, _mm512_set1_epi8(i8::MIN)) // the sign bit turned around
        }
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> __m512 {
        let x: &[f32; 16] = x.try_into().expect("16 numbers");
        // SAFETY: `self` proves that the CPU has the instructions; reads 16 numbers.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32]) {
        let to: &mut [f32; 16] = to.try_into().expect("16 numbers");
        // SAFETY: `self` proves that the CPU has the instructions; writes 16 numbers.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
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
    fn load_ints(self, x: &[i32]) -> __m512i {
        let x: &[i32; 16] = x.try_into().expect("16 integers");
        // SAFETY: `self` proves that the CPU has the instructions; reads 16 integers.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_words(self, bytes: &[u8]) -> __m512i {
        let bytes: &[u8; 64] = bytes.try_into().expect("16 words");
        // SAFETY: `self` proves that the CPU has the instructions; reads 64 bytes.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8]) -> __m512 {
        let bytes: &[u8; 32] = bytes.try_into().expect("16 numbers");
        // SAFETY: `self` proves that the CPU has the instructions; reads 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn lookup(self, table: [i8; 16], bytes: __m512i) -> __m512i {
        // SAFETY: `self` proves that the CPU has the instructions; reads 16 bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, bytes)
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
        _: u32,
        w: &[[__m512i; 2]],
        x: [&[i32]; N],
        dots: &mut [[__m512i; 2]; N],
    ) {
        for (g, w) in w.iter().enumerate() {
            for c in 0..N {
                // SAFETY: `self` proves that the CPU has the instructions, and they touch no memory.
                unsafe {
                    let x = _mm512_set1_epi32(x[c][g]);
                    dots[c][0] = _mm512_dpbusd_epi32(dots[c][0], w[0], x);
                    dots[c][1] = _mm512_dpbusd_epi32(dots[c][1], w[1], x);
                }
            }
        }
    }
}
