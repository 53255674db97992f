//! A PEFT LoRA adapter, as OpenVLA's `finetune.py` leaves it: `W + alpha/r · B·A`, added in f32.
//!
//! With `target_modules="all-linear"` it changes every linear layer, the head, and the towers' patch
//! convolutions; also tensors that the model never reads, which are ignored.
//!
//! ref: peft 0.11.1 `LoraLayer.get_delta_weight`, openvla `vla-scripts/finetune.py`

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::aliases::PEFT_PREFIX;
use crate::checkpoint::{StatisticsText, list_folder};
use crate::files;
use crate::peft::PeftConfig;
use crate::recognize;
use crate::run_files::RunFiles;
use crate::tensors::{Matrix, Tensors, ZERO_3};

/// How names of towers begin that were wrapped in FiLM.
const FILM_TOWERS: &str = "vision_backbone.vision_backbone.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// An adapter folder that was read and checked.
pub struct Adapter {
    tensors: Tensors,
    rank: usize,
    scale: f32,
    /// The statistics file in its folder, which belongs to the fine-tuned model.
    pub statistics: Option<StatisticsText>,
    /// Signs that it is probably not the adapter that was meant, one sentence each.
    pub warnings: Vec<String>,
}

impl Adapter {
    /// Reads an adapter of a checkpoint with the tensors `base`.
    ///
    /// # Errors
    /// Names what is missing, damaged or unsupported, or belongs to another model.
    pub fn open(dir: &Path, base: &Tensors) -> Result<Self> {
        let shown = dir.display().to_string();
        let not_an_adapter = || format!("{shown} is not a folder with a LoRA adapter");
        ensure!(dir.is_dir(), not_an_adapter());
        recognize::check_adapter(&shown, &list_folder(dir)?)?;
        let path = dir.join("adapter_config.json");
        let config: PeftConfig = files::read_json(&path).with_context(not_an_adapter)?;
        config.check().with_context(|| path.display().to_string())?;
        let mut tensors = Tensors::default();
        tensors.add(&dir.join(recognize::ADAPTER_WEIGHTS))?;
        let statistics = StatisticsText::in_folder(dir)?;
        let (rank, scale, warnings) = (config.r, config.scale(), Vec::new());
        let mut adapter = Self { tensors, rank, scale, statistics, warnings };
        let cannot = || format!("the adapter in {shown} cannot be merged");
        adapter.check(&config, base).with_context(cannot)?;
        adapter.warnings = adapter.find_problems(&shown, &config, base)?;
        Ok(adapter)
    }

    /// Checks that every tensor is an A or B that fits a tensor of the checkpoint, or a copy of one.
    fn check(&self, config: &PeftConfig, base: &Tensors) -> Result<()> {
        for (name, entry) in self.tensors.entries() {
            let module = name.strip_prefix(PEFT_PREFIX).unwrap_or(name);
            let original = module.replace(".base_layer.", ".");
            if module.starts_with(FILM_TOWERS) {
                continue; // the run's vision file holds them too, and the merge of openvla-oft finds no place for these
            }
            if base.entries().contains_key(&original) {
                self.check_copy(name, base, &original)?;
                continue; // peft saves the head too if it is a target
            }
            let half = [A, B].into_iter().find_map(|half| Some((half, module.strip_suffix(half)?)));
            let (half, module) = half.with_context(|| {
                format!("it holds {name}, which is neither lora_A nor lora_B of a layer")
            })?;
            let weight = format!("{module}.weight");
            let wanted = &base.entries().get(&weight).with_context(|| {
                format!("it changes {weight}, which the checkpoint lacks; is it another model's?")
            })?;
            let wanted = &wanted.shape;
            ensure!(
                config.targets(module),
                "it holds {name}, but its adapter_config.json does not target {module}, so that \
                 peft would leave it out; take the adapter_config.json that it was saved with"
            );
            let other = format!("{PEFT_PREFIX}{module}{}", if half == A { B } else { A });
            ensure!(self.tensors.entries().contains_key(&other), "it lacks {other}");
            self.tensors.check_type(name)?;
            let (n_out, n_in) = rows_of(wanted);
            let needed = if half == A { (self.rank, n_in) } else { (n_out, self.rank) };
            ensure!(
                wanted.len() > 1 && rows_of(&entry.shape) == needed,
                "{name} has shape {:?}; rank {} over {weight} {wanted:?} needs {needed:?}",
                entry.shape,
                self.rank
            );
        }
        let is_half = |name: &String| name.ends_with(A);
        ensure!(self.tensors.entries().keys().any(is_half), "it holds no LoRA tensor; {ZERO_3}");
        Ok(())
    }

    /// Probable mistakes in an adapter that fits the checkpoint.
    fn find_problems(
        &self,
        shown: &str,
        config: &PeftConfig,
        base: &Tensors,
    ) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        if self.scale == 0.0 || self.is_zero(A)? || self.is_zero(B)? {
            problems.push(format!(
                "the adapter in {shown} changes nothing: its lora_alpha, or every lora_A or lora_B, is \
                 zero, as lora_B is before training"
            ));
        }
        let matrices = base.entries().iter().filter(|(_, entry)| entry.shape.len() > 1);
        let modules = matrices.filter_map(|(name, _)| name.strip_suffix(".weight"));
        let targeted: Vec<_> = modules.filter(|module| config.targets(module)).collect();
        let has_pair = |module: &&&str| {
            self.tensors.entries().contains_key(&format!("{PEFT_PREFIX}{module}{A}"))
        };
        let missing = targeted.len() - targeted.iter().filter(has_pair).count();
        if config.names_targets() && missing > 0 {
            problems.push(format!(
                "{missing} of {} layers that adapter_config.json targets have no pair in {shown}: is the \
                 adapter complete?",
                targeted.len()
            ));
        }
        Ok(problems)
    }

    /// Whether all A, or all B, are zero.
    fn is_zero(&self, half: &str) -> Result<bool> {
        for name in self.tensors.entries().keys().filter(|name| name.ends_with(half)) {
            if all(&self.tensors.matrix(name)?).iter().any(|x| *x != 0.0) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Checks a copy of the base model's weights, which peft would load over the checkpoint's.
    fn check_copy(&self, name: &str, base: &Tensors, original: &str) -> Result<()> {
        self.tensors.check_type(name)?;
        base.check_type(original)?;
        ensure!(
            self.tensors.matrix(name)?.equals(&base.matrix(original)?),
            "its {name} is a copy of the base model's, and not equal to the checkpoint's \
             {original}: it was trained on another base model; give that one as CHECKPOINT"
        );
        Ok(())
    }

    /// Its tensors.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The factor of `B·A`.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Whether it makes a difference to a tensor of the checkpoint.
    pub fn changes(&self, weight: &str) -> bool {
        let module = weight.strip_suffix(".weight");
        module.is_some_and(|module| {
            self.tensors.entries().contains_key(&format!("{PEFT_PREFIX}{module}{A}"))
        })
    }

    /// The difference that the adapter makes to a tensor of the checkpoint, if any.
    ///
    /// # Errors
    /// Names the file if it cannot be mapped, or a tensor that holds NaN or infinity.
    pub fn delta(&self, weight: &str) -> Result<Option<Delta>> {
        let Some(module) = weight.strip_suffix(".weight") else { return Ok(None) };
        let name = |half: &str| format!("{PEFT_PREFIX}{module}{half}");
        if !self.changes(weight) {
            return Ok(None);
        }
        let half = |half: &str| {
            let numbers = all(&self.tensors.matrix(&name(half))?);
            if let Some(i) = numbers.iter().position(|x| !x.is_finite()) {
                let (name, x) = (name(half), numbers[i]);
                bail!("the adapter's {name} holds {x}, its number {i}; the adapter is damaged");
            }
            Ok(numbers)
        };
        Ok(Some(Delta { a: half(A)?, b: half(B)?, rank: self.rank, scale: self.scale }))
    }
}

/// The difference that an adapter makes whose A and B are among the checkpoint's own tensors, as in the vision file of
/// an OpenVLA-OFT run. ref: openvla-oft `vla-scripts/finetune.py`: alpha is at most 16
///
/// # Errors
/// Names the file if it cannot be mapped, and what does not fit.
pub fn own_delta(tensors: &Tensors, weight: &str) -> Result<Option<Delta>> {
    const MAX_ALPHA: usize = 16;
    let Some(module) = weight.strip_suffix(".weight") else { return Ok(None) };
    let names = [A, B].map(|half| format!("{module}{half}"));
    let [Some(a), Some(b)] = names.each_ref().map(|name| tensors.entries().get(name)) else {
        return Ok(None);
    };
    let rank = a.shape.first().copied().unwrap_or(0);
    let (n_out, n_in) = rows_of(&tensors.entries()[weight].shape);
    ensure!(
        rank > 0 && rows_of(&a.shape) == (rank, n_in) && rows_of(&b.shape) == (n_out, rank),
        "{} and {} have shapes {:?} and {:?}, which do not fit {weight}",
        names[0],
        names[1],
        a.shape,
        b.shape
    );
    names.iter().try_for_each(|name| tensors.check_type(name))?;
    let half = |name: &String| Ok::<_, anyhow::Error>(all(&tensors.matrix(name)?));
    let (a, b) = (half(&names[0])?, half(&names[1])?);
    ensure!(a.iter().chain(&b).all(|x| x.is_finite()), "the adapter of {weight} is not finite");
    let scale = rank.min(MAX_ALPHA) as f32 / rank as f32;
    Ok(Some(Delta { a, b, rank, scale }))
}

/// Whether a tensor is the A or B of an adapter.
pub fn is_half(name: &str) -> bool {
    name.ends_with(A) || name.ends_with(B)
}

/// The warning about an adapter without statistics in its folder.
pub fn missing_statistics_warning(adapter: &Path, taken: &StatisticsText) -> String {
    format!(
        "there is no dataset_statistics.json in the adapter's folder, so the statistics are the base model's \
         ({}), which scale a fine-tuned model's actions wrongly. finetune.py leaves its own in the \
         run folder, not in adapter-tmp: copy dataset_statistics.json from there into {}, or name \
         it with --statistics",
        taken.from,
        adapter.display()
    )
}

/// Refuses an adapter in the folder of an OpenVLA-OFT run, whose head and statistics belong to it.
///
/// # Errors
/// Says how the run is converted.
pub fn check_parent(adapter: &Path) -> Result<()> {
    let adapter = adapter.canonicalize()?;
    let Some((run, Ok(names))) = adapter.parent().map(|run| (run, list_folder(run))) else {
        return Ok(()); // The parent folder may not be readable.
    };
    let shown = run.display();
    ensure!(
        RunFiles::find(&shown.to_string(), &names)?.is_none(),
        "the adapter is of the OpenVLA-OFT run in {shown}; give that as CHECKPOINT, and the model that it was trained \
         from with --base if the folder has no weights"
    );
    Ok(())
}

/// A shape as rows and columns: the first dimension, and the product of the others, as for convolutions.
fn rows_of(shape: &[usize]) -> (usize, usize) {
    let (first, rest) = shape.split_first().unwrap_or((&1, &[]));
    (*first, rest.iter().product())
}

/// All numbers of a small tensor.
fn all(matrix: &Matrix) -> Vec<f32> {
    let mut numbers = vec![0.0; matrix.row * matrix.n_row];
    matrix.read(0, &mut numbers);
    numbers
}

/// `scale · B·A`, computed for any part of a row.
pub struct Delta {
    /// `r` rows of `n_in`.
    a: Vec<f32>,
    /// `n_out` rows of `r`.
    b: Vec<f32>,
    rank: usize,
    scale: f32,
}

impl Delta {
    /// Adds the numbers from index `start` on to `out`; they must be within one row.
    pub fn add(&self, start: usize, out: &mut [f32]) {
        let n_in = self.a.len() / self.rank;
        let (row, at) = (start / n_in, start % n_in);
        let mut sum = vec![0.0; out.len()];
        for (b, a) in self.b[row * self.rank..][..self.rank].iter().zip(self.a.chunks(n_in)) {
            for (sum, a) in sum.iter_mut().zip(&a[at..][..out.len()]) {
                *sum += b * a;
            }
        }
        for (out, sum) in out.iter_mut().zip(sum) {
            *out += self.scale * sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Delta;

    /// B·A spelled out, and parts of rows as a convolution's rows are.
    #[test]
    fn parts_of_rows_add_up_to_the_product() {
        let (n_in, n_out, rank) = (6, 4, 3);
        let wave = |n: usize, k: f32| (0..n).map(|i| (i as f32 * k).sin()).collect::<Vec<_>>();
        let (a, b) = (wave(rank * n_in, 0.7), wave(n_out * rank, 0.3));
        let delta = Delta { a: a.clone(), b: b.clone(), rank, scale: 0.5 };
        let mut got = vec![1.0; n_in * n_out];
        for (i, part) in got.chunks_mut(2).enumerate() {
            delta.add(2 * i, part);
        }
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / n_in, i % n_in);
            let dot: f32 = (0..rank).map(|r| b[row * rank + r] * a[r * n_in + column]).sum();
            assert!((got - (1.0 + 0.5 * dot)).abs() < 1e-6, "{i}");
        }
    }
}
