//! The encoder on the devices that it was placed on: vision towers and projector, from planes to soft tokens.
//!
//! ```text
//! planes [size, size, 3 · n_tower · n_camera] ─vision→ features [Σ dim, n_patch · n_camera] ─projector→ soft [dim, n_patch · n_camera]
//! ```
//!
//! Each camera's planes go through the towers alone, and patches of one camera follow those of another. Both stages
//! are graphs that are built once, and return proof that they ran: what they computed stays on the device.

use std::sync::Arc;

use openvla_kernels::{Backend, Builder, DType, Graph, State, shape};

use crate::Result;
use crate::config::Config;
use crate::projector::Projector;
use crate::vision::{Modulation, Vision};

/// Patch features, on the device until the next picture: the vision towers ran.
#[derive(Debug)]
#[must_use]
pub struct Features(());

/// Soft tokens, on the device until the next picture: the projector ran.
#[derive(Debug)]
#[must_use]
pub struct SoftTokens(());

/// FiLM's scale and shift of a tower's block, by their numbers.
pub(crate) type Film<'f> = dyn for<'g> Fn(&'g Builder, usize, usize) -> Modulation<'g> + 'f;

pub(crate) struct Encoder {
    planes: State,
    features: State,
    soft: State,
    vision: Graph,
    projector: Graph,
}

impl Encoder {
    /// Builds the graphs for the pictures of `n_camera` cameras.
    pub fn new(
        backend: &Arc<Backend>,
        config: &Config,
        n_camera: usize,
        vision: &Vision,
        film: &Film<'_>,
        projector: &Projector,
    ) -> Result<Self> {
        let (size, n_patch) = (config.preprocess.size as usize, config.n_patch());
        let n_plane = 3 * config.towers.len();
        let state = |dims: &[usize]| State::zeros(backend, DType::F32, shape(dims));
        let planes = state(&[size, size, n_plane * n_camera])?;
        let features = state(&[config.projector[0], n_patch * n_camera])?;
        let soft = state(&[config.llama.dim, n_patch * n_camera])?;
        let vision = Graph::build(backend, n_camera * (4 + vision.max_nodes()), |g| {
            for i in 0..n_camera {
                let seen = g.state(&planes).slice(2, n_plane * i, n_plane);
                let patches = g.state(&features).slice(1, n_patch * i, n_patch);
                let film = |tower, block| film(g, tower, block);
                g.compute_in(vision.build(g, seen, &film), patches);
            }
        })?;
        let projector = Graph::build(backend, projector.max_nodes(), |g| {
            g.compute_in(projector.build(g, g.state(&features)), g.state(&soft));
        })?;
        Ok(Self { planes, features, soft, vision, projector })
    }

    /// Vision: normalized planes to patch features.
    pub fn encode(&mut self, planes: &[f32]) -> Result<Features> {
        self.planes.write(planes);
        self.vision.compute()?;
        Ok(Features(()))
    }

    /// Projector: patch features to soft tokens.
    pub fn project(&mut self) -> Result<SoftTokens> {
        self.projector.compute()?;
        Ok(SoftTokens(()))
    }

    /// Takes soft tokens that come from elsewhere.
    pub fn set_soft_tokens(&mut self, soft: &[f32]) -> SoftTokens {
        let n = self.soft.shape().iter().product::<usize>();
        assert_eq!(soft.len(), n, "soft tokens of {:?}", self.soft.shape());
        self.soft.write(soft);
        SoftTokens(())
    }

    /// What vision left for the projector.
    pub fn features(&self) -> &State {
        &self.features
    }

    /// What the projector left for the Llama.
    pub fn soft(&self) -> &State {
        &self.soft
    }
}
