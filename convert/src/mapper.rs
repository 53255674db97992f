//! Moves the tensors of a checkpoint to those of the file, one layer at a time, and checks their shapes.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use openvla_kernels::Shape;

use crate::aliases;

/// Shapes by tensor name, in PyTorch's order.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// What a tensor is for, which decides its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Norms, biases, positions, patch embeddings: small, and added or multiplied in f32.
    Plain,
    /// A tower's matrices.
    Vision,
    /// The projector's matrices.
    Projector,
    /// The table of token embeddings.
    Embedding,
    /// The Llama's matrices.
    Llama,
    /// The matrix that computes logits.
    Head,
    /// The head's rows for action tokens.
    ActionHead,
    /// The matrices of OpenVLA-OFT's head.
    OftHead,
    /// The projector of the arm's state.
    State,
}

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedTensor {
    /// Its name in the file.
    pub name: String,
    /// ggml's order, fastest first. Larger than its sources where those are padded with zeros.
    pub shape: Shape,
    /// What it is for.
    pub role: Role,
    /// The checkpoint's tensors, whose rows are concatenated.
    pub sources: Vec<String>,
    /// Rows of the sources to skip.
    pub first_row: usize,
    /// For q and k: the number of heads, whose rows are permuted from Hugging Face's RoPE pairs to
    /// llama.cpp's.
    pub rope_heads: Option<usize>,
}

/// The prefixes of the first and the second tower in a checkpoint.
pub(crate) const TOWERS: [&str; 2] =
    ["vision_backbone.featurizer", "vision_backbone.fused_featurizer"];

/// Moves tensors from `remaining` to `tensors` or `unused`.
pub(crate) struct Mapper {
    pub remaining: Shapes,
    pub tensors: Vec<MappedTensor>,
    pub unused: Vec<String>,
}

impl Mapper {
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        self.remaining.get(name).map(Vec::as_slice).with_context(|| {
            match aliases::explain(self.remaining.keys(), name) {
                Some(why) => format!("the checkpoint lacks the tensor {name}; {why}"),
                None => format!("the checkpoint lacks the tensor {name}"),
            }
        })
    }

    /// Removes a tensor, which must have `shape`, in PyTorch's order.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<()> {
        let found = self.shape(name)?;
        ensure!(found == shape, "the tensor {name} has shape {found:?}, {shape:?} is needed");
        self.remaining.remove(name);
        Ok(())
    }

    pub fn add(&mut self, name: String, shape: &[usize], role: Role, sources: &[String]) {
        let (shape, sources) = (openvla_kernels::shape(shape), sources.to_vec());
        self.tensors.push(MappedTensor {
            name,
            shape,
            role,
            sources,
            first_row: 0,
            rope_heads: None,
        });
    }

    /// Maps a vector of `found` numbers, padded with zeros to `n`.
    pub fn vector(&mut self, to: &str, from: &str, found: usize, n: usize) -> Result<()> {
        self.take(from, &[found])?;
        self.add(to.into(), &[n], Role::Plain, &[from.into()]);
        Ok(())
    }

    /// Maps a linear layer's matrix `[n_out, n_in]`, padded with zeros to `padded`, and its bias.
    pub fn linear(
        &mut self,
        to: &str,
        from: &str,
        role: Role,
        [n_in, n_out]: [usize; 2],
        padded: [usize; 2],
    ) -> Result<()> {
        let weight = format!("{from}.weight");
        self.take(&weight, &[n_out, n_in])?;
        self.add(format!("{to}.weight"), &padded, role, &[weight]);
        self.vector(&format!("{to}.bias"), &format!("{from}.bias"), n_out, padded[1])
    }

    pub fn norm(&mut self, to: &str, from: &str, dim: usize) -> Result<()> {
        for part in ["weight", "bias"] {
            self.vector(&format!("{to}.{part}"), &format!("{from}.{part}"), dim, dim)?;
        }
        Ok(())
    }

    pub fn drop_matching(&mut self, unused: impl Fn(&str) -> bool) {
        let (out, left) =
            std::mem::take(&mut self.remaining).into_iter().partition(|(n, _)| unused(n));
        self.remaining = left;
        self.unused.extend(Shapes::into_keys(out));
    }

    pub fn matrix(
        &mut self,
        to: &str,
        from: &str,
        role: Role,
        [n_in, n_out]: [usize; 2],
    ) -> Result<()> {
        self.take(from, &[n_out, n_in])?;
        self.add(format!("{to}.weight"), &[n_in, n_out], role, &[from.into()]);
        Ok(())
    }

    /// Marks the tensor added last as one whose heads are rotated by RoPE.
    pub fn set_rope_heads(&mut self, n_head: usize) {
        self.tensors.last_mut().expect("one was added").rope_heads = Some(n_head);
    }
}
