//! What a device computes, held against a CPU with ggml's kernels, stage by stage.
//!
//! Both get the same picture, the Llama the CPU's soft tokens, and each decode step the CPU's token: so a
//! stage's error is its own, and a random model's near-ties do not matter.

use std::path::Path;

use anyhow::Result;
use openvla::{Devices, Kernels, Options};
use serde::{Deserialize, Serialize};

use crate::machine::Origin;
use crate::workload::Workload;

/// What a device's numbers came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// With which program, when and where.
    #[serde(flatten)]
    pub origin: Origin,
    /// The model file.
    pub model: String,
    /// In order.
    pub stages: Vec<Difference>,
}

/// How far a stage is from the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// `features`, `soft tokens`, `prefill`, `step 1`, `step 2`, …: what the last three give are logits.
    pub stage: String,
    /// The root mean square of the difference over that of the CPU's numbers.
    pub error: f64,
    /// Whether the largest number is at the same place.
    pub same_largest: bool,
}

/// Runs one step of a model file on the devices of `options` and on the CPU.
///
/// # Errors
/// What is wrong with the file or a device.
pub fn compare(model: &Path, options: &Options) -> Result<Comparison> {
    let origin = Origin::now("openvla-bench", options)?;
    let mut cpu = options.clone();
    (cpu.devices, cpu.kernels) = (Devices::Cpu, Kernels::Ggml);
    let wanted = step(&mut Workload::open(model, &cpu)?, &[])?;
    let got = step(&mut Workload::open(model, options)?, &wanted)?;
    let differences = wanted.iter().zip(&got).enumerate();
    let stages = differences.map(|(i, (wanted, got))| Difference {
        stage: match i {
            0 => "features".to_owned(),
            1 => "soft tokens".to_owned(),
            2 => "prefill".to_owned(),
            i => format!("step {}", i - 2),
        },
        error: relative(got, wanted),
        same_largest: largest(got) == largest(wanted),
    });
    Ok(Comparison { origin, model: model.display().to_string(), stages: stages.collect() })
}

/// What each stage gives: features, soft tokens, the logits of each token. Where there is something to follow,
/// the Llama is given that: its soft tokens, its largest logits.
fn step(workload: &mut Workload, follow: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
    let planes = workload.policy.config().preprocess.planes(&workload.image)?;
    let (ids, n_step) = (workload.ids.clone(), workload.n_step());
    let network = workload.policy.network();
    let features = network.encode(&planes)?;
    let projected = network.project(&features)?;
    let mut stages = vec![network.features(), network.soft_tokens()];
    let soft = match follow.get(1) {
        Some(soft) => network.set_soft_tokens(soft),
        None => projected,
    };
    let mut sequence = network.prefill(&ids, &soft)?;
    stages.push(sequence.logits().to_vec());
    for _ in 0..n_step {
        let last = follow.get(stages.len() - 1).or(stages.last()).expect("the prefill's");
        let token = u32::try_from(largest(last))?;
        stages.push(sequence.step(token)?.to_vec());
    }
    Ok(stages)
}

fn relative(got: &[f32], wanted: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let wrong: f64 = got.iter().zip(wanted).map(|(got, wanted)| square(got - wanted)).sum();
    (wrong / wanted.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

fn largest(numbers: &[f32]) -> usize {
    let largest = (0..numbers.len()).max_by(|a, b| numbers[*a].total_cmp(&numbers[*b]));
    largest.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative() {
        assert_eq!(relative(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative(&[0.0, 0.0], &[3.0, 4.0]), 1.0);
        assert!(relative(&[f32::NAN], &[1.0]).is_nan());
        assert_eq!(largest(&[1.0, 5.0, 2.0]), 1);
    }
}
