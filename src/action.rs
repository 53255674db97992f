//! Tokens to numbers in -1..1: bins and their centers. In f64, as the reference.
//!
//! ref: `OpenVLAForActionPrediction.predict_action`, `ActionTokenizer`

use std::ops::Range;

use crate::{Error, Result};

/// Which ids mean motion, and how finely: the last `n_bin` ids before `end`, highest id first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActionSpace {
    /// One past the highest action id: 32000, the vocabulary without its padding rows.
    pub end: u32,
    /// Action ids: 256. There is one bin center fewer, and the two lowest ids share the last.
    pub n_bin: u32,
}

impl ActionSpace {
    /// The action ids, lowest first: 31744..32000.
    pub fn ids(self) -> Range<u32> {
        self.end - self.n_bin..self.end
    }

    /// Where they are among rows of the head, or logits.
    pub fn rows(self) -> Range<usize> {
        let Range { start, end } = self.ids();
        start as usize..end as usize
    }

    /// The bin of any id: the reference clips ids outside the action range, lower ones to the last
    /// bin, higher ones to the first.
    pub fn bin(self, id: u32) -> u32 {
        self.end.saturating_sub(id).saturating_sub(1).min(self.n_bin - 2)
    }

    /// The center of a bin, in -1..1: the mean of its edges.
    pub fn center(self, bin: u32) -> f64 {
        (self.edge(bin) + self.edge(bin + 1)) / 2.0
    }

    /// The id that a number is trained as: of the last edge that is not above it. What is beyond -1..1 is
    /// clipped.
    ///
    /// ref: `ActionTokenizer.__call__`, with numpy's `digitize`
    pub fn id(self, x: f64) -> u32 {
        let x = x.clamp(-1.0, 1.0);
        let edges = (1..self.n_bin).take_while(|edge| self.edge(*edge) <= x).count();
        self.end - 1 - edges as u32
    }

    /// One of numpy's `linspace(-1, 1, n_bin)`.
    fn edge(self, i: u32) -> f64 {
        let last = self.n_bin - 1;
        if i == last { 1.0 } else { f64::from(i) * (2.0 / f64::from(last)) - 1.0 }
    }

    /// The best ids by the logits of the action ids alone, `[n_bin]` for each step.
    ///
    /// # Errors
    /// [`Error::NotFinite`] names the step.
    pub fn best(self, logits: &[Vec<f32>]) -> Result<Vec<u32>> {
        let id = |(step, logits): (usize, &Vec<f32>)| {
            Ok(self.ids().start + argmax(logits, 0..self.n_bin, step)?)
        };
        logits.iter().enumerate().map(id).collect()
    }

    /// The probability of each action id, lowest first, by the logits of the action ids alone, `[n_bin]`: their
    /// softmax, as decoding is among them.
    pub fn probabilities(self, logits: &[f32]) -> Vec<f64> {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights = logits.iter().map(|logit| f64::from(logit - highest).exp());
        let weights: Vec<f64> = weights.collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect()
    }

    /// The motion in -1..1 that tokens stand for: the centers of their bins.
    pub fn normalized(self, tokens: &[u32]) -> Vec<f64> {
        tokens.iter().map(|id| self.center(self.bin(*id))).collect()
    }
}

/// Names of the seven numbers that a motion of one arm has.
const ARM: [&str; 7] = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"];

/// The name of number `i` of `n` of a motion.
pub fn dimension_name(i: usize, n: usize) -> String {
    if n == ARM.len() { ARM[i].to_owned() } else { format!("action[{i}]") }
}

/// The first id of the largest logit among `ids`, as torch's `argmax` on the CPU.
///
/// # Errors
/// [`Error::NotFinite`] names the `step`.
pub fn argmax(logits: &[f32], ids: Range<u32>, step: usize) -> Result<u32> {
    let mut best = ids.start;
    for id in ids {
        let logit = logits[id as usize];
        if !logit.is_finite() {
            return Err(Error::NotFinite { step });
        }
        if logit > logits[best as usize] {
            best = id;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: ActionSpace = ActionSpace { end: 32_000, n_bin: 256 };

    /// numpy, spelled out: 256 edges, their 255 means, and `clip(32000 - id - 1, 0, 254)`.
    fn naive(id: i64) -> f64 {
        let mut edges: Vec<f64> = (0..256).map(|i| f64::from(i) * (2.0 / 255.0) + -1.0).collect();
        edges[255] = 1.0;
        let centers: Vec<f64> = edges.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        centers[(32_000 - id - 1).clamp(0, 254) as usize]
    }

    #[test]
    fn every_id_of_the_vocabulary_decodes_as_the_reference_does() {
        for id in 0..32_064 {
            assert_eq!(SPACE.center(SPACE.bin(id)), naive(i64::from(id)), "id {id}");
        }
        assert_eq!(SPACE.bin(31_744), SPACE.bin(31_745), "256 ids share 255 centers");
        assert!((SPACE.center(SPACE.bin(31_999)) + 0.996_078_431_372_549).abs() < 1e-15);
    }

    /// `32000 - np.digitize(np.clip(x, -1, 1), np.linspace(-1, 1, 256))`
    #[test]
    fn numbers_become_the_ids_that_they_are_trained_as() {
        for id in 31_745..32_000 {
            assert_eq!(SPACE.id(SPACE.center(SPACE.bin(id))), id, "a center is in its bin");
        }
        let wanted =
            [(-7.0, 31_999), (-1.0, 31_999), (0.0, 31_872), (0.999, 31_745), (1.0, 31_744)];
        for (x, id) in wanted {
            assert_eq!(SPACE.id(x), id, "{x}");
        }
        assert_eq!([SPACE.id(9.0), SPACE.id(f64::INFINITY)], [31_744; 2]);
    }

    #[test]
    fn probabilities_are_the_softmax_however_large_the_logits() {
        let space = ActionSpace { end: 3, n_bin: 3 };
        let logits = [1.0_f32, -0.5, 2.25];
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        for offset in [0.0, 1000.0, -1000.0] {
            let got = space.probabilities(&logits.map(|x| x + offset));
            for (got, logit) in got.iter().zip(logits) {
                assert!((got - f64::from(logit).exp() / sum).abs() < 1e-15, "{got}");
            }
        }
    }

    #[test]
    fn the_first_of_equal_logits_is_chosen_and_nan_is_refused() {
        let logits = [0.0, 3.0, 1.0, 3.0, f32::NAN];
        assert_eq!(argmax(&logits, 0..4, 0).unwrap(), 1);
        assert_eq!(argmax(&logits, 2..4, 0).unwrap(), 3);
        assert!(matches!(argmax(&logits, 0..5, 6), Err(Error::NotFinite { step: 6 })));
    }
}
