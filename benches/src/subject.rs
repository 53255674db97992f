//! What is measured: a policy of either kind, as stages with their times and their work.

use std::path::Path;

use anyhow::Result;
use openvla::{Config, Options, Policy, Usage};
use openvla_convert::inspect::Inspection;

use crate::results::Chunks;
use crate::work::{self, Work};
use crate::workload::{OftWorkload, Workload};

/// A policy, ready to act, and what it is given.
// One is as large as the other, and there is one in a program.
#[expect(clippy::large_enum_variant, reason = "there is one of it in a program")]
pub enum Subject {
    /// A motion for a picture.
    OpenVla(Workload),
    /// A chunk of actions for the pictures of several cameras.
    Oft(OftWorkload),
}

/// What one control step came to.
pub struct Sample {
    /// The numbers that the model gave, between -1 and 1: the same in every repetition, or a time says nothing.
    pub given: Vec<f64>,
    /// Milliseconds of each of [`Subject::stages`].
    pub ms: Vec<f64>,
}

/// A stage of a control step.
pub struct Part {
    /// See [`crate::results::Stage`].
    pub name: &'static str,
    /// Rows that it computes, where there are any.
    pub rows: Option<usize>,
    /// What it has to do.
    pub work: Work,
}

/// Runs a stage once.
pub type Run<'a> = &'a mut dyn FnMut() -> openvla::Result<()>;

impl Subject {
    /// Opens a model file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn open(model: &Path, options: &Options, instruction: &str) -> Result<Self> {
        Ok(match Policy::open(model, options)? {
            Policy::OpenVla(policy) => Self::OpenVla(Workload::new(policy, instruction)?),
            Policy::Oft(policy) => Self::Oft(OftWorkload::new(policy, instruction)?),
        })
    }

    /// One control step.
    ///
    /// # Errors
    /// What the model says.
    pub fn act(&mut self) -> Result<Sample> {
        match self {
            Self::OpenVla(workload) => {
                let (action, n_step) = (workload.act()?, workload.n_step().max(1));
                let t = action.timing_ms;
                let token = t.decode / n_step as f64;
                let ms = [t.preprocess, t.vision, t.projector, t.prefill, token, t.decode, t.total];
                Ok(Sample { given: action.normalized, ms: ms.into() })
            }
            Self::Oft(workload) => {
                let chunk = workload.act()?;
                let t = chunk.timing_ms;
                let ms = [t.preprocess, t.vision, t.projector, t.llama, t.head, t.total];
                Ok(Sample { given: chunk.normalized.concat(), ms: ms.into() })
            }
        }
    }

    /// Hands each stage of a step to `measure`, in order, with the name that [`Subject::stages`] has for it: to be run as
    /// often as one likes, on what the stage before left.
    ///
    /// # Errors
    /// What the model says, or `measure`.
    pub fn each_stage(
        &mut self,
        mut measure: impl FnMut(&'static str, Run<'_>) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::OpenVla(workload) => {
                let n_step = workload.n_step();
                let Workload { policy, image, ids, .. } = workload;
                let config = policy.config().clone();
                let token = config.actions.ids().start;
                measure("preprocess", &mut || config.preprocess.planes(image).map(drop))?;
                let planes = config.preprocess.planes(image)?;
                let network = policy.network();
                measure("vision", &mut || network.encode(&planes).map(drop))?;
                let features = network.encode(&planes)?;
                measure("projector", &mut || network.project(&features).map(drop))?;
                let soft = network.project(&features)?;
                measure("prefill", &mut || network.prefill(ids, &soft).map(drop))?;
                let mut sequence = network.prefill(ids, &soft)?;
                measure("decode", &mut || {
                    for _ in 0..n_step {
                        sequence.step(token)?;
                    }
                    sequence.forget(n_step);
                    Ok(())
                })
            }
            Self::Oft(workload) => {
                let OftWorkload { policy, images, ids, .. } = workload;
                let config = policy.config().clone();
                let state = vec![0.0; policy.oft().n_state];
                let mut planes = Vec::new();
                measure("preprocess", &mut || {
                    planes.clear();
                    for image in images.iter() {
                        planes.extend(config.preprocess.planes(image)?);
                    }
                    Ok(())
                })?;
                let network = policy.network();
                measure("vision", &mut || network.encode(&planes, ids).map(drop))?;
                let features = network.encode(&planes, ids)?;
                measure("projector", &mut || network.project(&features).map(drop))?;
                let soft = network.project(&features)?;
                measure("forward", &mut || network.forward(ids, &soft, &state).map(drop))?;
                let hidden = network.forward(ids, &soft, &state)?;
                measure("head", &mut || network.actions(&hidden).map(drop))
            }
        }
    }

    /// The stages of a step, in order, the whole last.
    pub fn stages(&self, file: &Inspection) -> Vec<Part> {
        let part = |name, rows: usize, work| Part { name, rows: Some(rows), work };
        let whole = |name, work| Part { name, rows: None, work };
        let config = self.config();
        let preprocess = whole("preprocess", Work::default());
        match self {
            Self::OpenVla(workload) => {
                let (n_row, n_step) = (workload.n_row(), workload.n_step());
                let n_patch = config.n_patch();
                let (vision, projector) =
                    (work::vision(config, file, 1), work::projector(config, file, 1));
                let prefill = work::prefill(config, file, n_row);
                let token = work::decode_step(config, file, n_row);
                let decode = token * n_step;
                vec![
                    preprocess,
                    part("vision", n_patch, vision),
                    part("projector", n_patch, projector),
                    part("prefill", n_row, prefill),
                    part("decode_token", 1, token),
                    part("decode", n_step, decode),
                    whole("step", [vision, projector, prefill, decode].into_iter().sum()),
                ]
            }
            Self::Oft(workload) => {
                let (oft, n_camera) = (workload.policy.oft(), workload.images.len());
                let (n_patch, n_row, n_slot) = (workload.n_patch(), workload.n_row(), oft.n_slot());
                let vision = work::vision(config, file, n_camera);
                let projector = work::projector(config, file, n_camera);
                let (forward, head) =
                    (work::forward(config, file, n_row, oft), work::head(config, file, oft));
                vec![
                    preprocess,
                    part("vision", n_patch, vision),
                    part("projector", n_patch, projector),
                    part("forward", n_row, forward),
                    part("head", n_slot, head),
                    whole("step", [vision, projector, forward, head].into_iter().sum()),
                ]
            }
        }
    }

    /// What it sees and gives, if it gives chunks.
    pub fn chunks(&self) -> Option<Chunks> {
        let Self::Oft(workload) = self else { return None };
        Some(Chunks { cameras: workload.images.len(), actions: workload.policy.oft().chunk })
    }

    /// What the model file says about itself.
    pub fn config(&self) -> &Config {
        match self {
            Self::OpenVla(workload) => workload.policy.config(),
            Self::Oft(workload) => workload.policy.config(),
        }
    }

    /// What the model takes on each device: the GPUs, then the CPU.
    pub fn usage(&self) -> Vec<Usage> {
        match self {
            Self::OpenVla(workload) => workload.policy.usage(),
            Self::Oft(workload) => workload.policy.usage(),
        }
    }
}
