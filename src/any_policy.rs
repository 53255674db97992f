//! A policy of either kind, for programs that take whatever a file holds.

use std::path::Path;

use openvla_kernels::{Gguf, Usage};

use crate::Result;
use crate::config::Config;
use crate::oft::OpenVlaOft;
use crate::options::Options;
use crate::policy::OpenVla;

/// The policy of a model file.
// One is as large as the other, and there is one in a program.
#[expect(clippy::large_enum_variant, reason = "there is one of it in a program")]
pub enum Policy {
    /// One motion for one picture.
    OpenVla(OpenVla),
    /// A chunk of actions for the pictures of several cameras.
    Oft(OpenVlaOft),
}

impl Policy {
    /// Opens a model file that `openvla-convert` wrote.
    ///
    /// # Errors
    /// As [`OpenVla::open`].
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        Self::load(&Gguf::open(path.as_ref())?, options)
    }

    /// Opens a model file that is part of the program; `name` is shown as its path in messages.
    ///
    /// # Errors
    /// As [`OpenVla::open`].
    pub fn built_in(name: &str, bytes: &'static [u8], options: &Options) -> Result<Self> {
        Self::load(&Gguf::built_in(name, bytes)?, options)
    }

    /// Opens a model file whose header has been read.
    ///
    /// # Errors
    /// As [`OpenVla::open`].
    pub fn load(file: &Gguf, options: &Options) -> Result<Self> {
        let config = options.config(file)?;
        Ok(if config.oft.is_some() {
            Self::Oft(OpenVlaOft::load(file, config, options)?)
        } else {
            Self::OpenVla(OpenVla::load(file, config, options)?)
        })
    }

    /// What the model file says about itself.
    pub fn config(&self) -> &Config {
        match self {
            Self::OpenVla(policy) => policy.config(),
            Self::Oft(policy) => policy.config(),
        }
    }

    /// What the model takes on each device: the GPUs, then the CPU.
    pub fn usage(&self) -> Vec<Usage> {
        match self {
            Self::OpenVla(policy) => policy.usage(),
            Self::Oft(policy) => policy.usage(),
        }
    }
}
