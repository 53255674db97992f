//! The model file: whether it is whole, and statistics that look wrong.

use anyhow::Result;
use openvla::{Config, Dataset, Proof, Scale};
use openvla_kernels::Gguf;
use serde::Serialize;

use crate::action::gripper_axes;

/// What was found, and what is wrong with it in words.
#[derive(Debug, Clone, Serialize)]
pub struct File {
    /// Its path, or that it is the built-in example.
    pub name: String,
    /// What the model is called.
    pub model: String,
    /// `OpenVLA`, or `OpenVLA-OFT`.
    pub policy: String,
    /// Tensors with a checksum.
    pub n_checksum: usize,
    /// Names of the tensors whose bytes are not those that the converter wrote.
    pub damaged: Vec<String>,
    /// Reference cases in the file, which `openvla-convert verify` runs.
    pub n_case: usize,
    /// Data sets whose statistics it has.
    pub datasets: Vec<String>,
    /// What is done to a picture first.
    pub profile: String,
    /// Whether only the middle of pictures is shown.
    pub center_crop: bool,
    /// What is wrong, and what to do.
    pub warnings: Vec<String>,
}

/// Checks a file. `key` is the data set that was asked for.
///
/// # Errors
/// If its reference cases cannot be read.
pub fn examine(name: &str, file: &Gguf, config: &Config, key: Option<&str>) -> Result<File> {
    let proof = Proof::read(file, config)?;
    let damaged = proof.damaged(file, |_| {});
    let mut warnings = Vec::new();
    if let Some(first) = damaged.first() {
        let n = damaged.len();
        warnings.push(format!(
            "{n} tensors are damaged, `{first}` first: copy or convert the file again"
        ));
    }
    if proof.checksums.is_empty() {
        warnings.push(
            "the file has no checksums: convert it again with this version's openvla-convert"
                .to_owned(),
        );
    }
    match config.statistics.select(key) {
        Ok((name, dataset)) => warnings.extend(doubts(name, dataset)),
        Err(error) => warnings.push(format!("{error}; {}", error.hint().unwrap_or_default())),
    }
    Ok(File {
        name: name.to_owned(),
        model: config.general.name.clone(),
        policy: if config.oft.is_some() { "OpenVLA-OFT" } else { "OpenVLA" }.to_owned(),
        n_checksum: proof.checksums.len(),
        damaged,
        n_case: proof.cases.len(),
        datasets: config.statistics.datasets().keys().cloned().collect(),
        profile: config.preprocess.profile.to_string(),
        center_crop: config.preprocess.center_crop,
        warnings,
    })
}

/// Widths of x, y and z, or of roll, pitch and yaw, that differ by more are in different units.
const UNLIKE: f64 = 50.0;

/// What looks wrong about a data set's statistics.
pub fn doubts(name: &str, dataset: &Dataset) -> Vec<String> {
    let Scale { low, high, mask } = &dataset.action;
    let gripper = gripper_axes(&dataset.action);
    let mut doubts = Vec::new();
    let width = |axis: usize| high[axis] - low[axis];
    let scaled: Vec<usize> =
        (0..low.len()).filter(|axis| mask[*axis] && !gripper.contains(axis)).collect();
    let still: Vec<String> =
        scaled.iter().filter(|axis| width(**axis) == 0.0).map(usize::to_string).collect();
    if !still.is_empty() {
        let axes = still.join(", ");
        doubts.push(format!("`{name}` never moves in dimension {axes}: neither will the robot"));
    }
    if let Some(axis) = scaled.iter().find(|axis| width(**axis) < 0.0) {
        doubts.push(format!("`{name}` has its bounds of dimension {axis} the wrong way round"));
    }
    for group in [0..3, 3..6] {
        let widths: Vec<f64> = scaled
            .iter()
            .filter(|axis| group.contains(&(**axis % 7)) && width(**axis) > 0.0)
            .map(|axis| width(*axis))
            .collect();
        let least = widths.iter().copied().fold(f64::INFINITY, f64::min);
        let most = widths.iter().copied().fold(0.0, f64::max);
        if most > UNLIKE * least {
            let what = if group.start == 0 { "positions" } else { "rotations" };
            doubts.push(format!(
                "`{name}` has ranges of {least:.3e} to {most:.3e} among its {what}: are they in one unit?"
            ));
        }
        let limit = if group.start == 0 { 4.0 } else { 4.0 * std::f64::consts::PI };
        if most > limit {
            let unit = if group.start == 0 { "meters" } else { "radians" };
            doubts.push(format!("`{name}` has a range of {most:.1}, which is no motion in {unit}"));
        }
    }
    for axis in gripper.into_iter().filter(|axis| mask[*axis]) {
        if width(axis) <= 0.0 {
            doubts.push(format!("`{name}` never moves the gripper, dimension {axis}"));
        }
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubts_of(low: [f64; 7], high: [f64; 7]) -> String {
        let mask = vec![true, true, true, true, true, true, false];
        let action = Scale { low: low.to_vec(), high: high.to_vec(), mask };
        doubts("d", &Dataset { action, state: None }).join("\n")
    }

    #[test]
    fn statistics_that_look_wrong_are_doubted() {
        let (low, high) = ([-0.03; 7], [0.03; 7]);
        assert_eq!(doubts_of(low, high), "");
        let with = |axis: usize, x: f64| {
            let mut high = high;
            high[axis] = x;
            doubts_of(low, high)
        };
        assert!(with(1, -0.03).contains("never moves in dimension 1"));
        assert!(with(2, -0.04).contains("wrong way round"));
        assert!(with(0, 30.0).contains("in one unit?"));
        assert!(with(4, 90.0).contains("no motion in radians"));
        assert_eq!(with(6, 1.0), "", "the gripper is not scaled");
    }
}
