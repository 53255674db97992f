//! Importance matrices: how much each column of each matrix counts, from the sums of its squared inputs.
//! Read here and collected in [`collect`], in llama.cpp's GGUF format: `NAME.in_sum2 [n_in, 1]` and
//! `NAME.counts [1, 1]`.
//!
//! ref: llama.cpp `tools/imatrix/imatrix.cpp`, `common/imatrix-loader.cpp`

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use openvla_kernels::{DType, Gguf, TensorInfo};

use crate::plan::PlannedTensor;

pub mod collect;

/// The value of `general.type` in such files.
pub const TYPE: &str = "imatrix";
/// The suffix of the tensor with a matrix's sums of squared inputs, by column.
pub const SUMS: &str = ".in_sum2";
/// The suffix of the tensor with the number of summed rows.
pub const COUNTS: &str = ".counts";

/// The importance of the columns of each tensor, with a mean of 1.
#[derive(Debug, Default)]
pub struct ImportanceMatrix(BTreeMap<String, Vec<f32>>);

impl ImportanceMatrix {
    /// Reads a file, for the tensors of `plan`.
    ///
    /// # Errors
    /// If it is not an importance matrix, or belongs to another model.
    pub fn open(path: &Path, plan: &[PlannedTensor]) -> Result<Self> {
        let file = Gguf::open(path)?;
        Self::read(&file, plan)
            .with_context(|| format!("the importance matrix {} cannot be used", path.display()))
    }

    fn read(file: &Gguf, plan: &[PlannedTensor]) -> Result<Self> {
        let kind = file.get::<String>("general.type").unwrap_or_default();
        ensure!(kind == TYPE, "its `general.type` is {kind:?}, not {TYPE:?}");
        let tensors: BTreeMap<&str, &TensorInfo> =
            file.tensors().iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut columns = BTreeMap::new();
        for planned in plan {
            let (name, n_in) = (&planned.tensor.name, planned.tensor.shape[0]);
            let Some(sums) = tensors.get(format!("{name}{SUMS}").as_str()) else { continue };
            let counts = tensors.get(format!("{name}{COUNTS}").as_str());
            let counts = counts.with_context(|| format!("it lacks {name}{COUNTS}"))?;
            ensure!(
                (sums.shape, counts.shape) == ([n_in, 1, 1, 1], [1; 4]),
                "its {name}{SUMS} has shape {:?} and {name}{COUNTS} {:?}; this model's {name} has \
                 {n_in} columns. It was collected on another model",
                sums.shape,
                counts.shape
            );
            let (sums, counts) = (numbers(file, sums)?, numbers(file, counts)?);
            if let Some(weights) = normalized(name, sums, counts[0])? {
                columns.insert(name.clone(), weights);
            }
        }
        ensure!(
            !columns.is_empty(),
            "it belongs to another model: it has none of this one's tensors"
        );
        Ok(Self(columns))
    }

    /// The importance of a tensor's columns, or `None` if it was not measured.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.0.get(name).map(Vec::as_slice)
    }
}

fn numbers(file: &Gguf, tensor: &TensorInfo) -> Result<Vec<f32>> {
    ensure!(tensor.dtype == DType::F32, "{} is {}, not F32", tensor.name, tensor.dtype);
    Ok(DType::F32.decode(&file.bytes()[tensor.range.clone()]))
}

/// The least importance. At 0, ggml would quantize columns that the calibration did not reach to
/// blocks of zeros.
const LEAST: f64 = 1e-9;

/// Scaled to a mean of 1: only ratios count, and numbers near 1 keep ggml's arithmetic far from
/// overflow. `None` if the tensor was never used, or its inputs were all zero.
fn normalized(name: &str, sums: Vec<f32>, count: f32) -> Result<Option<Vec<f32>>> {
    let is_sum = |x: &f32| x.is_finite() && *x >= 0.0;
    ensure!(
        sums.iter().chain([&count]).all(is_sum),
        "its {name}{SUMS} holds numbers that are not sums of squares"
    );
    let mean = sums.iter().map(|x| f64::from(*x)).sum::<f64>() / sums.len() as f64;
    let ratios = || sums.iter().map(|x| (f64::from(*x) / mean).max(LEAST) as f32).collect();
    Ok((mean > 0.0 && count > 0.0).then(ratios))
}
