//! Numbers that are not finite: in the weights of a file, and in what ggml's quantized products are given.
//!
//! A quantized product first rounds its activations to 8 bits, and ggml's rounding turns NaN into some
//! number. Without a look at both, a damaged file or an overflow would end in an arbitrary motion.

use crate::{DType, Error, Gguf, Result, parallel_for_each};

/// Bytes that one thread looks at in one go, about.
const PIECE_BYTES: usize = 4 << 20;

/// Elements that are looked at before the first that is not finite is searched for.
const RUN: usize = 4096;

impl DType {
    /// The first element that is not finite. In a block of quantized numbers, which are as finite as
    /// their scales, it is the block's first.
    ///
    /// # Panics
    /// If `bytes` is not a whole number of blocks.
    pub fn first_not_finite(self, bytes: &[u8]) -> Option<usize> {
        assert!(bytes.len().is_multiple_of(self.block_bytes()), "not a whole number of blocks");
        match self {
            Self::F32 => {
                first(bytes.as_chunks().0, |x| is_special(u32::from_le_bytes(*x), F32_EXPONENT))
            }
            Self::F16 => {
                first(bytes.as_chunks().0, |x| is_special(u16::from_le_bytes(*x), F16_EXPONENT))
            }
            Self::BF16 => {
                first(bytes.as_chunks().0, |x| is_special(u16::from_le_bytes(*x), BF16_EXPONENT))
            }
            Self::Q8_0 => first(bytes.as_chunks::<34>().0, |block| has_special_scale(block, &[0])),
            Self::Q4_0 | Self::IQ4_NL => {
                first(bytes.as_chunks::<18>().0, |block| has_special_scale(block, &[0]))
            }
            Self::IQ4_XS => {
                first(bytes.as_chunks::<136>().0, |block| has_special_scale(block, &[0]))
            }
            Self::Q4_K => {
                first(bytes.as_chunks::<144>().0, |block| has_special_scale(block, &[0, 2]))
            }
            Self::Q5_K => {
                first(bytes.as_chunks::<176>().0, |block| has_special_scale(block, &[0, 2]))
            }
            Self::Q6_K => {
                first(bytes.as_chunks::<210>().0, |block| has_special_scale(block, &[208]))
            }
            Self::I32 | Self::I64 => None,
        }
        .map(|i| i * self.block())
    }
}

const F32_EXPONENT: u32 = 0x7f80_0000;
const F16_EXPONENT: u16 = 0x7c00;
const BF16_EXPONENT: u16 = 0x7f80;

/// Whether all bits of the exponent are set: infinity or NaN.
fn is_special<T: Copy + Eq + std::ops::BitAnd<Output = T>>(bits: T, exponent: T) -> bool {
    bits & exponent == exponent
}

/// Whether one of a block's f16 scales, which are at these bytes of it, is not finite.
fn has_special_scale(block: &[u8], scales: &[usize]) -> bool {
    scales
        .iter()
        .any(|at| is_special(u16::from_le_bytes([block[*at], block[at + 1]]), F16_EXPONENT))
}

/// The first that is special. Runs are looked at without branches, which compilers vectorize.
fn first<T>(items: &[T], is_special: impl Fn(&T) -> bool) -> Option<usize> {
    let any = |run: &[T]| run.iter().fold(false, |any, item| any | is_special(item));
    let run = items.chunks(RUN).position(any)?;
    let within = items[run * RUN..].iter().position(is_special)?;
    Some(run * RUN + within)
}

/// Whether all numbers are finite.
pub(crate) fn are_finite(x: &[f32]) -> bool {
    first(x, |x| !x.is_finite()).is_none()
}

/// Checks that all weights of a file are finite, on that many threads.
///
/// # Errors
/// [`Error::Tensor`] names the first that is not.
pub(crate) fn check(file: &Gguf, n_thread: usize) -> Result<()> {
    let pieces = file.tensors().iter().flat_map(|info| {
        let block = info.dtype.block_bytes();
        let piece = (PIECE_BYTES / block).max(1) * block;
        let starts = info.range.clone().step_by(piece);
        starts.map(move |start| (info, start..info.range.end.min(start + piece)))
    });
    parallel_for_each(n_thread, pieces, |(info, range)| {
        let found = info.dtype.first_not_finite(&file.bytes()[range.clone()]);
        let Some(element) = found else { return Ok(()) };
        let before = (range.start - info.range.start) / info.dtype.block_bytes();
        let why = format!(
            "holds a number that is not finite, NaN or infinity, at element {}: the file or its \
             checkpoint is damaged",
            before * info.dtype.block() + element
        );
        Err(Error::Tensor { file: file.file().to_owned(), name: info.name.clone(), why })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The naive twin: what the bytes stand for.
    fn twin(dtype: DType, bytes: &[u8]) -> Option<usize> {
        let bad = dtype.decode(bytes).iter().position(|x| !x.is_finite())?;
        Some(bad / dtype.block() * dtype.block())
    }

    #[test]
    fn any_two_bytes_anywhere_are_judged_by_what_they_stand_for() {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_float()) {
            let n_block = 2 * RUN + 3;
            let sound = vec![0x11; n_block * dtype.block_bytes()];
            assert_eq!(
                (dtype.first_not_finite(&sound), twin(dtype, &sound)),
                (None, None),
                "{dtype}"
            );
            for block in [0, 1, RUN - 1, RUN, n_block - 1] {
                for at in 0..dtype.block_bytes() - 1 {
                    for value in
                        [0x7e00_u16, 0x7c00, 0xfc00, 0x7fc0, 0x7f80, 0xff80, 0x7bff, 0xffff]
                    {
                        let mut bytes = sound[..(block + 1) * dtype.block_bytes()].to_vec();
                        let at = block * dtype.block_bytes() + at;
                        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
                        let got = dtype.first_not_finite(&bytes);
                        let last = &bytes[block * dtype.block_bytes()..];
                        let want = twin(dtype, last).map(|_| block * dtype.block());
                        assert_eq!(got, want, "{dtype}: {value:x} at byte {at}");
                    }
                }
            }
        }
    }
}
