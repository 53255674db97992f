//! The files of an OpenVLA-OFT run that OpenVLA's checkpoints lack: PyTorch files with the head, the state's projector,
//! and the towers if they have FiLM.
//!
//! ref: openvla-oft `experiments/robot/openvla_utils.py` `find_checkpoint_file`

use std::path::Path;

use anyhow::{Result, bail, ensure};

use crate::tensors::Tensors;

/// Prefixes of the tensors of each file, once they are with the checkpoint's.
pub const HEAD: &str = "action_head.";
/// See [`HEAD`].
pub const STATE: &str = "proprio_projector.";
/// See [`HEAD`]: the towers' names have it already.
pub const VISION: &str = "vision_backbone.";

/// The files of a run that OpenVLA's checkpoints lack, by their names in its folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunFiles {
    /// `action_head--150000_checkpoint.pt`
    head: Option<String>,
    /// `proprio_projector--…`, of those that read the arm's state.
    state: Option<String>,
    /// `vision_backbone--…`, of those whose instruction modulates the towers.
    vision: Option<String>,
}

impl RunFiles {
    /// Finds them among the names in a folder; none if it is not a run.
    ///
    /// # Errors
    /// If there are two for one part, or if it is a run with a diffusion head.
    pub fn find(folder: &str, names: &[String]) -> Result<Option<Self>> {
        let part = |part: &str| {
            let is_it = |name: &&String| {
                name.contains(part) && name.contains("checkpoint") && name.ends_with(".pt")
            };
            let found: Vec<&String> = names.iter().filter(is_it).collect();
            match found[..] {
                [] => Ok(None),
                [name] => Ok(Some(name.clone())),
                [one, other, ..] => bail!(
                    "{folder} holds {one} and {other}, one of which is of another step of training; leave the \
                     one that belongs to the weights"
                ),
            }
        };
        if let Some(name) = part("noisy_action_projector")? {
            bail!("{folder} holds {name}: {DIFFUSION}");
        }
        let (head, state) = (part("action_head")?, part("proprio_projector")?);
        let files = Self { head, state, vision: part("vision_backbone")? };
        Ok((files != Self::default()).then_some(files))
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        [&self.head, &self.state, &self.vision].into_iter().flatten().map(String::as_str)
    }

    /// Reads the files and adds their tensors to the checkpoint's. The towers of a run with FiLM are those of its file:
    /// the checkpoint's are the base model's.
    ///
    /// # Errors
    /// Names a file that cannot be read, or a head that is not supported.
    pub fn add_to(&self, tensors: &mut Tensors, dir: &Path) -> Result<()> {
        if let Some(name) = &self.head {
            tensors.add_torch(&dir.join(name), HEAD)?;
            let is_diffusion =
                tensors.entries().keys().any(|name| name.contains("noise_predictor."));
            ensure!(!is_diffusion, "{}: {DIFFUSION}", dir.join(name).display());
        }
        if let Some(name) = &self.state {
            tensors.add_torch(&dir.join(name), STATE)?;
        }
        if let Some(name) = &self.vision {
            tensors.remove(|name| name.starts_with(VISION));
            tensors.add_torch(&dir.join(name), "")?;
            tensors.rename(unwrapped);
        }
        Ok(())
    }
}

/// What is said of a run with a diffusion head.
const DIFFUSION: &str = "its head is a diffusion model, which takes 50 passes for a chunk and is not run by this \
     version; OpenVLA-OFT's published runs have an L1 head";

/// A tower's tensor by the name that it has without FiLM and LoRA: both wrap what they change.
fn unwrapped(name: &str) -> String {
    if !name.starts_with(VISION) {
        return name.to_owned();
    }
    name.replace(".block.", ".").replace(".base_layer.", ".").replace(".default.weight", ".weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_as_the_reference_finds_them() {
        let find = |names: &str| {
            RunFiles::find("X", &names.split(' ').map(String::from).collect::<Vec<_>>())
        };
        assert_eq!(find("config.json model.safetensors").unwrap(), None);
        let files = find("action_head--latest_checkpoint.pt a.txt").unwrap().unwrap();
        assert_eq!(files.head.as_deref(), Some("action_head--latest_checkpoint.pt"));
        let twice = find("action_head--1_checkpoint.pt action_head--2_checkpoint.pt");
        assert!(twice.unwrap_err().to_string().contains("of another step"));
        let diffusion = find("noisy_action_projector--1_checkpoint.pt").unwrap_err();
        assert!(diffusion.to_string().contains("diffusion"));
    }

    #[test]
    fn names_of_wrapped_towers_are_the_plain_ones() {
        for (wrapped, plain) in [
            (
                "featurizer.blocks.0.block.attn.qkv.base_layer.weight",
                "featurizer.blocks.0.attn.qkv.weight",
            ),
            (
                "featurizer.blocks.0.block.mlp.fc1.lora_A.default.weight",
                "featurizer.blocks.0.mlp.fc1.lora_A.weight",
            ),
            ("fused_featurizer.blocks.1.scale.weight", "fused_featurizer.blocks.1.scale.weight"),
            ("featurizer.patch_embed.proj.base_layer.bias", "featurizer.patch_embed.proj.bias"),
        ] {
            assert_eq!(unwrapped(&format!("{VISION}{wrapped}")), format!("{VISION}{plain}"));
        }
        assert_eq!(unwrapped("language_model.block.x"), "language_model.block.x");
    }
}
