//! Which kernels a CPU computes with.

use std::str::FromStr;

use crate::own::isa::Isa;

/// Whose kernels a CPU computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Our own where the CPU has AVX-512 VNNI, else ggml's: products of quantised matrices, which round
    /// as ggml does and differ in the order of sums; and where there are no GPUs, for many rows,
    /// products of floats and attention, and GELU, in f32.
    Fastest,
    /// ggml's, which are llama.cpp's to the bit.
    Ggml,
}

impl Kernels {
    /// The environment variable that names another default.
    pub const VARIABLE: &str = "OPENVLA_KERNELS";

    /// The instruction set that our own kernels are to use, if any are.
    pub(crate) fn isa(self) -> Option<Isa> {
        match self {
            Self::Fastest => Isa::detect(),
            Self::Ggml => None,
        }
    }
}

impl Default for Kernels {
    /// The fastest, or those that `$OPENVLA_KERNELS` names: so a whole test suite runs with either.
    ///
    /// # Panics
    /// If it names none.
    fn default() -> Self {
        match std::env::var(Self::VARIABLE) {
            Ok(name) => name.parse().unwrap_or_else(|why| panic!("{}: {why}", Self::VARIABLE)),
            Err(_) => Self::Fastest,
        }
    }
}

impl FromStr for Kernels {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "" | "fastest" => Ok(Self::Fastest),
            "ggml" => Ok(Self::Ggml),
            _ => Err(format!("`{name}` is not one of fastest, ggml")),
        }
    }
}
