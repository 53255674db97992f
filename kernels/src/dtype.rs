//! Element types, and rows of numbers converted into and out of them by ggml's own routines.

use std::fmt;

use llama_cpp_sys_2 as sys;

/// How the elements of a tensor are stored. Names and numbers are ggml's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, non_camel_case_types)]
pub enum DType {
    F32,
    F16,
    BF16,
    /// 8.5 bits: blocks of 32, one f16 scale.
    Q8_0,
    /// 4.5 bits: blocks of 32, one f16 scale, 16 even steps.
    Q4_0,
    /// 4.5 bits: blocks of 32, one f16 scale, 16 steps that are denser around zero.
    IQ4_NL,
    /// 4.25 bits: blocks of 256, scales of six bits, the steps of IQ4_NL.
    IQ4_XS,
    /// 4.5 bits: blocks of 256, scales and offsets of six bits.
    Q4_K,
    /// 5.5 bits: as Q4_K.
    Q5_K,
    /// 6.5625 bits: blocks of 256, scales of eight bits.
    Q6_K,
    /// Token ids and positions.
    I32,
    /// Row numbers for [`crate::Tensor::set_rows`].
    I64,
}

impl DType {
    /// Every type a file may hold.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::IQ4_NL,
        Self::IQ4_XS,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::I32,
        Self::I64,
    ];

    /// ggml's number for the type, as in a GGUF tensor header.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => sys::GGML_TYPE_F32,
            Self::F16 => sys::GGML_TYPE_F16,
            Self::BF16 => sys::GGML_TYPE_BF16,
            Self::Q8_0 => sys::GGML_TYPE_Q8_0,
            Self::Q4_0 => sys::GGML_TYPE_Q4_0,
            Self::IQ4_NL => sys::GGML_TYPE_IQ4_NL,
            Self::IQ4_XS => sys::GGML_TYPE_IQ4_XS,
            Self::Q4_K => sys::GGML_TYPE_Q4_K,
            Self::Q5_K => sys::GGML_TYPE_Q5_K,
            Self::Q6_K => sys::GGML_TYPE_Q6_K,
            Self::I32 => sys::GGML_TYPE_I32,
            Self::I64 => sys::GGML_TYPE_I64,
        }
    }

    /// The type with that number, if this crate knows it.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.number() == number)
    }

    /// Whether it stores numbers to compute with, rather than ids and places.
    pub fn is_float(self) -> bool {
        !matches!(self, Self::I32 | Self::I64)
    }

    /// Whether it stores blocks of small integers with common scales.
    pub fn is_quantized(self) -> bool {
        self.block() > 1
    }

    /// Elements per block: 1 for plain types. A row is a whole number of blocks.
    pub fn block(self) -> usize {
        // SAFETY: reads ggml's constant table; `number` is always one of its entries.
        unsafe { sys::ggml_blck_size(self.number()) as usize }
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        // SAFETY: reads ggml's constant table; `number` is always one of its entries.
        unsafe { sys::ggml_type_size(self.number()) }
    }

    /// Bytes of a row, or `None` if `length` is not a whole number of blocks or overflows.
    pub fn row_bytes(self, length: usize) -> Option<usize> {
        let whole = length.is_multiple_of(self.block());
        whole.then_some(length / self.block())?.checked_mul(self.block_bytes())
    }

    /// Converts whole rows of `row` numbers each into `out`. `importance` says how much the square
    /// of each column's error counts, for the types that choose their scales by it.
    ///
    /// # Panics
    /// If the sizes do not fit together, or for an integer type.
    pub fn encode(self, rows: &[f32], row: usize, importance: Option<&[f32]>, out: &mut [u8]) {
        assert!(self.is_float(), "{self} rows are not made of numbers");
        assert!(row > 0 && rows.len().is_multiple_of(row), "{} is not whole rows", rows.len());
        let n = rows.len() / row;
        let bytes = self.row_bytes(row).expect("a row is a whole number of blocks");
        assert_eq!(out.len(), n * bytes, "{n} rows of {row} {self} need {} bytes", n * bytes);
        assert!(importance.is_none_or(|x| x.len() == row), "importance is one number per column");
        let to = out.as_mut_ptr().cast();
        // SAFETY: `rows` holds n·row numbers, `importance` one per column, and `out` exactly the
        // bytes ggml writes, whose 16-bit halves x86-64 and AArch64 store at any address; none of our types
        // needs an importance matrix, so it may be null.
        let wrote = unsafe {
            sys::ggml_quantize_chunk(
                self.number(),
                rows.as_ptr(),
                to,
                0,
                n as i64,
                row as i64,
                importance.map_or(std::ptr::null(), <[f32]>::as_ptr),
            )
        };
        assert_eq!(wrote, out.len(), "ggml wrote another number of bytes than its table says");
    }

    /// The numbers that `bytes` stand for.
    ///
    /// # Panics
    /// If `bytes` is not a whole number of blocks, or for an integer type.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        assert!(self.is_float(), "{self} rows are not made of numbers");
        assert!(bytes.len().is_multiple_of(self.block_bytes()), "not a whole number of blocks");
        let n = bytes.len() / self.block_bytes() * self.block();
        if self == Self::F32 {
            return bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        }
        // Files of checkpoints have tensors anywhere; C's blocks are of words at most.
        let mut aligned = Vec::new();
        let bytes = if bytes.as_ptr().cast::<u32>().is_aligned() {
            bytes
        } else {
            aligned.resize(bytes.len() + align_of::<u32>(), 0);
            let start = aligned.as_ptr().align_offset(align_of::<u32>());
            aligned[start..][..bytes.len()].copy_from_slice(bytes);
            &aligned[start..][..bytes.len()]
        };
        let mut out = vec![0.0; n];
        // SAFETY: the traits are a constant table, and every float type but F32 has `to_float`.
        let to_float = unsafe { (*sys::ggml_get_type_traits(self.number())).to_float };
        let to_float = to_float.expect("ggml converts each of our types");
        // SAFETY: ggml reads whole blocks for n elements, which `bytes` holds, aligned, and writes n floats.
        unsafe { to_float(bytes.as_ptr().cast(), out.as_mut_ptr(), n as i64) };
        out
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * (1.0 + (i % 7) as f32)).collect()
    }

    fn error(dtype: DType, rows: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
        let mut bytes = vec![0; 4 * dtype.row_bytes(256).unwrap()];
        dtype.encode(rows, 256, importance, &mut bytes);
        rows.iter().zip(dtype.decode(&bytes)).map(|(a, b)| a - b).collect()
    }

    fn norm<'a>(x: impl IntoIterator<Item = &'a f32>) -> f32 {
        x.into_iter().map(|v| v * v).sum::<f32>().sqrt()
    }

    #[test]
    fn rows_survive_the_round_trip_as_well_as_their_type_allows() {
        for (dtype, relative) in [
            (DType::F32, 0.0),
            (DType::F16, 1e-3),
            (DType::BF16, 8e-3),
            (DType::Q8_0, 1e-2),
            (DType::Q6_K, 3e-2),
            (DType::Q5_K, 6e-2),
            (DType::Q4_K, 1e-1),
            (DType::Q4_0, 2e-1),
            (DType::IQ4_NL, 1e-1),
            (DType::IQ4_XS, 1e-1),
        ] {
            let rows = wave(4 * 256);
            let error = norm(&error(dtype, &rows, None)) / norm(&rows);
            assert!(error <= relative, "{dtype}: {error}");
        }
    }

    #[test]
    fn bytes_may_be_anywhere() {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_float()) {
            let mut bytes = vec![0; dtype.row_bytes(256).unwrap()];
            dtype.encode(&wave(256), 256, None, &mut bytes);
            let wanted = dtype.decode(&bytes);
            for shift in 1..4 {
                let moved = [&vec![0; shift], &bytes[..]].concat();
                assert_eq!(dtype.decode(&moved[shift..]), wanted, "{dtype}, {shift} bytes on");
            }
        }
    }

    /// Columns that count more are kept better, at the cost of the others.
    #[test]
    fn importance_moves_the_error_to_where_it_matters_less() {
        let counts = |column: usize| column.is_multiple_of(16);
        let importance: Vec<f32> =
            (0..256).map(|column| if counts(column) { 100.0 } else { 1.0 }).collect();
        for dtype in [DType::Q4_0, DType::IQ4_NL, DType::IQ4_XS, DType::Q4_K, DType::Q5_K] {
            let rows = wave(4 * 256);
            let of_those = |error: Vec<f32>| {
                norm(error.iter().enumerate().filter(|(i, _)| counts(i % 256)).map(|(_, e)| e))
            };
            let plain = of_those(error(dtype, &rows, None));
            let weighed = of_those(error(dtype, &rows, Some(&importance)));
            assert!(weighed < plain, "{dtype}: {weighed} against {plain}");
        }
    }

    #[test]
    fn numbers_are_ggmls_and_rows_are_whole_blocks() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_number(dtype.number()), Some(dtype));
        }
        assert_eq!(DType::from_number(4), None, "removed from ggml");
        assert_eq!(DType::Q8_0.row_bytes(4304), None);
        assert_eq!(DType::Q8_0.row_bytes(4320), Some(135 * 34));
        assert_eq!(DType::F32.row_bytes(usize::MAX), None);
    }
}
