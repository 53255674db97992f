//! The type of each tensor, and why.
//!
//! | type | towers, projector | embeddings, Llama | more bits for `attn_v`, `ffn_down` | head | action head |
//! |---|---|---|---|---|---|
//! | F32, F16, BF16 | the type | the type | | the type | the type |
//! | Q8_0 | Q8_0 | Q8_0 | | Q8_0 | BF16 |
//! | Q6_K | Q8_0 | Q6_K | | Q6_K | BF16 |
//! | Q5_K_M | Q8_0 | Q5_K | Q6_K in half of the layers | Q6_K | BF16 |
//! | Q4_K_M | Q8_0 | Q4_K | Q6_K in half of the layers | Q6_K | BF16 |
//! | Q4_K_S | Q8_0 | Q4_K | Q5_K in the first eighth | Q6_K | BF16 |
//! | Q4_0 | Q8_0 | Q4_0 | | Q6_K | BF16 |
//! | IQ4_NL | Q8_0 | IQ4_NL | Q5_K in the first eighth | Q6_K | BF16 |
//! | IQ4_XS | Q8_0 | IQ4_XS | Q5_K in the first eighth | Q6_K | BF16 |
//!
//! - Norms, biases, positions and patch embeddings are always F32: 0.1 % of the parameters, which
//!   enter sums directly.
//! - Towers and projector are an eighth of the parameters, and everything depends on them: 8 bits.
//! - `attn_v` and `ffn_down` are the most sensitive; which layers get more bits, and how many, is
//!   llama.cpp's choice.
//! - The action head is 2 MB and decides between neighboring bins: it keeps the checkpoint's precision.
//!   The other rows of the head only tell whether a token that is not an action would have been chosen.
//! - OpenVLA-OFT's head has 8 bits, its state projector BF16. Alone in an F32 file, on the two reference cases of the
//!   trained example, they move the normalized actions by 0.7 % and 0.01 % of their size; the rest at Q4_K_M moves
//!   them by 2.5 %, with F32 in their place too. A head at IQ4_NL moves them by 4 %, for 75 MB less of 5.2 GB.
//!   Rows of 8 numbers, a state, are in no block.
//! - A row that is not a whole number of blocks falls back: from blocks of 256 to blocks of 32 with the
//!   same bits or more (Q4_K and IQ4_XS to IQ4_NL, Q5_K and Q6_K to Q8_0), and from those to F16.
//!
//! ref: llama.cpp `src/llama-quant.cpp`, `llama_tensor_get_type`

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use openvla_kernels::DType;
use regex::Regex;

use crate::mapper::{MappedTensor, Role};
use crate::mapping::{Mapping, component};

/// The type a file is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    /// llama.cpp's name.
    pub name: &'static str,
    /// llama.cpp's `llama_ftype` number.
    pub file_type: u32,
    /// The type of the embeddings and the Llama.
    body: DType,
    /// The layers whose `attn_v` and `ffn_down` get more bits, and their type.
    raised: Option<(RaisedLayers, DType)>,
}

/// The layers whose most sensitive tensors get more bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RaisedLayers {
    /// llama.cpp's `i < n/8`.
    FirstEighth,
    /// llama.cpp's `use_more_bits`: the first and the last eighth, and every third between.
    Half,
}

impl RaisedLayers {
    fn contain(self, i: usize, n: usize) -> bool {
        match self {
            Self::FirstEighth => i < n / 8,
            Self::Half => i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2,
        }
    }
}

const fn plain(name: &'static str, file_type: u32, body: DType) -> Encoding {
    Encoding { name, file_type, body, raised: None }
}

const fn mixed(
    name: &'static str,
    file_type: u32,
    body: DType,
    layers: RaisedLayers,
    to: DType,
) -> Encoding {
    Encoding { name, file_type, body, raised: Some((layers, to)) }
}

impl Encoding {
    /// The type that `--q4` stands for.
    const Q4: Self = mixed("Q4_K_M", 15, DType::Q4_K, RaisedLayers::Half, DType::Q6_K);

    /// All types.
    pub const ALL: [Self; 11] = [
        plain("F32", 0, DType::F32),
        plain("F16", 1, DType::F16),
        plain("BF16", 32, DType::BF16),
        plain("Q8_0", 7, DType::Q8_0),
        plain("Q6_K", 18, DType::Q6_K),
        mixed("Q5_K_M", 17, DType::Q5_K, RaisedLayers::Half, DType::Q6_K),
        Self::Q4,
        mixed("Q4_K_S", 14, DType::Q4_K, RaisedLayers::FirstEighth, DType::Q5_K),
        plain("Q4_0", 2, DType::Q4_0),
        mixed("IQ4_NL", 25, DType::IQ4_NL, RaisedLayers::FirstEighth, DType::Q5_K),
        mixed("IQ4_XS", 30, DType::IQ4_XS, RaisedLayers::FirstEighth, DType::Q5_K),
    ];

    /// The type of a tensor in a model of `n_layer` decoder layers.
    pub fn dtype(self, tensor: &MappedTensor, n_layer: usize) -> DType {
        let quantized = self.body.is_quantized();
        let at_least = |dtype| if quantized { dtype } else { self.body };
        let wanted = match tensor.role {
            Role::Plain => return DType::F32,
            Role::Vision | Role::Projector | Role::OftHead => at_least(DType::Q8_0),
            Role::State => at_least(DType::BF16),
            Role::Head if self.body != DType::Q8_0 => at_least(DType::Q6_K),
            Role::ActionHead => at_least(DType::BF16),
            Role::Embedding | Role::Llama | Role::Head => self.body,
        };
        let raised = self.raised.filter(|(layers, _)| {
            sensitive_layer(&tensor.name).is_some_and(|i| layers.contain(i, n_layer))
        });
        with_fallback(raised.map_or(wanted, |(_, to)| to), tensor.shape[0])
    }
}

/// The layer whose `attn_v` or `ffn_down` this is.
fn sensitive_layer(name: &str) -> Option<usize> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    ["attn_v.weight", "ffn_down.weight"].contains(&part).then(|| layer.parse().ok())?
}

/// The type itself, or its substitute for rows that are not a whole number of its blocks.
fn with_fallback(dtype: DType, row: usize) -> DType {
    if dtype.row_bytes(row).is_some() {
        return dtype;
    }
    match dtype {
        DType::Q4_K | DType::IQ4_XS => with_fallback(DType::IQ4_NL, row),
        DType::Q5_K | DType::Q6_K => with_fallback(DType::Q8_0, row),
        _ => DType::F16,
    }
}

impl Default for Encoding {
    fn default() -> Self {
        Self::Q4
    }
}

impl FromStr for Encoding {
    type Err = anyhow::Error;

    /// Parses a name, in upper or lower case.
    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|e| e.name.eq_ignore_ascii_case(name)) {
            Some(encoding) => Ok(encoding),
            None => {
                bail!("type {name} is unknown; there are {}", Self::ALL.map(|e| e.name).join(", "))
            }
        }
    }
}

/// `PATTERN=TYPE`: a type for the tensors whose names match a regular expression.
#[derive(Debug, Clone)]
pub struct Override {
    pattern: Regex,
    dtype: DType,
}

impl FromStr for Override {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (pattern, name) = text.rsplit_once('=').with_context(|| {
            format!("{text:?} is not PATTERN=TYPE, such as 'blk\\.0\\.ffn_down=Q6_K'")
        })?;
        let float = DType::ALL.into_iter().filter(|dtype| dtype.is_float());
        let known: Vec<String> = float.clone().map(|dtype| dtype.to_string()).collect();
        let dtype = float.into_iter().find(|dtype| dtype.to_string().eq_ignore_ascii_case(name));
        let dtype = dtype.with_context(|| {
            format!("{text:?}: tensor type {name} is unknown; there are {}", known.join(", "))
        })?;
        let pattern = Regex::new(pattern)
            .with_context(|| format!("{text:?}: {pattern:?} is not a regular expression"))?;
        Ok(Self { pattern, dtype })
    }
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// What it consists of.
    pub tensor: MappedTensor,
    /// Its type.
    pub dtype: DType,
}

/// Assigns every tensor its type: the encoding's, or that of the last override that matches its name.
///
/// # Errors
/// Names an override that matches no tensor, or whose blocks do not fit one of them.
pub fn plan(
    mapping: &Mapping,
    encoding: Encoding,
    overrides: &[Override],
) -> Result<Vec<PlannedTensor>> {
    let n_layer = mapping.llama.n_layer;
    let planned = |tensor: &MappedTensor| PlannedTensor {
        tensor: tensor.clone(),
        dtype: encoding.dtype(tensor, n_layer),
    };
    let mut plan: Vec<PlannedTensor> = mapping.tensors.iter().map(planned).collect();
    for Override { pattern, dtype } in overrides {
        let found = plan.iter_mut().filter(|p| pattern.is_match(&p.tensor.name));
        let mut matrices = found.filter(|p| p.tensor.role != Role::Plain).peekable();
        ensure!(
            matrices.peek().is_some(),
            "--tensor-type {pattern}={dtype}: matches no tensor whose type can be chosen; \
             --dry-run lists them"
        );
        for planned in matrices {
            let MappedTensor { name, shape, .. } = &planned.tensor;
            ensure!(
                dtype.row_bytes(shape[0]).is_some(),
                "--tensor-type {pattern}={dtype}: {name} has rows of {}, which is not a whole \
                 number of {dtype}'s blocks of {}",
                shape[0],
                dtype.block()
            );
            planned.dtype = *dtype;
        }
    }
    Ok(plan)
}

/// A table of tensors and bytes by component and type, with their sum.
pub fn summary(plan: &[PlannedTensor]) -> String {
    let mut groups: BTreeMap<(&str, DType), (usize, usize)> = BTreeMap::new();
    for planned in plan {
        let key = (component(&planned.tensor.name), planned.dtype);
        let (n, bytes) = groups.entry(key).or_default();
        *n += 1;
        *bytes += planned.bytes();
    }
    let line = |what: &str, dtype: &str, n: usize, bytes: usize| {
        format!("{what:<15} {dtype:<6} {n:>5} tensors {bytes:>14} bytes\n")
    };
    let lines = groups.iter().map(|((what, dtype), (n, bytes))| {
        let dtype = dtype.to_string();
        line(what, &dtype, *n, *bytes)
    });
    let total = line("all", "", plan.len(), plan.iter().map(PlannedTensor::bytes).sum());
    lines.chain([total]).collect()
}

impl PlannedTensor {
    /// Bytes per row in the file.
    pub fn row_bytes(&self) -> usize {
        self.dtype
            .row_bytes(self.tensor.shape[0])
            .expect("the plan falls back where it does not fit")
    }

    /// Rows in the file.
    pub fn n_row(&self) -> usize {
        self.tensor.shape[1..].iter().product()
    }

    /// Bytes in the file, without padding.
    pub fn bytes(&self) -> usize {
        self.row_bytes() * self.n_row()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, role: Role, row: usize) -> MappedTensor {
        let shape = [row, 1, 1, 1];
        MappedTensor {
            name: name.into(),
            shape,
            role,
            sources: vec![],
            first_row: 0,
            rope_heads: None,
        }
    }

    fn dtype(encoding: &str, name: &str, role: Role, row: usize) -> DType {
        encoding.parse::<Encoding>().unwrap().dtype(&tensor(name, role, row), 32)
    }

    #[test]
    fn q4_is_q4_k_m() {
        assert_eq!(Encoding::default().name, "Q4_K_M");
    }

    /// Counted on llama.cpp's own files of Llama-2-7B.
    #[test]
    fn raised_layers_are_llama_cpps() {
        let raised = |encoding: &str, tensor: &str| {
            let name = |i: usize| format!("blk.{i}.{tensor}.weight");
            let dtype = |i: usize| dtype(encoding, &name(i), Role::Llama, 4096);
            (0..32).filter(|i| dtype(*i) != dtype(4)).collect::<Vec<_>>()
        };
        let half = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31];
        for tensor in ["attn_v", "ffn_down"] {
            assert_eq!(raised("Q4_K_M", tensor), half);
            assert_eq!(raised("Q5_K_M", tensor), half);
            assert_eq!(raised("Q4_K_S", tensor), [0, 1, 2, 3]);
        }
        assert_eq!(raised("Q4_K_M", "attn_q"), [0; 0]);
        assert_eq!(dtype("Q4_K_M", "blk.0.attn_v.weight", Role::Llama, 4096), DType::Q6_K);
    }

    #[test]
    fn rows_that_do_not_fit_fall_back() {
        for (encoding, row, wanted) in [
            ("Q4_K_M", 4096, DType::Q4_K),
            ("Q4_K_M", 96, DType::IQ4_NL),
            ("Q4_K_M", 80, DType::F16),
            ("Q6_K", 96, DType::Q8_0),
            ("IQ4_XS", 96, DType::IQ4_NL),
        ] {
            assert_eq!(dtype(encoding, "blk.4.attn_q.weight", Role::Llama, row), wanted);
        }
        assert_eq!(dtype("Q4_K_M", "projector.fc1.weight", Role::Projector, 2176), DType::Q8_0);
    }

    #[test]
    fn the_action_head_keeps_its_precision() {
        let of = |encoding| dtype(encoding, "action_head.weight", Role::ActionHead, 4096);
        assert_eq!(["F32", "F16"].map(of), [DType::F32, DType::F16]);
        assert_eq!(["BF16", "Q8_0", "Q4_0"].map(of), [DType::BF16; 3]);
    }
}
