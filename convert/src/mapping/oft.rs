//! The rows of the table that only OpenVLA-OFT runs have: head, state's projector, FiLM.
//!
//! ref: openvla-oft `prismatic/models/action_heads.py`, `projectors.py`, `film_vit_wrapper.py`

use anyhow::{Result, ensure};
use openvla::{OftHead, TowerConfig};

use crate::lora;
use crate::mapper::{Mapper, Role, TOWERS};
use crate::run_files;

/// What the tensors of a run tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunTensors {
    /// What makes actions.
    pub head: OftHead,
    /// Numbers of an action, if the head tells.
    pub n_action: Option<usize>,
    /// Numbers of the arm's state; 0 if it is not read.
    pub n_state: usize,
    /// Whether the instruction modulates the towers.
    pub film: bool,
}

impl Mapper {
    /// Maps what is left of a run when everything that an OpenVLA has is mapped; `dim` is the Llama's width.
    pub(super) fn run(&mut self, towers: &[TowerConfig], dim: usize) -> Result<RunTensors> {
        let n_action = self.l1_head(dim)?;
        let n_state = self.state_projector(dim)?;
        let has_film =
            |name: &String| name.starts_with(run_files::VISION) && name.contains(".scale.");
        let film = self.remaining.keys().any(has_film);
        if film {
            for (tower, from) in towers.iter().zip(TOWERS) {
                self.film(tower, from, dim)?;
            }
            // They are added to the matrices that they belong to.
            self.remaining.retain(|name, _| !lora::is_half(name));
        }
        let head = if n_action.is_some() { OftHead::L1 } else { OftHead::Tokens };
        Ok(RunTensors { head, n_action, n_state, film })
    }

    /// The L1 head; returns the numbers of an action, or nothing if there is no head.
    fn l1_head(&mut self, dim: usize) -> Result<Option<usize>> {
        let from = |part: &str| format!("{}model.{part}", run_files::HEAD);
        if !self.remaining.keys().any(|name| name.starts_with(run_files::HEAD)) {
            return Ok(None);
        }
        let n_action = self.shape(&from("fc2.weight"))?.first().copied().unwrap_or(0);
        let found = self.shape(&from("fc2.weight"))?.to_vec();
        ensure!(
            found == [n_action, dim],
            "the head's {} has shape {found:?}, but the Llama's rows have {dim} numbers; is the head another model's?",
            from("fc2.weight")
        );
        let to = |part: &str| format!("oft.head.{part}");
        let n_in = dim * n_action;
        self.norm(&to("ln1"), &from("layer_norm1"), n_in)?;
        self.linear(&to("fc1"), &from("fc1"), Role::OftHead, [n_in, dim], [n_in, dim])?;
        for i in 0..2 {
            let part = |inner: usize| from(&format!("mlp_resnet_blocks.{i}.ffn.{inner}"));
            self.norm(&to(&format!("blk.{i}.ln")), &part(0), dim)?;
            let name = to(&format!("blk.{i}.fc"));
            self.linear(&name, &part(1), Role::OftHead, [dim, dim], [dim, dim])?;
        }
        self.norm(&to("ln2"), &from("layer_norm2"), dim)?;
        self.linear(&to("fc2"), &from("fc2"), Role::OftHead, [dim, n_action], [dim, n_action])?;
        Ok(Some(n_action))
    }

    /// The projector of the arm's state; returns the numbers of a state, 0 if there is none.
    fn state_projector(&mut self, dim: usize) -> Result<usize> {
        let from = |part: &str| format!("{}{part}", run_files::STATE);
        if !self.remaining.keys().any(|name| name.starts_with(run_files::STATE)) {
            return Ok(0);
        }
        let n_state = self.shape(&from("fc1.weight"))?.get(1).copied().unwrap_or(0);
        let size = [n_state, dim];
        self.linear("oft.state.fc1", &from("fc1"), Role::State, size, size)?;
        self.linear("oft.state.fc2", &from("fc2"), Role::State, [dim, dim], [dim, dim])?;
        Ok(n_state)
    }

    fn film(&mut self, tower: &TowerConfig, from: &str, dim: usize) -> Result<()> {
        let size = [dim, tower.dim];
        for i in 0..tower.n_layer {
            for part in ["scale", "shift"] {
                let to = format!("{}.blk.{i}.film_{part}", tower.name);
                self.linear(&to, &format!("{from}.blocks.{i}.{part}"), Role::Vision, size, size)?;
            }
        }
        Ok(())
    }
}
