//! The sizes: small ones for tests, and the published model's.

use std::ops::Range;

use clap::ValueEnum;

/// The size of a random checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// 423 thousand weights: the committed checkpoint.
    Tiny,
    /// Tiny, but for heads as large as the published model's, 64, 72 and 128 numbers: towers of its width and
    /// one block, and a Llama of two narrow layers. 55 million weights.
    Heads,
    /// Tiny, but for a Llama of four layers whose rows are multiples of 256, as K-quants need.
    Wide,
    /// As wide as the published model, with its heads and pieces, but two blocks in each tower and two
    /// layers: 825 million weights.
    Slim,
    /// The published model's tensors, files and numbers of pieces: 7.54 billion weights, 15 GB.
    Full,
}

/// The numbers of a size.
pub struct Sizes {
    pub dinov2: Tower,
    pub siglip: Tower,
    pub llama: Llama,
    /// Pieces in all; `<PAD>` comes after them, outside the SentencePiece model.
    pub n_piece: usize,
    /// Id of the piece that is a space. The merged pieces come before it.
    pub space: usize,
    /// Deviation of the values that enter a residual stream. With few layers, as small as in trained
    /// models, so that the first norm's epsilon matters: 1e-5 in place of 1e-6 then shows in the logits.
    /// With many layers, large against their sum, or all random tokens would become alike.
    pub entry: f32,
    /// The factor by which the head's action rows are larger than the others: so much that the largest
    /// logit is nearly always theirs.
    pub action_gain: f32,
}

/// Sizes of one vision tower. It has 16 heads, which follows from its timm name, and one block more than
/// inference runs.
pub struct Tower {
    pub dim: usize,
    pub hidden: usize,
    pub depth: usize,
}

/// Sizes of the language model.
#[derive(Clone, Copy)]
pub struct Llama {
    pub dim: usize,
    /// Width of the MLP.
    pub hidden: usize,
    pub n_layer: usize,
    pub n_head: usize,
}

/// SigLIP's MLP is not a multiple of 32 wide, so `fc2` cannot be quantized as it is.
const TINY: Sizes = Sizes {
    dinov2: Tower { dim: 32, hidden: 128, depth: 2 },
    siglip: Tower { dim: 64, hidden: 80, depth: 2 },
    llama: Llama { dim: 64, hidden: 96, n_layer: 2, n_head: 2 },
    n_piece: 704,
    space: 352,
    entry: 0.03,
    action_gain: 1.6,
};

impl Size {
    /// The numbers of this size.
    pub(super) fn sizes(self) -> Sizes {
        match self {
            Self::Tiny => TINY,
            Self::Heads => {
                let Sizes { dinov2, siglip, .. } = Self::Full.sizes();
                Sizes {
                    dinov2: Tower { depth: 2, ..dinov2 },
                    siglip: Tower { depth: 2, ..siglip },
                    llama: Llama { dim: 512, hidden: 1024, n_layer: 2, n_head: 4 },
                    ..TINY
                }
            }
            Self::Wide => {
                Sizes { llama: Llama { dim: 256, hidden: 512, n_layer: 4, n_head: 4 }, ..TINY }
            }
            Self::Slim => {
                let Sizes { dinov2, siglip, llama, .. } = Self::Full.sizes();
                Sizes {
                    dinov2: Tower { depth: 3, ..dinov2 },
                    siglip: Tower { depth: 3, ..siglip },
                    llama: Llama { n_layer: 2, ..llama },
                    entry: TINY.entry,
                    ..Self::Full.sizes()
                }
            }
            Self::Full => Sizes {
                dinov2: Tower { dim: 1024, hidden: 4096, depth: 24 },
                siglip: Tower { dim: 1152, hidden: 4304, depth: 27 },
                llama: Llama { dim: 4096, hidden: 11_008, n_layer: 32, n_head: 32 },
                n_piece: 32_000,
                space: 29_871,
                entry: 2.0,
                action_gain: 2.4,
            },
        }
    }
}

impl Sizes {
    /// Rows of the embedding after the vocabulary: `<PAD>` and padding.
    pub const PADDING_ROWS: usize = 64;

    /// Rows of the embedding and of the head.
    pub fn n_row(&self) -> usize {
        self.n_piece + Self::PADDING_ROWS
    }

    /// Ids of the action tokens.
    pub fn actions(&self) -> Range<usize> {
        self.n_piece - 256..self.n_piece
    }
}
