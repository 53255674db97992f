//! NEON with dot products (Armv8.2's `dotprod`): 128 bits.
//!
//! `sdot` adds four products of bytes to each of four integers at once, and takes one of the four words of a vector
//! for all rows: a vector of a column serves four words. A tile of six columns takes 12 registers for integers, 12
//! for their sums in f32, six for the columns' words and two for the weights': all 32.
//!
//! Assembly is for instructions whose intrinsics stable Rust has not.

use std::arch::aarch64::*;
use std::arch::asm;

use super::simd::{Op, Simd, intrinsics};

/// The proof that this CPU has the instructions.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    pub fn detect() -> Option<Self> {
        let has_all = std::arch::is_aarch64_feature_detected!("neon")
            && std::arch::is_aarch64_feature_detected!("dotprod");
        has_all.then_some(Self(()))
    }
}

/// # Safety
/// The CPU must have the instructions.
#[target_feature(enable = "neon,dotprod")]
unsafe fn run<O: Op<Neon>>(isa: Neon, op: O) -> O::Output {
    op.run(isa)
}

// SAFETY: the vectors are four elements of four bytes, and only `detect` makes a value.
unsafe impl Simd for Neon {
    type F = float32x4_t;
    type I = int32x4_t;
    const LANES: usize = 4;
    const NR: usize = 8;
    const OFFSET_OF_8_BITS: Option<u32> = None;

    fn tile_columns(_: u32) -> usize {
        6
    }

    fn vectorize<O: Op<Self>>(self, op: O) -> O::Output {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe { run(self, op) }
    }

    intrinsics! {
        zero() -> float32x4_t { vdupq_n_f32(0.0) }
        splat(x: f32) -> float32x4_t { vdupq_n_f32(x) }
        add(a: float32x4_t, b: float32x4_t) -> float32x4_t { vaddq_f32(a, b) }
        sub(a: float32x4_t, b: float32x4_t) -> float32x4_t { vsubq_f32(a, b) }
        mul(a: float32x4_t, b: float32x4_t) -> float32x4_t { vmulq_f32(a, b) }
        div(a: float32x4_t, b: float32x4_t) -> float32x4_t { vdivq_f32(a, b) }
        mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
            vfmaq_f32(c, a, b)
        }
        neg_mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
            vfmsq_f32(c, a, b)
        }
        min(a: float32x4_t, b: float32x4_t) -> float32x4_t { vbslq_f32(vcltq_f32(a, b), a, b) }
        max(a: float32x4_t, b: float32x4_t) -> float32x4_t { vbslq_f32(vcgtq_f32(a, b), a, b) }
        abs(x: float32x4_t) -> float32x4_t { vabsq_f32(x) }
        round(x: float32x4_t) -> float32x4_t { vrndnq_f32(x) }
        // In two steps, the first of which is exact: the power may be below the smallest normal number.
        scale_by_power(x: float32x4_t, n: float32x4_t) -> float32x4_t {
            let n = vcvtnq_s32_f32(n);
            let first = vshrq_n_s32::<1>(n);
            let power = |n| {
                let exponent = vaddq_s32(n, vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
            };
            vmulq_f32(vmulq_f32(x, power(first)), power(vsubq_s32(n, first)))
        }
        select_positive(x: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vbslq_f32(vcgtzq_f32(x), a, b)
        }
        select_at_most(
            a: int32x4_t, b: int32x4_t, x: float32x4_t, y: float32x4_t
        ) -> float32x4_t {
            vbslq_f32(vcleq_s32(a, b), x, y)
        }
        round_to_f16(x: f32) -> f32 {
            let rounded;
            asm!(
                "fcvt {y:h}, {x:s}",
                "fcvt {y:s}, {y:h}",
                x = in(vreg) x,
                y = lateout(vreg) rounded,
                options(pure, nomem, nostack, preserves_flags)
            );
            rounded
        }
        zero_words() -> int32x4_t { vdupq_n_s32(0) }
        splat_word(x: i32) -> int32x4_t { vdupq_n_s32(x) }
        f16_of_words(words: int32x4_t) -> float32x4_t {
            widen(vmovn_u32(vreinterpretq_u32_s32(words)))
        }
        to_f32(words: int32x4_t) -> float32x4_t { vcvtq_f32_s32(words) }
        and(a: int32x4_t, b: int32x4_t) -> int32x4_t { vandq_s32(a, b) }
        or(a: int32x4_t, b: int32x4_t) -> int32x4_t { vorrq_s32(a, b) }
        add_words(a: int32x4_t, b: int32x4_t) -> int32x4_t { vaddq_s32(a, b) }
        shift_right(words: int32x4_t, n: usize) -> int32x4_t {
            let by = vdupq_n_s32(-(n as i32)); // to the left
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(words), by))
        }
        shift_left(words: int32x4_t, n: usize) -> int32x4_t {
            vshlq_s32(words, vdupq_n_s32(n as i32))
        }
        sign_extend(words: int32x4_t) -> int32x4_t {
            vshrq_n_s32::<24>(vshlq_n_s32::<24>(words))
        }
    }

    #[inline(always)]
    fn offset_8_bits(self, bytes: int32x4_t) -> int32x4_t {
        bytes
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> float32x4_t {
        let x: &[f32; 4] = x.try_into().expect("four numbers");
        // SAFETY: `self` proves that the CPU has the instructions; reads four numbers.
        unsafe { vld1q_f32(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, x: float32x4_t, to: &mut [f32]) {
        let to: &mut [f32; 4] = to.try_into().expect("four numbers");
        // SAFETY: `self` proves that the CPU has the instructions; writes four numbers.
        unsafe { vst1q_f32(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn f16_to_f32(self, x: &[u16; 8]) -> [f32; 8] {
        let mut numbers = [0.0; 8];
        for (x, to) in x.as_chunks::<4>().0.iter().zip(numbers.as_chunks_mut::<4>().0) {
            // SAFETY: `self` proves that the CPU has the instructions; reads and writes four numbers.
            unsafe { vst1q_f32(to.as_mut_ptr(), widen(vld1_u16(x.as_ptr()))) }
        }
        numbers
    }

    #[inline(always)]
    fn load_ints(self, x: &[i32]) -> int32x4_t {
        let x: &[i32; 4] = x.try_into().expect("four integers");
        // SAFETY: `self` proves that the CPU has the instructions; reads four integers.
        unsafe { vld1q_s32(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_words(self, bytes: &[u8]) -> int32x4_t {
        let bytes: &[u8; 16] = bytes.try_into().expect("four words");
        // SAFETY: `self` proves that the CPU has the instructions; reads 16 bytes.
        unsafe { vreinterpretq_s32_u8(vld1q_u8(bytes.as_ptr())) }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8]) -> float32x4_t {
        let bytes: &[u8; 8] = bytes.try_into().expect("four numbers");
        // SAFETY: `self` proves that the CPU has the instructions; reads eight bytes.
        unsafe { widen(vreinterpret_u16_u8(vld1_u8(bytes.as_ptr()))) }
    }

    #[inline(always)]
    fn lookup(self, table: [i8; 16], bytes: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves that the CPU has the instructions; reads 16 bytes.
        unsafe {
            let table = vld1q_s8(table.as_ptr());
            vreinterpretq_s32_s8(vqtbl1q_s8(table, vreinterpretq_u8_s32(bytes)))
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: prefetching an address that is not mapped does nothing.
        unsafe {
            asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn dot<const N: usize>(
        self,
        _: u32,
        w: &[[int32x4_t; 2]],
        x: [&[i32]; N],
        dots: &mut [[int32x4_t; 2]; N],
    ) {
        for (i, w) in w.as_chunks::<4>().0.iter().enumerate() {
            let mut words = [self.zero_words(); N];
            for c in 0..N {
                words[c] = self.load_ints(&x[c][4 * i..][..4]);
            }
            // SAFETY: `self` proves that the CPU has the instructions.
            unsafe {
                dot_word::<N, 0>(w[0], words, dots);
                dot_word::<N, 1>(w[1], words, dots);
                dot_word::<N, 2>(w[2], words, dots);
                dot_word::<N, 3>(w[3], words, dots);
            }
        }
    }
}

/// From f16: `vcvt_f32_f16`.
///
/// # Safety
/// The CPU must have NEON.
#[inline(always)]
unsafe fn widen(x: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: the caller's promise; it touches no memory.
    unsafe {
        asm!(
            "fcvtl {y:v}.4s, {x:v}.4h",
            x = in(vreg) x,
            y = lateout(vreg) wide,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    wide
}

/// Adds the products of a word of each row and word `I` of each column: `vdotq_laneq_s32`.
///
/// # Safety
/// The CPU must have `sdot`.
#[inline(always)]
unsafe fn dot_word<const N: usize, const I: usize>(
    w: [int32x4_t; 2],
    x: [int32x4_t; N],
    dots: &mut [[int32x4_t; 2]; N],
) {
    for c in 0..N {
        for half in 0..2 {
            // SAFETY: the caller's promise; it touches no memory.
            unsafe {
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sums:v}.4s, {w:v}.16b, {x:v}.4b[{i}]",
                    sums = inout(vreg) dots[c][half],
                    w = in(vreg) w[half],
                    x = in(vreg) x[c],
                    i = const I,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
        }
    }
}
