//! OpenVLA-OFT: what a file says of a policy that gives a chunk of actions in one pass.
//!
//! No file of a checkpoint tells most of this: the converter takes it from its user.

use openvla_kernels::{Gguf, Header};

use super::check::demand;
use super::general::optional;
use crate::statistics::Bounds;
use crate::{Error, Result};

/// How an OpenVLA-OFT model sees, and what it gives.
#[derive(Debug, Clone, PartialEq)]
pub struct OftConfig {
    /// Actions of one pass: 8 for LIBERO, 25 for ALOHA.
    pub chunk: usize,
    /// Numbers of an action: 7; 14.
    pub n_action: usize,
    /// Numbers of the arm's state: 8; 14. 0 if the model reads none.
    pub n_state: usize,
    /// Names of the cameras, in the order of their patches; the first is the third-person one.
    pub cameras: Vec<String>,
    /// What -1 and 1 correspond to, in actions and state.
    pub bounds: Bounds,
    /// What makes actions of hidden rows.
    pub head: OftHead,
    /// Whether the instruction modulates the vision towers (FiLM, "OFT+").
    pub film: bool,
}

/// What makes actions of hidden rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OftHead {
    /// An MLP with residual blocks, trained with L1 loss: continuous actions.
    L1,
    /// The Llama's own head: action tokens, all in one pass.
    Tokens,
}

mod key {
    pub const CHUNK: &str = "openvla.oft.chunk_length";
    pub const N_ACTION: &str = "openvla.oft.action_length";
    pub const N_STATE: &str = "openvla.oft.state_length";
    pub const CAMERAS: &str = "openvla.oft.cameras";
    pub const BOUNDS: &str = "openvla.oft.bounds";
    pub const HEAD: &str = "openvla.oft.head";
    pub const FILM: &str = "openvla.oft.film";
}

/// More than any controller executes before it looks again; bounds the rows of a pass.
const MAX_CHUNK: usize = 256;
/// More than any robot of the data sets has.
const MAX_NUMBERS: usize = 64;

impl OftConfig {
    /// The most cameras: more than any robot of the data sets carries.
    pub const MAX_CAMERAS: usize = 8;

    /// Rows of a pass that are actions.
    pub fn n_slot(&self) -> usize {
        self.chunk * self.n_action
    }

    /// What belongs to cameras, such as pictures, in the order that the model was trained with: [`OftConfig::cameras`].
    ///
    /// # Errors
    /// [`Error::Observation`] names a camera that is missing, named twice, or not the model's.
    pub fn in_order<T: Copy>(&self, named: &[(&str, T)]) -> Result<Vec<T>> {
        let cameras = || self.cameras.join(", ");
        if let Some((name, _)) =
            named.iter().find(|(name, _)| !self.cameras.iter().any(|c| c == name))
        {
            let why = format!("there is no camera `{name}`; the model has {}", cameras());
            return Err(Error::Observation { why });
        }
        let of = |camera: &String| {
            let mut found = named.iter().filter(|(name, _)| name == camera);
            match (found.next(), found.next()) {
                (Some((_, one)), None) => Ok(*one),
                (None, _) => {
                    Err(format!("nothing of the camera `{camera}`; the model has {}", cameras()))
                }
                _ => Err(format!("the camera `{camera}` is named twice")),
            }
        };
        self.cameras
            .iter()
            .map(|camera| of(camera).map_err(|why| Error::Observation { why }))
            .collect()
    }

    /// That of a file, unless it is of an OpenVLA.
    pub(crate) fn read(file: &Gguf) -> Result<Option<Self>> {
        let Some(chunk) = optional::<u32>(file, key::CHUNK)? else { return Ok(None) };
        let size = |key| Ok::<_, Error>(file.get::<u32>(key)? as usize);
        Ok(Some(Self {
            chunk: chunk as usize,
            n_action: size(key::N_ACTION)?,
            n_state: size(key::N_STATE)?,
            cameras: file.get(key::CAMERAS)?,
            bounds: one_of(file, key::BOUNDS, &[Bounds::Quantiles, Bounds::Extremes])?,
            head: one_of(file, key::HEAD, &[OftHead::L1, OftHead::Tokens])?,
            film: file.get(key::FILM)?,
        }))
    }

    pub(super) fn write(&self, to: &mut Header) {
        to.set(key::CHUNK, self.chunk as u32);
        to.set(key::N_ACTION, self.n_action as u32);
        to.set(key::N_STATE, self.n_state as u32);
        to.set(key::CAMERAS, self.cameras.clone());
        to.set(key::BOUNDS, self.bounds.as_ref().to_owned());
        to.set(key::HEAD, self.head.as_ref().to_owned());
        to.set(key::FILM, self.film);
    }

    /// What graphs and arithmetic rely on.
    ///
    /// # Errors
    /// [`Error::Model`] names a number that cannot be.
    pub(super) fn check(&self, n_tower: usize, n_patch: usize, n_ctx: usize) -> Result<()> {
        for (key, n, [least, most]) in [
            (key::CHUNK, self.chunk, [1, MAX_CHUNK]),
            (key::N_ACTION, self.n_action, [1, MAX_NUMBERS]),
            (key::N_STATE, self.n_state, [0, MAX_NUMBERS]),
            (key::CAMERAS, self.cameras.len(), [1, Self::MAX_CAMERAS]),
        ] {
            demand((least..=most).contains(&n), || {
                format!("`{key}` is {n}; {least} to {most} is possible")
            })?;
        }
        let n_camera = self.cameras.len();
        // ref: `PrismaticVisionBackbone.forward` asserts as much
        demand(n_tower == 2 || n_camera == 1, || {
            format!("`{}` names {n_camera}; a model with one vision tower has one", key::CAMERAS)
        })?;
        let rows = n_patch * n_camera + self.n_slot() + usize::from(self.n_state > 0);
        demand(rows + MIN_TEXT < n_ctx, || {
            format!(
                "{n_camera} cameras and {} actions of {} are {rows} rows, which do not fit a context of {n_ctx}",
                self.chunk, self.n_action
            )
        })
    }
}

/// BOS, the suffix and the stop token.
const MIN_TEXT: usize = 3;

/// Which of the values a file names.
fn one_of<T: Copy + AsRef<str>>(file: &Gguf, key: &str, values: &[T]) -> Result<T> {
    let found: String = file.get(key)?;
    values.iter().copied().find(|value| value.as_ref() == found).ok_or_else(|| {
        let known: Vec<&str> = values.iter().map(AsRef::as_ref).collect();
        Error::Model { why: format!("`{key}` is `{found}`; {} is possible", known.join(" or ")) }
    })
}

impl AsRef<str> for OftHead {
    fn as_ref(&self) -> &str {
        match self {
            Self::L1 => "l1",
            Self::Tokens => "tokens",
        }
    }
}

impl AsRef<str> for Bounds {
    fn as_ref(&self) -> &str {
        match self {
            Self::Quantiles => "q99",
            Self::Extremes => "min-max",
        }
    }
}
