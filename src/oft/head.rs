//! The heads: hidden rows to actions.
//!
//! in   `[dim, n_action · chunk]`  a row for each number of each action, step by step
//! out  `[n_action, chunk]`        L1: numbers, about -1..1
//!      `[n_vocab, n_action · chunk]`  tokens: logits
//!
//! ref: openvla-oft `L1RegressionActionHead`, `MLPResNet`; `OpenVLAForActionPrediction._regression_or_discrete_prediction`

use openvla_kernels::{Builder, Shape, State, Tensor, Weights, shape};

use crate::Result;
use crate::config::{Config, OftConfig, OftHead};
use crate::layers::{LayerNorm, Linear};
use crate::llama::LmHead;

/// torch's default, unlike the towers' 1e-6.
const EPS: f32 = 1e-5;

pub(super) enum Head {
    L1(Box<Mlp>),
    Tokens(LmHead),
}

/// An MLP with two residual blocks over the rows of one time step side by side.
pub(super) struct Mlp {
    norm1: LayerNorm,
    fc1: Linear,
    blocks: [(LayerNorm, Linear); 2],
    norm2: LayerNorm,
    fc2: Linear,
    oft: OftConfig,
}

impl Head {
    /// More than the graph nodes that [`Head::build`] makes.
    pub const MAX_NODES: usize = 64;

    pub fn load(w: &mut Weights, c: &Config, oft: &OftConfig) -> Result<Self> {
        Ok(match oft.head {
            OftHead::L1 => Self::L1(Box::new(Mlp::load(w, c.llama.dim, oft)?)),
            OftHead::Tokens => Self::Tokens(LmHead::load(w, c)?),
        })
    }

    /// Sizes of what [`Head::build`] stores.
    pub fn shape(&self, n_slot: usize) -> Shape {
        match self {
            Self::L1(mlp) => shape(&[mlp.oft.n_action, mlp.oft.chunk]),
            Self::Tokens(head) => shape(&[head.n_vocab(), n_slot]),
        }
    }

    /// Stores what it makes of hidden rows `x`.
    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>, out: &State) {
        match self {
            Self::L1(mlp) => g.compute_in(mlp.build(g, x), g.state(out)),
            Self::Tokens(head) => head.build(g, x, out),
        }
    }

    /// A weight on the device that the head is on.
    pub fn weight(&self) -> &openvla_kernels::Weight {
        match self {
            Self::L1(mlp) => mlp.fc1.weight(),
            Self::Tokens(head) => head.weight(),
        }
    }
}

impl Mlp {
    pub fn load(w: &mut Weights, dim: usize, oft: &OftConfig) -> Result<Self> {
        let (n_in, n_action) = (dim * oft.n_action, oft.n_action);
        let name = |part: &str| format!("oft.head.{part}");
        let mut block = |i: usize| {
            let norm = LayerNorm::load(w, &name(&format!("blk.{i}.ln")), dim, EPS)?;
            Ok::<_, crate::Error>((norm, Linear::load(w, &name(&format!("blk.{i}.fc")), dim, dim)?))
        };
        let blocks = [block(0)?, block(1)?];
        Ok(Self {
            norm1: LayerNorm::load(w, &name("ln1"), n_in, EPS)?,
            fc1: Linear::load(w, &name("fc1"), n_in, dim)?,
            blocks,
            norm2: LayerNorm::load(w, &name("ln2"), dim, EPS)?,
            fc2: Linear::load(w, &name("fc2"), dim, n_action)?,
            oft: oft.clone(),
        })
    }

    /// `[dim, n_action · chunk] → [n_action, chunk]`
    pub fn build<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Tensor<'g> {
        let steps = x.reshape(&[x.shape()[0] * self.oft.n_action, self.oft.chunk]);
        let x = self.fc1.build(g, self.norm1.build(g, steps)).relu(); // [dim, chunk]
        let x = self
            .blocks
            .iter()
            .fold(x, |x, (norm, linear)| x + linear.build(g, norm.build(g, x)).relu());
        self.fc2.build(g, self.norm2.build(g, x))
    }
}
