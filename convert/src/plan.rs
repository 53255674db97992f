//! Which type each tensor gets, and why.
//!
//! | tensors | f32, f16, bf16 | Q8_0 | 4 bits |
//! |---|---|---|---|
//! | norms, biases, positions, patch embeddings | F32 | F32 | F32 |
//! | towers | the type | Q8_0 | Q8_0 |
//! | projector, Llama | the type | Q8_0 | the type |
//! | token embeddings | the type | Q8_0 | the type |
//! | head | the type | Q8_0 | Q8_0 |
//!
//! The first row is 0.1 % of the parameters and enters sums directly. The towers are small next to
//! the Llama and everything depends on them, so 8 bits at least. The head decides between
//! neighbouring bins, so 8 bits too. A row that is no whole number of blocks falls back to F16.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::bail;
use openvla_kernels::DType;

use crate::names::{Layout, Part, Role};

/// The type a file is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    /// llama.cpp's name.
    pub name: &'static str,
    /// llama.cpp's `llama_ftype` number.
    pub file_type: u32,
    /// Projector, Llama and embeddings.
    body: DType,
    /// Towers and head.
    sensitive: DType,
}

const fn encoding(name: &'static str, file_type: u32, body: DType, sensitive: DType) -> Encoding {
    Encoding { name, file_type, body, sensitive }
}

impl Encoding {
    /// Every type that can be asked for.
    pub const ALL: [Self; 6] = [
        encoding("F32", 0, DType::F32, DType::F32),
        encoding("F16", 1, DType::F16, DType::F16),
        encoding("BF16", 32, DType::BF16, DType::BF16),
        encoding("Q8_0", 7, DType::Q8_0, DType::Q8_0),
        encoding("Q4_0", 2, DType::Q4_0, DType::Q8_0),
        encoding("IQ4_NL", 25, DType::IQ4_NL, DType::Q8_0),
    ];

    /// The type of one tensor.
    pub fn dtype(&self, part: &Part) -> DType {
        let wanted = match part.role {
            Role::Plain => return DType::F32,
            Role::Vision | Role::Head => self.sensitive,
            Role::Projector | Role::Embedding | Role::Llama => self.body,
        };
        match wanted.row_bytes(part.shape[0]) {
            Some(_) => wanted,
            None => DType::F16,
        }
    }
}

impl FromStr for Encoding {
    type Err = anyhow::Error;

    /// By name, whatever the case.
    fn from_str(name: &str) -> anyhow::Result<Self> {
        match Self::ALL.into_iter().find(|e| e.name.eq_ignore_ascii_case(name)) {
            Some(encoding) => Ok(encoding),
            None => {
                bail!("type {name} is unknown; there are {}", Self::ALL.map(|e| e.name).join(", "))
            }
        }
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

/// Gives every part its type.
pub fn plan(layout: &Layout, encoding: Encoding) -> Vec<Planned> {
    let planned = |part: &Part| Planned { part: part.clone(), dtype: encoding.dtype(part) };
    layout.parts.iter().map(planned).collect()
}

/// Tensors and bytes by component and type, one line each: what a file would hold.
pub fn summary(plan: &[Planned]) -> String {
    let mut groups: BTreeMap<(Role, DType), (usize, usize)> = BTreeMap::new();
    for planned in plan {
        let (n, bytes) = groups.entry((planned.part.role, planned.dtype)).or_default();
        *n += 1;
        *bytes += planned.row_bytes() * planned.n_row();
    }
    let line = |((role, dtype), (n, bytes)): (&(Role, DType), &(usize, usize))| {
        let (role, dtype) = (format!("{role:?}"), dtype.to_string());
        format!("{role:<10} {dtype:<7} {n:>5} tensors {bytes:>14} bytes\n")
    };
    groups.iter().map(line).collect()
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
}
