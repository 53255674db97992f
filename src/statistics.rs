//! Data-set statistics: how the numbers of a motion, and of an arm's state, are scaled. In f64, as the
//! reference.
//!
//! ref: `OpenVLAForActionPrediction.predict_action`, openvla-oft `normalize_proprio`, `_unnormalize_actions`

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Error, Result};

/// Which statistics -1 and 1 correspond to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bounds {
    /// `q01` and `q99`, the first and the 99th percentile: OpenVLA, LIBERO, Bridge.
    #[default]
    Quantiles,
    /// `min` and `max`: ALOHA.
    Extremes,
}

impl Bounds {
    /// The keys of the lower and the upper bound in a data set's statistics.
    pub fn keys(self) -> [&'static str; 2] {
        match self {
            Self::Quantiles => ["q01", "q99"],
            Self::Extremes => ["min", "max"],
        }
    }
}

/// What keeps a dimension of no width from dividing by zero. ref: `normalize_action_and_proprio`,
/// `_unnormalize_actions`, `normalize_proprio`
pub(crate) const WIDTH: f64 = 1e-8;

/// How one kind of numbers was scaled to -1..1.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// The value of -1, per dimension, in the data set's units.
    pub low: Vec<f64>,
    /// The value of 1.
    pub high: Vec<f64>,
    /// Which dimensions are scaled at all. The others, such as grippers, stay as they are.
    pub mask: Vec<bool>,
}

/// One data set's statistics.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Of motions.
    pub action: Scale,
    /// Of the arm's state, where the model reads one.
    pub state: Option<Scale>,
}

impl Scale {
    /// Numbers that it is for.
    pub fn n(&self) -> usize {
        self.low.len()
    }

    /// Lowest and highest number of each dimension. Those that are not scaled are in -1..1.
    pub fn ranges(&self) -> Vec<[f64; 2]> {
        let range = |(low, high, scaled)| if scaled { [low, high] } else { [-1.0, 1.0] };
        self.dimensions().map(range).collect()
    }

    /// Lower bound, upper bound and whether it is scaled, of each dimension.
    pub(crate) fn dimensions(&self) -> impl Iterator<Item = (f64, f64, bool)> {
        let bounds = self.low.iter().zip(&self.high).zip(&self.mask);
        bounds.map(|((low, high), scaled)| (*low, *high, *scaled))
    }

    /// Numbers in -1..1 to the data set's units.
    pub fn unnormalize(&self, normalized: &[f64]) -> Vec<f64> {
        let unnormalize = |(x, (low, high, scaled)): (&f64, (f64, f64, bool))| {
            if scaled { 0.5 * (x + 1.0) * (high - low) + low } else { *x }
        };
        normalized.iter().zip(self.dimensions()).map(unnormalize).collect()
    }

    /// Numbers in the data set's units to -1..1, which data sets are trained as. Those of no width are 0.
    ///
    /// ref: `normalize_action_and_proprio`
    pub fn normalize(&self, numbers: &[f64]) -> Vec<f64> {
        let normalize = |(x, (low, high, scaled)): (&f64, (f64, f64, bool))| match scaled {
            true if low == high => 0.0,
            true => (2.0 * (x - low) / (high - low + WIDTH) - 1.0).clamp(-1.0, 1.0),
            false => *x,
        };
        numbers.iter().zip(self.dimensions()).map(normalize).collect()
    }

    /// Reads the `action` or `proprio` of a data set, or says what it has that cannot be used.
    fn parse(what: &str, statistics: &Value, bounds: Bounds) -> std::result::Result<Self, String> {
        let list = |key: &str| match &statistics[key] {
            Value::Array(list) => Ok(list),
            Value::Null => Err(format!("lacks {what}.{key}")),
            other => Err(format!("has {} for {what}.{key}; a list is needed", shown(other))),
        };
        let [low_key, high_key] = bounds.keys();
        let (low, high) = (list(low_key)?, list(high_key)?);
        let n = low.len();
        let mask: Vec<bool> = match &statistics["mask"] {
            Value::Null => vec![true; n],
            _ => {
                let switches = list("mask")?.iter().map(Value::as_bool).collect::<Option<_>>();
                switches.ok_or(format!("has an {what}.mask that is not all true or false"))?
            }
        };
        if high.len() != n || mask.len() != n || !(1..=MAX_DIMENSIONS).contains(&n) {
            let found = format!("{n} {low_key}, {} {high_key}, {} mask", high.len(), mask.len());
            return Err(format!("has {found}; equal numbers are needed"));
        }
        // Where a dimension is not scaled, the reference looks at neither: each end is itself.
        let numbers = |key: &str, list: &[Value], end: f64| {
            let number = |(i, value): (usize, &Value)| match value.as_f64() {
                Some(x) if x.is_finite() => Ok(x),
                _ if !mask[i] => Ok(end),
                _ => {
                    let found = shown(value);
                    Err(format!("has {found} for {what}.{key}[{i}]; a finite number is needed"))
                }
            };
            list.iter().enumerate().map(number).collect::<std::result::Result<Vec<_>, _>>()
        };
        let (low, high) = (numbers(low_key, low, -1.0)?, numbers(high_key, high, 1.0)?);
        if !low.iter().zip(&high).all(|(low, high)| (high - low).is_finite()) {
            return Err("has a range that is not finite".into());
        }
        // The wrong way round, by just what is added to keep a width from being zero.
        if low.iter().zip(&high).any(|(low, high)| high - low + WIDTH == 0.0) {
            return Err(format!("has a range of -{WIDTH:e}, by which nothing can be scaled"));
        }
        Ok(Self { low, high, mask })
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
    /// Reads the text of a `dataset_statistics.json`, or of a config's `norm_stats`. What is
    /// beside the data sets (`source_split`, …) is kept in the text and otherwise left alone.
    ///
    /// A data set that cannot be used, such as one with NaN, is an error when it is selected: others may be
    /// sound.
    ///
    /// # Errors
    /// [`Error::Model`] if it is not JSON, or holds no data set that can be used.
    pub fn parse(json: String) -> Result<Self> {
        Self::parse_with(json, Bounds::Quantiles, false)
    }

    /// The same with other bounds, and with the scale of the arm's state (`proprio`) if `with_state`.
    ///
    /// # Errors
    /// As [`Statistics::parse`].
    pub fn parse_with(json: String, bounds: Bounds, with_state: bool) -> Result<Self> {
        let wrong = |why: String| Error::Model { why: format!("its action statistics: {why}") };
        let entries: BTreeMap<String, Value> =
            serde_json::from_str(&json).map_err(|e| wrong(e.to_string()))?;
        let (mut datasets, mut unusable) = (BTreeMap::new(), BTreeMap::new());
        for (name, entry) in entries {
            let action = match entry.get("action") {
                None | Some(Value::Null) => continue,
                Some(action) => action,
            };
            let scale = |what, statistics| Scale::parse(what, statistics, bounds);
            let state = || with_state.then(|| scale("proprio", &entry["proprio"])).transpose();
            let dataset =
                scale("action", action).and_then(|action| Ok(Dataset { action, state: state()? }));
            match dataset {
                Ok(dataset) => drop(datasets.insert(name, dataset)),
                Err(why) => drop(unusable.insert(name, why)),
            }
        }
        if !datasets.is_empty() {
            return Ok(Self { json, datasets, unusable });
        }
        Err(match unusable.pop_first() {
            Some((name, why)) => unusable_error(&name, &why),
            None => {
                let [low, high] = bounds.keys();
                wrong(format!("there is no data set with `action.{low}` and `action.{high}`"))
            }
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
        self.datasets.values().map(|dataset| dataset.action.n()).max().unwrap_or(0)
    }

    /// The data set to un-normalize with. Without a key, the only one there is. As in the
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
        assert_eq!(dataset.action.unnormalize(&[0.5, 0.5, 0.5]), [1.0, 0.0, 0.5]);
        assert_eq!(dataset.action.unnormalize(&[-1.0, 1.0, -0.996]), [-2.0, 0.0, -0.996]);
    }

    #[test]
    fn numbers_are_scaled_as_data_sets_are_trained() {
        let json = r#"{"d": {"action": {"q01": [-2, 3, 0], "q99": [2, 3, 1],
                                        "mask": [true, true, false]}}}"#;
        let statistics = statistics(json).unwrap();
        let scale = &statistics.select(None).unwrap().1.action;
        let got = scale.normalize(&[1.0, 3.0, -7.0]);
        assert!((got[0] - 0.5).abs() < 1e-8, "{got:?}");
        assert_eq!((got[1], got[2]), (0.0, -7.0), "no width; not scaled");
        assert_eq!(scale.normalize(&[-9.0, 9.0, 0.25]), [-1.0, 0.0, 0.25]);
    }

    #[test]
    fn a_missing_mask_scales_everything() {
        let statistics = statistics(r#"{"d": {"action": {"q01": [0], "q99": [4]}}}"#).unwrap();
        assert_eq!(statistics.select(Some("d")).unwrap().1.action.unnormalize(&[0.0]), [2.0]);
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
        assert_eq!(dataset.action.unnormalize(&[0.5, 0.5]), [1.0, 0.5]);
        assert_eq!((dataset.action.low[1], dataset.action.high[1]), (-1.0, 1.0));
    }

    #[test]
    fn a_data_set_that_cannot_be_used_spoils_no_other() {
        let json = r#"{"a": {"action": {"q01": [0], "q99": [4]}},
                       "b": {"action": {"q01": ["NaN"], "q99": [4]}}}"#;
        let statistics = statistics(json).unwrap();
        assert_eq!(statistics.select(Some("a")).unwrap().1.action.unnormalize(&[0.0]), [2.0]);
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
            r#"{"d": {"action": {"q01": [1e-8], "q99": [0]}}}"#,
            r#"{"d": {"action": {"q01": [0], "q99": [1], "mask": [true, true]}}}"#,
        ] {
            assert!(statistics(json).is_err(), "{json}");
        }
    }
}
