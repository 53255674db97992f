//! Actions in the episode's units, as numbers in -1..1, in each of the ways that they may have been meant.

use openvla::Scale;

/// Which numbers of an action are grippers': those that are not scaled, else the last.
pub fn gripper_axes(scale: &Scale) -> Vec<usize> {
    let axes: Vec<usize> = (0..scale.n()).filter(|axis| !scale.mask[*axis]).collect();
    if axes.is_empty() { vec![scale.n() - 1] } else { axes }
}

/// How an action in the episode's units becomes one in -1..1.
#[derive(Debug, Clone, PartialEq)]
pub enum ActionChange {
    /// By other statistics.
    Scale(Scale),
    /// It is one already.
    Normalized,
    /// By the model's statistics, after its numbers were multiplied.
    Multiply(Vec<f64>),
    /// The same, after these numbers became `factor · x + offset`.
    Gripper {
        /// Which numbers are grippers'.
        axes: Vec<usize>,
        /// What they are multiplied by.
        factor: f64,
        /// What is added then.
        offset: f64,
    },
    /// The same, after the numbers were put in this order.
    Permute(Vec<usize>),
}

/// An action in -1..1, and how many of its numbers were far outside of the data set's ranges.
#[derive(Debug, Clone, PartialEq)]
pub struct Scaled {
    /// In -1..1 where it is scaled.
    pub normalized: Vec<f64>,
    /// Numbers beyond half a range on either side, or not what they always are.
    pub n_outside: usize,
}

/// How far from 0 a number in -1..1 may be that the first and 99th percentile let through now and then.
const FAR: f64 = 1.5;

impl Scaled {
    /// By a data set's statistics.
    pub fn new(action: &[f64], scale: &Scale) -> Self {
        let is_outside = |axis: &usize| {
            let (x, low, high) = (action[*axis], scale.low[*axis], scale.high[*axis]);
            match scale.mask[*axis] {
                true if low == high => (x - low).abs() > 1e-6,
                true => (2.0 * (x - low) / (high - low) - 1.0).abs() > FAR,
                false => x.abs() > FAR,
            }
        };
        let n_outside = (0..scale.n()).filter(is_outside).count();
        Self { normalized: scale.normalize(action), n_outside }
    }

    /// Whether they differ after clipping.
    pub fn differs(&self, other: &Self) -> bool {
        let mut pairs = self.normalized.iter().zip(&other.normalized);
        self.n_outside != other.n_outside
            || pairs.any(|(a, b)| a.clamp(-1.0, 1.0) != b.clamp(-1.0, 1.0))
    }
}

impl ActionChange {
    /// The action in -1..1.
    pub fn apply(&self, action: &[f64], scale: &Scale) -> Scaled {
        match self {
            Self::Scale(other) => Scaled::new(action, other),
            Self::Normalized => {
                let n_outside = action.iter().filter(|x| x.abs() > FAR).count();
                Scaled { normalized: action.to_vec(), n_outside }
            }
            Self::Multiply(factors) => {
                let scaled: Vec<f64> = action.iter().zip(factors).map(|(x, f)| x * f).collect();
                Scaled::new(&scaled, scale)
            }
            Self::Gripper { axes, factor, offset } => {
                let mut action = action.to_vec();
                axes.iter().for_each(|axis| action[*axis] = factor * action[*axis] + offset);
                Scaled::new(&action, scale)
            }
            Self::Permute(order) => {
                let permuted: Vec<f64> = order.iter().map(|axis| action[*axis]).collect();
                Scaled::new(&permuted, scale)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale() -> Scale {
        Scale {
            low: vec![-0.1, -0.1, -0.1, 0.0, 0.0, 0.0, 0.0],
            high: vec![0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 1.0],
            mask: vec![true, true, true, true, true, true, false],
        }
    }

    #[test]
    fn actions_are_changed_before_they_are_scaled() {
        let action = [0.05, 0.0, -0.1, 0.0, 0.0, 0.0, 1.0];
        let near = |change: ActionChange, wanted: [f64; 7]| {
            let got = change.apply(&action, &scale()).normalized;
            let is_near = got.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6);
            assert!(is_near, "{change:?}: {got:?}, not {wanted:?}");
        };
        near(
            ActionChange::Permute(vec![1, 0, 2, 3, 4, 5, 6]),
            [0.0, 0.5, -1.0, 0.0, 0.0, 0.0, 1.0],
        );
        near(ActionChange::Multiply(vec![2.0; 7]), [1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 2.0]);
        near(ActionChange::Normalized, action);
        let gripper =
            ActionChange::Gripper { axes: gripper_axes(&scale()), factor: -1.0, offset: 1.0 };
        near(gripper, [0.5, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn numbers_outside_of_the_ranges_are_counted() {
        let n = |action: [f64; 7]| Scaled::new(&action, &scale()).n_outside;
        assert_eq!(n([0.1, -0.1, 0.14, 0.0, 0.0, 0.0, 1.0]), 0);
        assert_eq!(n([0.2, -3.0, 0.0, 0.1, 0.0, 0.0, 255.0]), 4);
    }
}
