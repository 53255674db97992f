//! Which random checkpoint: all that its bytes depend on.

use clap::ValueEnum;

use super::size::Size;
use crate::oft::{Platform, RunOptions};

/// Which published checkpoint to imitate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// Like `openvla-7b`: DINOv2 and SigLIP fused, image squeezed to a square, both tokenizer
    /// files.
    #[value(name = "openvla")]
    OpenVla,
    /// Like `openvla-v01-7b`: SigLIP alone, image letterboxed, the Vicuna prompt, a projector of
    /// two layers, `tokenizer.model` alone, and three data sets of 7, 6 and 14 dimensions.
    V01,
    /// Like OpenVLA-OFT's runs for LIBERO: as `OpenVla`, with an L1 head, a projector of the arm's state, and this many
    /// cameras. A model file alone: a checkpoint would have PyTorch's files too, which nothing here writes.
    #[value(skip)]
    Oft {
        /// The third-person one, then those on wrists.
        n_camera: usize,
    },
}

impl Variant {
    /// The platform of an OpenVLA-OFT run, whose constants the sizes of its tensors are.
    pub(crate) const PLATFORM: Platform = Platform::Libero;

    /// What no file of an OpenVLA-OFT run says.
    pub(crate) fn run(self) -> Option<RunOptions> {
        let Self::Oft { n_camera } = self else { return None };
        let (platform, n_camera) = (Some(Self::PLATFORM), Some(n_camera));
        Some(RunOptions { platform, n_camera, ..RunOptions::default() })
    }
}

/// All that a random checkpoint depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// The imitated checkpoint.
    pub variant: Variant,
    /// The size.
    pub size: Size,
    /// The seed of the weights.
    pub seed: u64,
    /// The number of safetensors files. One is `model.safetensors`; more are numbered, have an index,
    /// and every decoder layer is spread over them. At full size there are three, as published.
    pub shards: usize,
}

impl Spec {
    /// The tiny checkpoint, which is committed as an example. Of the first hundred seeds, 33 makes the
    /// clearest choices (each token leads by 0.058 or more, for the tasks of the example's
    /// `expected.json`) among those that choose action tokens alone, and five different ones for the
    /// first task.
    pub const EXAMPLE: Self =
        Self { variant: Variant::OpenVla, size: Size::Tiny, seed: 33, shards: 1 };

    /// The name of the checkpoint's folder; at full size, that of the published repository.
    pub fn folder(&self) -> &'static str {
        match (self.size, self.variant) {
            (Size::Full, Variant::OpenVla) => "openvla-7b",
            (Size::Full, Variant::V01) => "openvla-v01-7b",
            (Size::Full, Variant::Oft { .. }) => "openvla-7b-oft",
            _ => "openvla-example",
        }
    }
}
