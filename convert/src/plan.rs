//! Which type each tensor gets, and why.
//!
//! | type | towers, projector | embeddings, Llama | raised: `attn_v`, `ffn_down` | head | action head |
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
//! - Norms, biases, positions and patch embeddings are F32 always: 0.1 % of the parameters, which
//!   enter sums directly.
//! - Towers and projector are an eighth of the parameters and everything depends on them: 8 bits.
//! - `attn_v` and `ffn_down` suffer most; which layers are raised, and to what, is llama.cpp's choice.
//! - The action head is 2 MB and decides between neighbouring bins: as the checkpoint has it. The
//!   other rows of the head only say whether something that is no action would have been chosen.
//! - A row that is no whole number of blocks falls back: 256 to 32 at the same bits or more
//!   (Q4_K and IQ4_XS to IQ4_NL, Q5_K and Q6_K to Q8_0), 32 to F16.
//!
//! ref: llama.cpp `src/llama-quant.cpp`, `llama_tensor_get_type`

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use openvla_kernels::DType;
use regex::Regex;

use crate::names::{Layout, Part, Role, component};

/// The type a file is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    /// llama.cpp's name.
    pub name: &'static str,
    /// llama.cpp's `llama_ftype` number.
    pub file_type: u32,
    /// Embeddings and Llama.
    body: DType,
    /// `attn_v` and `ffn_down` of some layers.
    raised: Option<(Layers, DType)>,
}

/// Layers of which the tensors that suffer most are raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layers {
    /// llama.cpp's `i < n/8`.
    FirstEighth,
    /// llama.cpp's `use_more_bits`: the first and the last eighth, and every third between.
    Half,
}

impl Layers {
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
    layers: Layers,
    to: DType,
) -> Encoding {
    Encoding { name, file_type, body, raised: Some((layers, to)) }
}

impl Encoding {
    /// What `--q4` means.
    const Q4: Self = mixed("Q4_K_M", 15, DType::Q4_K, Layers::Half, DType::Q6_K);

    /// Every type that can be asked for.
    pub const ALL: [Self; 11] = [
        plain("F32", 0, DType::F32),
        plain("F16", 1, DType::F16),
        plain("BF16", 32, DType::BF16),
        plain("Q8_0", 7, DType::Q8_0),
        plain("Q6_K", 18, DType::Q6_K),
        mixed("Q5_K_M", 17, DType::Q5_K, Layers::Half, DType::Q6_K),
        Self::Q4,
        mixed("Q4_K_S", 14, DType::Q4_K, Layers::FirstEighth, DType::Q5_K),
        plain("Q4_0", 2, DType::Q4_0),
        mixed("IQ4_NL", 25, DType::IQ4_NL, Layers::FirstEighth, DType::Q5_K),
        mixed("IQ4_XS", 30, DType::IQ4_XS, Layers::FirstEighth, DType::Q5_K),
    ];

    /// The type of a tensor in a model of `n_layer` decoder layers.
    pub fn dtype(self, part: &Part, n_layer: usize) -> DType {
        let quantized = self.body.is_quantized();
        let at_least = |dtype| if quantized { dtype } else { self.body };
        let wanted = match part.role {
            Role::Plain => return DType::F32,
            Role::Vision | Role::Projector => at_least(DType::Q8_0),
            Role::Head if self.body != DType::Q8_0 => at_least(DType::Q6_K),
            Role::ActionHead => at_least(DType::BF16),
            Role::Embedding | Role::Llama | Role::Head => self.body,
        };
        let raised = self.raised.filter(|(layers, _)| {
            sensitive_layer(&part.name).is_some_and(|i| layers.contain(i, n_layer))
        });
        fitting(raised.map_or(wanted, |(_, to)| to), part.shape[0])
    }
}

/// The layer whose `attn_v` or `ffn_down` this is.
fn sensitive_layer(name: &str) -> Option<usize> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    ["attn_v.weight", "ffn_down.weight"].contains(&part).then(|| layer.parse().ok())?
}

/// The type itself, or what takes its place for rows that are no whole number of its blocks.
fn fitting(dtype: DType, row: usize) -> DType {
    if dtype.row_bytes(row).is_some() {
        return dtype;
    }
    match dtype {
        DType::Q4_K | DType::IQ4_XS => fitting(DType::IQ4_NL, row),
        DType::Q5_K | DType::Q6_K => fitting(DType::Q8_0, row),
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

    /// By name, whatever the case.
    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|e| e.name.eq_ignore_ascii_case(name)) {
            Some(encoding) => Ok(encoding),
            None => {
                bail!("type {name} is unknown; there are {}", Self::ALL.map(|e| e.name).join(", "))
            }
        }
    }
}

/// `PATTERN=TYPE`: a type for the tensors whose names a regular expression is found in.
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
            .with_context(|| format!("{text:?}: {pattern:?} is no regular expression"))?;
        Ok(Self { pattern, dtype })
    }
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Planned {
    /// What it is made of.
    pub part: Part,
    /// Its type.
    pub dtype: DType,
}

/// Gives every part its type: the encoding's, or that of the last override found in its name.
///
/// # Errors
/// Names an override that is found in no tensor's name, or whose type cannot hold one of them.
pub fn plan(layout: &Layout, encoding: Encoding, overrides: &[Override]) -> Result<Vec<Planned>> {
    let n_layer = layout.llama.n_layer;
    let planned =
        |part: &Part| Planned { part: part.clone(), dtype: encoding.dtype(part, n_layer) };
    let mut plan: Vec<Planned> = layout.parts.iter().map(planned).collect();
    for Override { pattern, dtype } in overrides {
        let found = plan.iter_mut().filter(|p| pattern.is_match(&p.part.name));
        let mut matrices = found.filter(|p| p.part.role != Role::Plain).peekable();
        ensure!(
            matrices.peek().is_some(),
            "--tensor-type {pattern}={dtype}: no tensor that has a choice matches; \
             --dry-run lists them"
        );
        for planned in matrices {
            let Part { name, shape, .. } = &planned.part;
            ensure!(
                dtype.row_bytes(shape[0]).is_some(),
                "--tensor-type {pattern}={dtype}: {name} has rows of {}, no whole number of \
                 {dtype}'s blocks of {}",
                shape[0],
                dtype.block()
            );
            planned.dtype = *dtype;
        }
    }
    Ok(plan)
}

/// Tensors and bytes by component and type, one line each, and their sum.
pub fn summary(plan: &[Planned]) -> String {
    let mut groups: BTreeMap<(&str, DType), (usize, usize)> = BTreeMap::new();
    for planned in plan {
        let key = (component(&planned.part.name), planned.dtype);
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
    let total = line("all", "", plan.len(), plan.iter().map(Planned::bytes).sum());
    lines.chain([total]).collect()
}

impl Planned {
    /// Bytes per row in the file.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.part.shape[0]).expect("the plan falls back where it does not fit")
    }

    /// Rows in the file.
    pub fn n_row(&self) -> usize {
        self.part.shape[1..].iter().product()
    }

    /// Bytes in the file, without padding.
    pub fn bytes(&self) -> usize {
        self.row_bytes() * self.n_row()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str, role: Role, row: usize) -> Part {
        let shape = [row, 1, 1, 1];
        Part { name: name.into(), shape, role, sources: vec![], first_row: 0, rope_heads: None }
    }

    fn dtype(encoding: &str, name: &str, role: Role, row: usize) -> DType {
        encoding.parse::<Encoding>().unwrap().dtype(&part(name, role, row), 32)
    }

    #[test]
    fn q4_is_q4_k_m() {
        assert_eq!(Encoding::default().name, "Q4_K_M");
    }

    /// Counted on llama.cpp's own files of Llama-2-7B.
    #[test]
    fn raised_layers_are_llama_cpps() {
        let raised = |encoding: &str, part: &str| {
            let name = |i: usize| format!("blk.{i}.{part}.weight");
            let dtype = |i: usize| dtype(encoding, &name(i), Role::Llama, 4096);
            (0..32).filter(|i| dtype(*i) != dtype(4)).collect::<Vec<_>>()
        };
        let half = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31];
        for part in ["attn_v", "ffn_down"] {
            assert_eq!(raised("Q4_K_M", part), half);
            assert_eq!(raised("Q5_K_M", part), half);
            assert_eq!(raised("Q4_K_S", part), [0, 1, 2, 3]);
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
    fn the_action_head_is_kept() {
        let of = |encoding| dtype(encoding, "action_head.weight", Role::ActionHead, 4096);
        assert_eq!(["F32", "F16"].map(of), [DType::F32, DType::F16]);
        assert_eq!(["BF16", "Q8_0", "Q4_0"].map(of), [DType::BF16; 3]);
    }
}
