//! Which kernels a CPU computes with.

use std::fmt;
use std::str::FromStr;

use crate::own::isa::Isa;

/// Whose kernels a CPU computes with.
///
/// Our own are products of quantized matrices, which round as ggml does and differ in the order of sums; and where
/// there are no GPUs, for many rows, products of floats and attention, and GELU, in f32. Those of all instruction
/// sets compute the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Our own for the best instruction set that the CPU has, or ggml's if it has none.
    Fastest,
    /// Our own for AVX-512 with VNNI.
    Avx512Vnni,
    /// Our own for AVX2 with AVX-VNNI.
    AvxVnni,
    /// Our own for AVX2.
    Avx2,
    /// Our own for NEON with dot products (Armv8.2's `dotprod`). Nobody has measured their speed.
    NeonDotprod,
    /// ggml's, which are llama.cpp's to the bit.
    Ggml,
}

impl Kernels {
    /// The environment variable that names another default.
    pub const VARIABLE: &str = "OPENVLA_KERNELS";

    const ALL: [Self; 6] =
        [Self::Fastest, Self::Avx512Vnni, Self::AvxVnni, Self::Avx2, Self::NeonDotprod, Self::Ggml];

    /// All that this CPU can compute with, but for [`Kernels::Fastest`].
    pub fn available() -> Vec<Self> {
        let has_instructions = |kernels: &Self| match kernels {
            Self::Fastest => false,
            Self::Ggml => true,
            _ => kernels.isa().is_some(),
        };
        Self::ALL.into_iter().filter(has_instructions).collect()
    }

    /// What this CPU computes with if it is told to take these: never [`Kernels::Fastest`].
    pub fn resolve(self) -> Self {
        self.isa().map_or(Self::Ggml, Self::of)
    }

    /// The instruction set that our own kernels are to use, if any are and the CPU has it.
    pub(crate) fn isa(self) -> Option<Isa> {
        let named = |isa: &Isa| self == Self::Fastest || isa.name() == self.name();
        Isa::detect().into_iter().find(named)
    }

    /// Our own for an instruction set.
    fn of(isa: Isa) -> Self {
        Self::ALL.into_iter().find(|kernels| kernels.name() == isa.name()).expect("it has kernels")
    }

    /// The name that [`Kernels::from_str`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fastest => "fastest",
            Self::Avx512Vnni => "avx512-vnni",
            Self::AvxVnni => "avx-vnni",
            Self::Avx2 => "avx2",
            Self::NeonDotprod => "neon-dotprod",
            Self::Ggml => "ggml",
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

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kernels {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let name = if name.is_empty() { "fastest" } else { name };
        Self::ALL.into_iter().find(|kernels| kernels.name() == name).ok_or_else(|| {
            format!("`{name}` is not one of {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}
