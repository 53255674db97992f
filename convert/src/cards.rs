//! Action cards: the meaning of each data set's actions, as far as public sources tell.
//!
//! | what | source |
//! |---|---|
//! | names, the gripper | openvla `prismatic/vla/datasets/rlds/oxe/{configs,transforms}.py` |
//! | rates | the Open X-Embodiment data set overview and RDT's `dataset_control_freq.json`, agreeing |
//! | LIBERO | openvla-oft `transforms.py`, LIBERO `env_wrapper.py`, robosuite `osc_pose.json` |
//!
//! The authors leave units to each data set (openvla issue 3), and the data sets' descriptions name
//! none; so only LIBERO's are known, from its controller. `dobbe` has no rate: the overview says
//! 3.75 Hz, RDT 30. No convention is known for a gripper that OpenVLA passes through unchanged.

use std::collections::BTreeMap;

use openvla::{ActionCard, Dataset, Dimension, Gripper, Statistics};

/// OpenVLA's seven dimensions. The last is the gripper, which is not scaled.
const NAMES: [&str; 7] = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"];
/// The unit of numbers that no source documents.
const AS_RECORDED: &str = "as recorded";
/// openvla's transforms convert grippers to absolute positions with this convention.
const STANDARD: Option<Gripper> = Some(Gripper { open: 1.0, closed: 0.0 });

/// What is known of a data set beyond its statistics.
struct Known {
    name: &'static str,
    rate_hz: Option<f64>,
    gripper: Option<Gripper>,
    note: Option<&'static str>,
}

const fn known(name: &'static str, rate_hz: f64, gripper: Option<Gripper>) -> Known {
    Known { name, rate_hz: Some(rate_hz), gripper, note: None }
}

const fn noted(known: Known, note: &'static str) -> Known {
    Known { note: Some(note), ..known }
}

const ABSOLUTE: &str = "x to yaw are where to be, not how far to move: see their ranges";

/// Every data set of openvla-7b, and bridge_orig's other names.
const KNOWN: [Known; 27] = [
    known("austin_buds_dataset_converted_externally_to_rlds", 20.0, STANDARD),
    known("austin_sailor_dataset_converted_externally_to_rlds", 20.0, STANDARD),
    known("austin_sirius_dataset_converted_externally_to_rlds", 20.0, STANDARD),
    known("bc_z", 10.0, STANDARD),
    known("berkeley_autolab_ur5", 5.0, STANDARD),
    noted(known("berkeley_cable_routing", 10.0, None), "x to yaw are velocities; no gripper"),
    known("berkeley_fanuc_manipulation", 10.0, STANDARD),
    known("bridge_dataset", 5.0, STANDARD),
    known("bridge_orig", 5.0, STANDARD),
    known("bridge_oxe", 5.0, STANDARD),
    known("cmu_stretch", 10.0, None),
    known("dlr_edan_shared_control_converted_externally_to_rlds", 5.0, STANDARD),
    Known { name: "dobbe", rate_hz: None, gripper: None, note: None },
    known("fmb_dataset", 10.0, None),
    known("fractal20220817_data", 3.0, STANDARD),
    known("furniture_bench_dataset_converted_externally_to_rlds", 10.0, STANDARD),
    noted(known("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 20.0, None), ABSOLUTE),
    known("jaco_play", 10.0, STANDARD),
    known("kuka", 10.0, STANDARD),
    known("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0, STANDARD),
    known("roboturk", 10.0, STANDARD),
    known("stanford_hydra_dataset_converted_externally_to_rlds", 10.0, STANDARD),
    known("taco_play", 15.0, STANDARD),
    noted(known("toto", 30.0, None), ABSOLUTE),
    noted(
        known("ucsd_kitchen_dataset_converted_externally_to_rlds", 2.0, None),
        "x to yaw are neither metres and radians nor small: see their ranges",
    ),
    known("utaustin_mutex", 20.0, STANDARD),
    known("viola", 20.0, STANDARD),
];

/// LIBERO's suites; also with the suffix `_no_noops`, without actions that do nothing.
const LIBERO: [&str; 5] =
    ["libero_10", "libero_90", "libero_goal", "libero_object", "libero_spatial"];
/// What an action of 1 means to the controller of LIBERO's arm.
const LIBERO_UNITS: [&str; 6] = ["0.05 m", "0.05 m", "0.05 m", "0.5 rad", "0.5 rad", "0.5 rad"];
const LIBERO_NOTE: &str = "x to yaw are commands of robosuite's OSC_POSE controller; the \
     simulator's own gripper is -1 open, 1 closed: give it -sign(2·gripper - 1)";

/// The cards of all data sets.
pub fn cards(statistics: &Statistics) -> BTreeMap<String, ActionCard> {
    let card = |(name, dataset): (&String, &Dataset)| (name.clone(), card(name, dataset));
    statistics.datasets().iter().map(card).collect()
}

fn card(name: &str, dataset: &Dataset) -> ActionCard {
    let named = has_gripper(dataset);
    let plain = name.strip_suffix("_no_noops").unwrap_or(name);
    let libero = named && LIBERO.contains(&plain);
    let known = KNOWN.iter().find(|known| known.name == name).filter(|_| named);
    let (rate_hz, gripper, note) = match known {
        Some(Known { rate_hz, gripper, note, .. }) => (*rate_hz, *gripper, *note),
        None if libero => (Some(20.0), STANDARD, Some(LIBERO_NOTE)),
        None => (None, None, None),
    };
    let unit = |i: usize| match i {
        0..6 if libero => LIBERO_UNITS[i],
        6 if gripper.is_some() => "0..1",
        _ => AS_RECORDED,
    };
    let dimension = |i: usize| Dimension {
        name: if named { NAMES[i].to_owned() } else { i.to_string() },
        unit: unit(i).to_owned(),
        q01: dataset.action.low[i],
        q99: dataset.action.high[i],
        normalized: dataset.action.mask[i],
    };
    let dimensions = (0..dataset.action.n()).map(dimension).collect();
    ActionCard { dimensions, gripper, rate_hz, note: note.map(str::to_owned) }
}

/// Whether the last dimension is a gripper. With seven joints, all would be scaled.
fn has_gripper(dataset: &Dataset) -> bool {
    dataset.action.mask == [true, true, true, true, true, true, false]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, action: &str) -> ActionCard {
        let json = format!(r#"{{"{name}": {{"action": {action}}}}}"#);
        cards(&Statistics::parse(json).unwrap()).remove(name).unwrap()
    }

    const SEVEN: &str = r#"{"q01": [-1, -1, -1, -1, -1, -1, 0], "q99": [1, 1, 1, 1, 1, 1, 1],
                            "mask": [true, true, true, true, true, true, false]}"#;

    fn units(card: &ActionCard) -> Vec<&str> {
        card.dimensions.iter().map(|dimension| dimension.unit.as_str()).collect()
    }

    fn names(card: &ActionCard) -> Vec<&str> {
        card.dimensions.iter().map(|dimension| dimension.name.as_str()).collect()
    }

    #[test]
    fn a_known_data_set_has_its_rate_and_gripper_and_no_unit_that_nobody_states() {
        let card = of("bridge_orig", SEVEN);
        assert_eq!((card.rate_hz, card.gripper), (Some(5.0), STANDARD));
        assert_eq!(names(&card), NAMES);
        assert_eq!(units(&card), [[AS_RECORDED; 6].as_slice(), &["0..1"]].concat());
        let last = card.dimensions.last().unwrap();
        assert_eq!((last.q01, last.q99, last.normalized), (0.0, 1.0, false));
        let velocities = of("berkeley_cable_routing", SEVEN);
        assert_eq!((velocities.gripper, units(&velocities)), (None, vec![AS_RECORDED; 7]));
        assert!(velocities.note.unwrap().contains("velocities"));
    }

    #[test]
    fn libero_is_known_with_and_without_actions_that_do_nothing() {
        let card = of("libero_spatial_no_noops", SEVEN);
        assert_eq!(card, of("libero_spatial", SEVEN));
        assert_eq!(units(&card), [LIBERO_UNITS.as_slice(), &["0..1"]].concat());
        assert_eq!((card.rate_hz, card.gripper), (Some(20.0), STANDARD));
        assert!(card.note.unwrap().contains("-1 open, 1 closed"));
    }

    #[test]
    fn nothing_is_said_of_what_nobody_knows() {
        let mine = of("my_robot", SEVEN);
        assert_eq!((mine.rate_hz, mine.gripper, &mine.note), (None, None, &None));
        assert_eq!((names(&mine), units(&mine)), (NAMES.to_vec(), vec![AS_RECORDED; 7]));
        // Seven joints, or three numbers, whatever their data set is called.
        let joints = r#"{"q01": [0, 0, 0, 0, 0, 0, 0], "q99": [1, 1, 1, 1, 1, 1, 1]}"#;
        for name in ["bridge_orig", "libero_10", "my_robot"] {
            let card = of(name, joints);
            assert_eq!((names(&card)[0], names(&card)[6]), ("0", "6"), "{name}");
            assert_eq!((card.rate_hz, card.gripper, card.note), (None, None, None), "{name}");
            assert_eq!(
                names(&of(name, r#"{"q01": [0, 0, 0], "q99": [1, 1, 1]}"#)),
                ["0", "1", "2"]
            );
        }
    }

    #[test]
    fn each_data_set_is_known_once() {
        assert!(KNOWN.is_sorted_by_key(|known| known.name));
        let names: std::collections::BTreeSet<_> = KNOWN.iter().map(|known| known.name).collect();
        assert_eq!(names.len(), KNOWN.len());
    }
}
