//! Tokens to motions: bins, data-set statistics, un-normalising. All in f64, as the reference.
//!
//! ref: `OpenVLAForActionPrediction.predict_action`, `ActionTokenizer`

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;

use crate::{Error, Result};

/// Which ids mean motion, and how finely: the last `n_bin` ids before `end`, highest id first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActionSpace {
    /// One past the highest action id: 32000, the vocabulary without its padding rows.
    pub end: u32,
    /// Action ids: 256. There is one bin centre fewer, and the two lowest ids share the last.
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

    /// The bin of any id: the reference clips ids that are no action ids, lower ones to the last
    /// bin, higher ones to the first.
    pub fn bin(self, id: u32) -> u32 {
        self.end.saturating_sub(id).saturating_sub(1).min(self.n_bin - 2)
    }

    /// The centre of a bin, in -1..1: the mean of two of numpy's `linspace(-1, 1, n_bin)`.
    pub fn centre(self, bin: u32) -> f64 {
        let last = self.n_bin - 1;
        let edge = |i: u32| match i == last {
            true => 1.0,
            false => f64::from(i) * (2.0 / f64::from(last)) - 1.0,
        };
        (edge(bin) + edge(bin + 1)) / 2.0
    }

    /// The motion in -1..1 that tokens stand for: the centres of their bins.
    pub fn normalized(self, tokens: &[u32]) -> Vec<f64> {
        tokens.iter().map(|id| self.centre(self.bin(*id))).collect()
    }
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

/// How one data set's motions were scaled to -1..1.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The motion that -1 stands for, per dimension, in the data set's units.
    pub q01: Vec<f64>,
    /// The motion that 1 stands for.
    pub q99: Vec<f64>,
    /// Which dimensions are scaled at all. The others, such as grippers, stay in -1..1.
    pub mask: Vec<bool>,
}

impl Dataset {
    /// Lowest and highest number of each dimension. Those that are not scaled are in -1..1.
    pub fn ranges(&self) -> Vec<[f64; 2]> {
        let scaled = self.q01.iter().zip(&self.q99).zip(&self.mask);
        scaled.map(|((q01, q99), mask)| if *mask { [*q01, *q99] } else { [-1.0, 1.0] }).collect()
    }

    /// Numbers in -1..1 to the data set's units.
    pub fn unnormalise(&self, normalised: &[f64]) -> Vec<f64> {
        let ranges = self.q01.iter().zip(&self.q99).zip(&self.mask);
        let unnormalise = |(x, ((q01, q99), scaled)): (&f64, ((&f64, &f64), &bool))| match scaled {
            true => 0.5 * (x + 1.0) * (q99 - q01) + q01,
            false => *x,
        };
        normalised.iter().zip(ranges).map(unnormalise).collect()
    }
}

impl Dataset {
    /// Reads a data set's `action`, or says what it has that cannot be used.
    fn parse(action: &Value) -> std::result::Result<Self, String> {
        let list = |key: &str| match &action[key] {
            Value::Array(list) => Ok(list),
            Value::Null => Err(format!("lacks action.{key}")),
            other => Err(format!("has {} for action.{key}; a list is needed", shown(other))),
        };
        let (q01, q99) = (list("q01")?, list("q99")?);
        let n = q01.len();
        let mask: Vec<bool> = match &action["mask"] {
            Value::Null => vec![true; n],
            _ => {
                let switches = list("mask")?.iter().map(Value::as_bool).collect::<Option<_>>();
                switches.ok_or("has an action.mask that is not all true or false")?
            }
        };
        if q99.len() != n || mask.len() != n || !(1..=MAX_DIMENSIONS).contains(&n) {
            let found = format!("{n} q01, {} q99, {} mask", q99.len(), mask.len());
            return Err(format!("has {found}; equal numbers are needed"));
        }
        // Where a dimension is not scaled, the reference looks at neither: each end stands for itself.
        let numbers = |key: &str, list: &[Value], end: f64| {
            let number = |(i, value): (usize, &Value)| match value.as_f64() {
                Some(x) if x.is_finite() => Ok(x),
                _ if !mask[i] => Ok(end),
                _ => {
                    let found = shown(value);
                    Err(format!("has {found} for action.{key}[{i}]; a finite number is needed"))
                }
            };
            list.iter().enumerate().map(number).collect::<std::result::Result<Vec<_>, _>>()
        };
        let (q01, q99) = (numbers("q01", q01, -1.0)?, numbers("q99", q99, 1.0)?);
        if !q01.iter().zip(&q99).all(|(low, high)| (high - low).is_finite()) {
            return Err("has a range that is not finite".into());
        }
        Ok(Self { q01, q99, mask })
    }
}

/// A value for people. NaN is a string here, since JSON has no such number.
fn shown(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.chars().take(40).collect()
}

/// A data set that is there, but cannot be used.
fn unusable_error(name: &str, why: &str) -> Error {
    Error::Model { why: format!("its action statistics: `{name}` {why}") }
}

/// The statistics of every data set a model was trained on.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    json: String,
    datasets: BTreeMap<String, Dataset>,
    /// What is wrong with the others.
    unusable: BTreeMap<String, String>,
}

/// More dimensions than any robot of the data sets by far; bounds the tokens of a motion.
const MAX_DIMENSIONS: usize = 64;

impl Statistics {
    /// Reads the text of a `dataset_statistics.json`, or of a config's `norm_stats`. What stands
    /// beside the data sets (`source_split`, …) is kept in the text and otherwise left alone.
    ///
    /// A data set that cannot be used, such as one with NaN, is an error when it is selected: others may be
    /// sound.
    ///
    /// # Errors
    /// [`Error::Model`] if it is not JSON, or holds no data set that can be used.
    pub fn parse(json: String) -> Result<Self> {
        let wrong = |why: String| Error::Model { why: format!("its action statistics: {why}") };
        let entries: BTreeMap<String, Value> =
            serde_json::from_str(&json).map_err(|e| wrong(e.to_string()))?;
        let (mut datasets, mut unusable) = (BTreeMap::new(), BTreeMap::new());
        for (name, entry) in entries {
            let action = match entry.get("action") {
                None | Some(Value::Null) => continue,
                Some(action) => action,
            };
            match Dataset::parse(action) {
                Ok(dataset) => drop(datasets.insert(name, dataset)),
                Err(why) => drop(unusable.insert(name, why)),
            }
        }
        if !datasets.is_empty() {
            return Ok(Self { json, datasets, unusable });
        }
        Err(match unusable.pop_first() {
            Some((name, why)) => unusable_error(&name, &why),
            None => wrong("there is no data set with `action.q01` and `action.q99`".into()),
        })
    }

    /// The text they were read from.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// All data sets, by name.
    pub fn datasets(&self) -> &BTreeMap<String, Dataset> {
        &self.datasets
    }

    /// The first data set by name.
    pub fn first(&self) -> (&str, &Dataset) {
        let (name, dataset) = self.datasets.first_key_value().expect("`parse` refuses none");
        (name, dataset)
    }

    /// Dimensions of the longest motion.
    pub fn longest(&self) -> usize {
        self.datasets.values().map(|dataset| dataset.q01.len()).max().unwrap_or(0)
    }

    /// The data set to un-normalise with. Without a key, the only one there is. As in the
    /// reference's LIBERO evaluation, `KEY_no_noops` is found under `KEY`.
    ///
    /// # Errors
    /// [`Error::UnknownStatistics`] or [`Error::AmbiguousStatistics`], with the names there are;
    /// [`Error::Model`] if the data set cannot be used.
    pub fn select(&self, key: Option<&str>) -> Result<(&str, &Dataset)> {
        let known = || self.datasets.keys().cloned().collect();
        let found = match key {
            None if self.datasets.len() == 1 && self.unusable.is_empty() => {
                self.datasets.iter().next()
            }
            None => return Err(Error::AmbiguousStatistics { known: known() }),
            Some(key) => self
                .datasets
                .get_key_value(key)
                .or_else(|| self.datasets.get_key_value(&format!("{key}_no_noops"))),
        };
        found.map(|(name, dataset)| (name.as_str(), dataset)).ok_or_else(|| {
            let key = key.unwrap_or("");
            match self.unusable.get(key) {
                Some(why) => unusable_error(key, why),
                None => Error::UnknownStatistics { key: key.into(), known: known() },
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: ActionSpace = ActionSpace { end: 32_000, n_bin: 256 };

    /// numpy, spelled out: 256 edges, their 255 means, and `clip(32000 - id - 1, 0, 254)`.
    fn naive(id: i64) -> f64 {
        let mut edges: Vec<f64> = (0..256).map(|i| f64::from(i) * (2.0 / 255.0) + -1.0).collect();
        edges[255] = 1.0;
        let centres: Vec<f64> = edges.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        centres[(32_000 - id - 1).clamp(0, 254) as usize]
    }

    #[test]
    fn every_id_of_the_vocabulary_decodes_as_the_reference_does() {
        for id in 0..32_064 {
            assert_eq!(SPACE.centre(SPACE.bin(id)), naive(i64::from(id)), "id {id}");
        }
        assert_eq!(SPACE.bin(31_744), SPACE.bin(31_745), "256 ids share 255 centres");
        assert!((SPACE.centre(SPACE.bin(31_999)) + 0.996_078_431_372_549).abs() < 1e-15);
    }

    #[test]
    fn the_first_of_equal_logits_is_chosen_and_nan_is_refused() {
        let logits = [0.0, 3.0, 1.0, 3.0, f32::NAN];
        assert_eq!(argmax(&logits, 0..4, 0).unwrap(), 1);
        assert_eq!(argmax(&logits, 2..4, 0).unwrap(), 3);
        assert!(matches!(argmax(&logits, 0..5, 6), Err(Error::NotFinite { step: 6 })));
    }

    fn statistics(json: &str) -> Result<Statistics> {
        Statistics::parse(json.to_owned())
    }

    #[test]
    fn masked_dimensions_scale_and_others_stay() {
        let json = r#"{"d": {"action": {"q01": [-2, 0, 0], "q99": [2, 0, 1],
                                        "mask": [true, true, false]}}, "source_split": "x"}"#;
        let statistics = statistics(json).unwrap();
        let (name, dataset) = statistics.select(None).unwrap();
        assert_eq!(name, "d");
        assert_eq!(dataset.unnormalise(&[0.5, 0.5, 0.5]), [1.0, 0.0, 0.5]);
        assert_eq!(dataset.unnormalise(&[-1.0, 1.0, -0.996]), [-2.0, 0.0, -0.996]);
    }

    #[test]
    fn a_missing_mask_scales_everything() {
        let statistics = statistics(r#"{"d": {"action": {"q01": [0], "q99": [4]}}}"#).unwrap();
        assert_eq!(statistics.select(Some("d")).unwrap().1.unnormalise(&[0.0]), [2.0]);
    }

    #[test]
    fn names_are_found_with_and_without_their_suffix_and_never_guessed() {
        let one = r#"{"action": {"q01": [0], "q99": [1]}}"#;
        let two = statistics(&format!(r#"{{"a": {one}, "libero_10_no_noops": {one}}}"#)).unwrap();
        assert_eq!(two.select(Some("libero_10")).unwrap().0, "libero_10_no_noops");
        assert!(matches!(two.select(None), Err(Error::AmbiguousStatistics { .. })));
        assert!(matches!(two.select(Some("A")), Err(Error::UnknownStatistics { .. })));
    }

    /// As `np.where(mask, …)` drops them.
    #[test]
    fn what_is_not_finite_where_nothing_is_scaled_does_not_matter() {
        let json = r#"{"d": {"action": {"q01": [-2, "NaN"], "q99": [2, "Infinity"],
                                        "mask": [true, false]}}}"#;
        let statistics = statistics(json).unwrap();
        let (_, dataset) = statistics.select(None).unwrap();
        assert_eq!(dataset.unnormalise(&[0.5, 0.5]), [1.0, 0.5]);
        assert_eq!((dataset.q01[1], dataset.q99[1]), (-1.0, 1.0));
    }

    #[test]
    fn a_data_set_that_cannot_be_used_spoils_no_other() {
        let json = r#"{"a": {"action": {"q01": [0], "q99": [4]}},
                       "b": {"action": {"q01": ["NaN"], "q99": [4]}}}"#;
        let statistics = statistics(json).unwrap();
        assert_eq!(statistics.select(Some("a")).unwrap().1.unnormalise(&[0.0]), [2.0]);
        let error = statistics.select(Some("b")).unwrap_err().to_string();
        assert!(error.contains("`b` has NaN for action.q01[0]"), "{error}");
        assert!(matches!(statistics.select(None), Err(Error::AmbiguousStatistics { .. })));
    }

    #[test]
    fn unsound_statistics_are_refused() {
        for json in [
            "{}",
            "[1]",
            r#"{"d": {"action": {"q01": [0, 1], "q99": [1]}}}"#,
            r#"{"d": {"action": {"q01": [], "q99": []}}}"#,
            r#"{"d": {"action": {"q01": [NaN], "q99": [1]}}}"#,
            r#"{"d": {"action": {"q01": [1e999], "q99": [1]}}}"#,
            r#"{"d": {"action": {"q01": [-1e308], "q99": [1e308]}}}"#,
            r#"{"d": {"action": {"q01": [0], "q99": [1], "mask": [true, true]}}}"#,
        ] {
            assert!(statistics(json).is_err(), "{json}");
        }
    }
}
