//! The instruction sets that we have kernels for, and which of them this CPU has.

#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::simd::Simd;

/// An instruction set that this CPU has.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512),
}

impl Isa {
    /// The fastest one that this CPU has.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return Avx512::detect().map(Self::Avx512Vnni);
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// Runs `task` with the type of the instruction set.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
    pub fn dispatch<T: Task>(self, task: T) -> T::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(s) => task.run(s),
        }
    }
}

/// Something that is done for some instruction set.
pub(crate) trait Task {
    type Output;

    fn run<S: Simd>(self, s: S) -> Self::Output;
}
