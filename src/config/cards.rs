//! Action cards: what each number of a motion is, data set by data set.
//!
//! The statistics say how numbers are scaled; a card says what a robot is to make of them. What no
//! public source states is left out: a wrong unit moves a robot wrongly.

use std::collections::BTreeMap;

use openvla_kernels::{Gguf, Header};
use serde::{Deserialize, Serialize};

use super::general::optional;
use super::key;
use crate::statistics::{Dataset, Statistics};
use crate::{Error, Result};

/// What the motions of one data set are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionCard {
    /// The numbers of a motion, in order.
    pub dimensions: Vec<Dimension>,
    /// What the gripper's number means, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gripper: Option<Gripper>,
    /// Motions a second when the data were recorded, in Hz, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_hz: Option<f64>,
    /// What else must be known to use the numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// One number of a motion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dimension {
    /// "x", "y", "z", "roll", "pitch", "yaw", "gripper"; or its number, from 0.
    pub name: String,
    /// The value of 1, such as "0.05 m"; "as recorded" where that is not known.
    pub unit: String,
    /// The first percentile of the data.
    pub q01: f64,
    /// The 99th. Motions are between the two where they are `normalized`.
    pub q99: f64,
    /// Whether -1..1 is scaled to this range; otherwise the motion is the token's own -1..1.
    // The key keeps the spelling that files have.
    #[serde(rename = "normalised")]
    pub normalized: bool,
}

/// The ends of the gripper's number, which is absolute: where to be, not how far to move.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gripper {
    /// What opens it.
    pub open: f64,
    /// What closes it.
    pub closed: f64,
}

/// The cards of a file, by data set. A file may lack them.
pub fn read(file: &Gguf) -> Result<BTreeMap<String, ActionCard>> {
    let Some(json) = optional::<String>(file, key::ACTION_CARDS)? else {
        return Ok(BTreeMap::new());
    };
    serde_json::from_str(&json).map_err(|error| wrong(&error.to_string()))
}

/// Adds them to the header of a file to be written.
pub fn write(cards: &BTreeMap<String, ActionCard>, to: &mut Header) {
    if !cards.is_empty() {
        let json = serde_json::to_string(cards).expect("strings and numbers are JSON");
        to.set(key::ACTION_CARDS, json);
    }
}

/// A card that tells another range than the robot is moved by is worse than none.
pub fn check(cards: &BTreeMap<String, ActionCard>, statistics: &Statistics) -> Result<()> {
    for (name, card) in cards {
        let agrees = statistics.datasets().get(name).is_some_and(|dataset| card.is_of(dataset));
        if !agrees {
            return Err(wrong(&format!("that of `{name}` disagrees with the statistics")));
        }
        if !card.rate_hz.is_none_or(|hz| hz > 0.0) {
            return Err(wrong(&format!("that of `{name}` has a rate of no Hz")));
        }
    }
    Ok(())
}

impl ActionCard {
    fn is_of(&self, dataset: &Dataset) -> bool {
        let ranges = dataset.action.dimensions();
        self.dimensions.iter().map(|d| (d.q01, d.q99, d.normalized)).eq(ranges)
    }
}

fn wrong(why: &str) -> Error {
    Error::Model { why: format!("its action cards (`{}`): {why}", key::ACTION_CARDS) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics() -> Statistics {
        let json = r#"{"d": {"action": {"q01": [-0.1, 0], "q99": [0.30000000000000004, 1],
                                        "mask": [true, false]}}}"#;
        Statistics::parse(json.to_owned()).unwrap()
    }

    fn card() -> ActionCard {
        let dimension = |name: &str, q01, q99, normalized| Dimension {
            name: name.into(),
            unit: "m".into(),
            q01,
            q99,
            normalized,
        };
        ActionCard {
            dimensions: vec![
                dimension("x", -0.1, 0.300_000_000_000_000_04, true),
                dimension("gripper", 0.0, 1.0, false),
            ],
            gripper: Some(Gripper { open: 1.0, closed: 0.0 }),
            rate_hz: Some(12.5),
            note: Some("\"quoted\"\n".into()),
        }
    }

    #[test]
    fn cards_come_back_as_they_were_written() {
        let bare = ActionCard { gripper: None, rate_hz: None, note: None, ..card() };
        let cards = BTreeMap::from([("a".to_owned(), bare), ("d".to_owned(), card())]);
        for cards in [BTreeMap::new(), cards] {
            let mut header = Header::default();
            write(&cards, &mut header);
            let file = Gguf::built_in("cards", header.encode().leak()).unwrap();
            assert_eq!(read(&file).unwrap(), cards);
        }
    }

    #[test]
    fn cards_that_disagree_with_the_statistics_are_refused() {
        let told = |name: &str, change: fn(&mut ActionCard)| {
            let mut card = card();
            change(&mut card);
            check(&BTreeMap::from([(name.to_owned(), card)]), &statistics())
        };
        assert!(told("d", |_| ()).is_ok());
        assert!(told("d", |card| card.note = None).is_ok());
        let refused = |outcome: Result<()>| outcome.unwrap_err().to_string();
        assert!(refused(told("e", |_| ())).contains("`e` disagrees"));
        for change in [
            (|card| card.dimensions[0].q99 = 0.3) as fn(&mut ActionCard),
            |card| card.dimensions[1].normalized = true,
            |card| drop(card.dimensions.pop()),
            |card| card.dimensions.push(card.dimensions[0].clone()),
        ] {
            assert!(refused(told("d", change)).contains("`d` disagrees"));
        }
        assert!(refused(told("d", |card| card.rate_hz = Some(-5.0))).contains("no Hz"));
    }

    #[test]
    fn what_is_no_cards_is_refused() {
        for json in ["", "[]", "{\"d\": 1}", "{\"d\": {}}", &"[".repeat(9999)] {
            let mut header = Header::default();
            header.set(key::ACTION_CARDS, json.to_owned());
            let file = Gguf::built_in("cards", header.encode().leak()).unwrap();
            let error = read(&file).unwrap_err().to_string();
            assert!(error.contains("`openvla.action_cards`"), "{error}");
        }
    }
}
