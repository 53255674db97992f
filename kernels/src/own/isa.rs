//! The instruction sets that we have kernels for, and which of them this CPU has.

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::simd::Simd;

/// An instruction set that this CPU has.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2<false>),
    #[cfg(target_arch = "aarch64")]
    NeonDotprod(Neon),
}

impl Isa {
    /// Those that this CPU has, the fastest first.
    pub fn detect() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let all = [
            Avx512::detect().map(Self::Avx512Vnni),
            Avx2::<true>::detect().map(Self::AvxVnni),
            Avx2::<false>::detect().map(Self::Avx2),
        ];
        #[cfg(target_arch = "aarch64")]
        let all = [Neon::detect().map(Self::NeonDotprod)];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let all = [None];
        all.into_iter().flatten().collect()
    }

    /// Runs `task` with the type of the instruction set.
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(unused_variables))]
    pub fn dispatch<T: Task>(self, task: T) -> T::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(s) => task.run(s),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(s) => task.run(s),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => task.run(s),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod(s) => task.run(s),
        }
    }

    /// Its name for users.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(_) => "avx-vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod(_) => "neon-dotprod",
        }
    }
}

/// Something that is done for some instruction set.
pub(crate) trait Task {
    type Output;

    fn run<S: Simd>(self, s: S) -> Self::Output;
}
