//! Data set statistics: the range that each action axis is scaled back to.
//!
//! Fields are sorted by name, see [`write_json`].

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use openvla_vocabulary::write_json;
use serde::Serialize;

use super::spec::Variant;

/// Statistics of the training data, per axis.
#[derive(Serialize)]
struct Axes {
    /// Which axes are scaled; the gripper's is not. Without it, all are.
    #[serde(skip_serializing_if = "Option::is_none")]
    mask: Option<Vec<bool>>,
    max: Vec<f64>,
    mean: Vec<f64>,
    min: Vec<f64>,
    q01: Vec<f64>,
    q99: Vec<f64>,
    std: Vec<f64>,
}

/// One data set.
#[derive(Serialize)]
pub struct Statistics {
    action: Axes,
    num_trajectories: usize,
    num_transitions: usize,
    proprio: Axes,
}

/// Meters and radians per step, then the gripper.
const TABLETOP: [(f64, f64); 7] = [
    (-0.0262, 0.0281),
    (-0.0378, 0.0393),
    (-0.0247, 0.0388),
    (-0.0791, 0.0803),
    (-0.0913, 0.0764),
    (-0.2034, 0.1987),
    (0.0, 1.0),
];

const SIX_AXES: [(f64, f64); 6] = [
    (-0.0517, 0.0462),
    (-0.0334, 0.0719),
    (-0.0608, 6.07e-5),
    (-0.1275, 0.0941),
    (-0.0836, 0.1122),
    (-0.3141, 0.2875),
];

/// Position and rotation of the gripper, and its two fingers: the state of LIBERO's runs.
const STATE: [(f64, f64); 8] = [
    (-0.45, 0.22),
    (-0.31, 0.38),
    (0.01, 1.27),
    (1.44, 3.69),
    (-1.92, 2.45),
    (-1.24, 1.11),
    (0.0018, 0.0403),
    (-0.0399, -0.0014),
];

/// Joint angles of two arms. One joint never moved: its range is empty.
const TWO_ARMS: [(f64, f64); 14] = [
    (-0.412, 0.395),
    (-1.127, 0.734),
    (-0.268, 1.503),
    (0.0, 0.0),
    (-0.951, 1.214),
    (-2.316, 1.874),
    (0.0, 1.0),
    (-0.377, 0.441),
    (-1.058, 0.692),
    (-0.313, 1.467),
    (-1.729, 1.604),
    (-0.886, 1.175),
    (-2.104, 1.953),
    (0.0, 1.0),
];

/// Writes `dataset_statistics.json`.
pub fn write(dir: &Path, variant: Variant) -> Result<()> {
    let tabletop = Statistics::new(&TABLETOP, Some(&[6]), 48_213, 612);
    let sets = match variant {
        Variant::OpenVla => BTreeMap::from([("example_tabletop", tabletop)]),
        Variant::Oft { .. } => {
            let with_state = Statistics { proprio: Axes::new(&STATE, None), ..tabletop };
            BTreeMap::from([("example_tabletop", with_state)])
        }
        Variant::V01 => BTreeMap::from([
            ("example_bimanual", Statistics::new(&TWO_ARMS, Some(&[6, 13]), 91_440, 305)),
            ("example_six_axes", Statistics::new(&SIX_AXES, None, 20_117, 240)),
            ("example_tabletop", tabletop),
        ]),
    };
    write_json(dir, "dataset_statistics.json", &sets)
}

/// The statistics in `config.json`, of the data the model was trained on before: those in
/// `dataset_statistics.json` replace them all.
pub fn of_base() -> BTreeMap<&'static str, Statistics> {
    let wider = TABLETOP.map(|(low, high)| (2.0 * low, 2.0 * high));
    BTreeMap::from([("base_dataset", Statistics::new(&wider, Some(&[6]), 972_396, 60_064))])
}

impl Statistics {
    /// From each axis's 1st and 99th percentile. Proprioception was not recorded: zeros.
    fn new(
        ranges: &[(f64, f64)],
        grippers: Option<&[usize]>,
        num_transitions: usize,
        num_trajectories: usize,
    ) -> Self {
        let n = ranges.len();
        let mask = grippers.map(|g| (0..n).map(|axis| !g.contains(&axis)).collect());
        let (action, proprio) = (Axes::new(ranges, mask), Axes::new(&vec![(0.0, 0.0); n], None));
        Self { action, num_trajectories, num_transitions, proprio }
    }
}

impl Axes {
    /// As if the values were distributed evenly.
    fn new(ranges: &[(f64, f64)], mask: Option<Vec<bool>>) -> Self {
        let axis =
            |f: fn(f64, f64) -> f64| ranges.iter().map(|&(low, high)| f(low, high)).collect();
        Self {
            mask,
            max: axis(|low, high| high + 0.25 * (high - low)),
            mean: axis(|low, high| 0.5 * (low + high)),
            min: axis(|low, high| low - 0.25 * (high - low)),
            q01: axis(|low, _| low),
            q99: axis(|_, high| high),
            std: axis(|low, high| 0.25 * (high - low)),
        }
    }
}
