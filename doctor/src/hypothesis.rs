//! What may be wrong, each as a change that undoes it.

use openvla::prompt::Prompt;
use openvla::{Config, Scale};
use serde::Serialize;

use crate::action::{ActionChange, Scaled, gripper_axes};
use crate::picture::PictureChange;

/// Why a robot moves wrongly, as far as the doctor knows reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Red and blue are swapped.
    Bgr,
    /// Pictures are upside down.
    #[serde(rename = "rotated-180")]
    Rotated180,
    /// Pictures lie on a side.
    #[serde(rename = "rotated-90")]
    Rotated90,
    /// Pictures are mirrored.
    Mirrored,
    /// Pictures are cropped where they should not be, or the other way round.
    Cropped,
    /// Pictures have bars where they should be stretched, or the other way round.
    Letterboxed,
    /// Pictures went through strong JPEG.
    Jpeg,
    /// Actions are of another data set's statistics, or in other units.
    Statistics,
    /// The gripper opens where it should close.
    GripperInverted,
    /// The gripper's numbers have another range.
    GripperScale,
    /// Numbers of an action are in another order.
    Permuted,
    /// Actions belong to earlier or later pictures.
    Lag,
    /// The instruction is not worded as the model knows it.
    Instruction,
    /// Nothing is wrong.
    None,
    /// Something may be wrong, and nothing tried explains it; or several things do equally.
    Unknown,
}

impl Cause {
    /// Its name, as in JSON.
    pub fn name(self) -> String {
        let name = serde_json::to_value(self).ok();
        name.and_then(|name| Some(name.as_str()?.to_owned())).unwrap_or_default()
    }
}

/// Something that may be wrong.
#[derive(Debug, Clone)]
pub struct Hypothesis {
    /// What kind of reason it is.
    pub cause: Cause,
    /// In a few words.
    pub name: String,
    /// What to do about it.
    pub fix: String,
    /// What undoes it.
    pub change: Change,
}

/// What is done to an episode before the model judges it.
#[derive(Debug, Clone)]
pub enum Change {
    /// To every picture.
    Picture(PictureChange),
    /// Something else was asked for.
    Instruction(String),
    /// To every action.
    Action(ActionChange),
    /// Pictures go with the action so many moments later; earlier if negative.
    Lag(i32),
}

/// What is known of the input before any hypothesis is tried.
#[derive(Debug, Clone)]
pub struct Setting<'a> {
    /// What the model's file says.
    pub config: &'a Config,
    /// The data set that is taken for the episode's.
    pub key: &'a str,
    /// Other data sets that it may be, by name.
    pub others: Vec<(String, Scale)>,
    /// What was asked for.
    pub instruction: &'a str,
    /// The episode's actions.
    pub actions: &'a [Vec<f64>],
    /// Whether pictures have bars.
    pub has_bars: bool,
    /// Whether pictures are wider than high, or higher than wide.
    pub is_oblong: bool,
    /// Whether blocks of JPEG show.
    pub has_blocks: bool,
    /// Whether only the likeliest are to be tried.
    pub quick: bool,
}

/// By how many moments actions are shifted.
pub const MAX_LAG: i32 = 3;

/// All hypotheses that can be told from the input as it is. Those about pictures come first.
pub fn all(setting: &Setting<'_>, scale: &Scale) -> Vec<Hypothesis> {
    let mut all = pictures(setting);
    all.extend(instructions(&setting.config.prompt, setting.instruction));
    let changes = statistics(setting, scale)
        .into_iter()
        .chain(grippers(scale))
        .chain(permutations(scale.n()));
    // What changes no action cannot be tried, such as a permutation of zeros.
    let given = |action: &Vec<f64>| Scaled::new(action, scale);
    all.extend(changes.filter(|hypothesis| match &hypothesis.change {
        Change::Action(change) => {
            setting.actions.iter().any(|action| change.apply(action, scale).differs(&given(action)))
        }
        _ => true,
    }));
    all.extend(lags());
    all
}

fn hypothesis(cause: Cause, name: &str, fix: &str, change: Change) -> Hypothesis {
    Hypothesis { cause, name: name.to_owned(), fix: fix.to_owned(), change }
}

fn pictures(setting: &Setting<'_>) -> Vec<Hypothesis> {
    use PictureChange::*;
    let crops = setting.config.preprocess.center_crop;
    let uncrop = if crops {
        "your frames are cropped before the model crops them again: say --no-center-crop"
    } else {
        "your frames are cropped: send what the camera saw, all of it"
    };
    let mut all = vec![
        (
            Cause::Bgr,
            "red and blue are swapped",
            "your frames are BGR: swap the channels, frame[..., ::-1] or cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)",
            SwapChannels,
        ),
        (
            Cause::Rotated180,
            "upside down",
            "your frames are upside down: rotate them by 180°, frame[::-1, ::-1]; frames of LIBERO's simulator want \
             --profile libero",
            Rotate180,
        ),
        (
            Cause::Mirrored,
            "mirrored",
            "your frames are mirrored: flip them, frame[:, ::-1]",
            Mirror,
        ),
        (
            Cause::Rotated90,
            "on the left side",
            "your frames lie on a side: turn them clockwise, np.rot90(frame, -1)",
            Clockwise,
        ),
        (
            Cause::Rotated90,
            "on the right side",
            "your frames lie on a side: turn them counter-clockwise, np.rot90(frame)",
            CounterClockwise,
        ),
    ];
    if setting.has_bars {
        all.push((
            Cause::Letterboxed,
            "bars at the rim",
            "your frames have bars: cut them off before the model resizes them",
            CutBars,
        ));
    }
    if setting.has_blocks {
        all.push((
            Cause::Jpeg,
            "strong JPEG",
            "your frames went through strong JPEG: send PNG, or JPEG of quality 90 and more",
            Deblock,
        ));
    }
    if !setting.quick {
        all.push((Cause::Mirrored, "flipped", "your frames are flipped: frame[::-1]", Flip));
        all.push((Cause::Cropped, "cropped", uncrop, Uncrop));
        if !crops {
            all.push((
                Cause::Cropped,
                "not cropped",
                "the model expects the middle nine tenths of a picture's area: say --center-crop",
                Crop,
            ));
        }
        if setting.is_oblong && !setting.has_bars {
            all.push((
                Cause::Letterboxed,
                "stretched",
                "the model expects pictures with bars that make them square, not stretched ones: pad your frames",
                AddBars,
            ));
        }
    }
    let hypothesis =
        |(cause, name, fix, change)| hypothesis(cause, name, fix, Change::Picture(change));
    all.into_iter().map(hypothesis).collect()
}

fn instructions(prompt: &Prompt, given: &str) -> Vec<Hypothesis> {
    let (before, after) = prompt.template.split_once("{instruction}").unwrap_or_default();
    let lower = given.to_lowercase();
    let task = given.trim().trim_end_matches('.').trim_end();
    let inner = lower
        .find(&before.to_lowercase())
        .map(|at| &lower[at + before.to_lowercase().len()..])
        .map(|rest| rest.split_once(after.to_lowercase().trim()).map_or(rest, |(task, _)| task));
    let words = task.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut tried = vec![
        ("a full stop", words.clone()),
        ("no full stop", format!("{words}.")),
        ("underscores", words.replace('_', " ")),
        ("the whole prompt", inner.unwrap_or(&words).trim().to_owned()),
        ("another task, or not as the model knows it", String::new()),
    ];
    // What the model is shown is in lower case whatever was given.
    let mut shown = vec![prompt.text(given)];
    tried.retain(|(_, text)| {
        let text = prompt.text(text);
        let is_new = !shown.contains(&text);
        shown.push(text);
        is_new
    });
    let hypothesis = |(name, text): (&str, String)| {
        let fix = if text.is_empty() {
            "the instruction misleads the model more than none would: word it as the training data did".to_owned()
        } else {
            format!("ask for \"{text}\"")
        };
        hypothesis(Cause::Instruction, name, &fix, Change::Instruction(text))
    };
    tried.into_iter().map(hypothesis).collect()
}

fn statistics(setting: &Setting<'_>, scale: &Scale) -> Vec<Hypothesis> {
    let mut all: Vec<Hypothesis> = setting
        .others
        .iter()
        .filter(|(name, other)| name != setting.key && other.n() == scale.n())
        .map(|(name, other)| {
            let name = format!("those of {name}");
            let fix = format!(
                "the actions are in the units of {}: say --unnorm-key {}",
                &name[9..],
                &name[9..]
            );
            hypothesis(
                Cause::Statistics,
                &name,
                &fix,
                Change::Action(ActionChange::Scale(other.clone())),
            )
        })
        .collect();
    let push = |all: &mut Vec<Hypothesis>, name: &str, fix: &str, change| {
        all.push(hypothesis(Cause::Statistics, name, fix, Change::Action(change)));
    };
    let fix =
        "the actions are in -1 … 1 already: un-normalize them with the data set's statistics, once";
    push(&mut all, "normalized numbers", fix, ActionChange::Normalized);
    let gripper = gripper_axes(scale);
    let factors = |factor: f64| {
        let each = |axis: usize| if gripper.contains(&axis) { 1.0 } else { factor };
        ActionChange::Multiply((0..scale.n()).map(each).collect())
    };
    for (name, factor) in [("centimeters", 0.01), ("millimeters", 0.001)] {
        let fix =
            format!("positions are in {name}, the data set's in meters: multiply them by {factor}");
        let each =
            |axis: usize| if axis % 7 < 3 && !gripper.contains(&axis) { factor } else { 1.0 };
        let change = ActionChange::Multiply((0..scale.n()).map(each).collect());
        push(&mut all, name, &fix, change);
    }
    let degrees = |axis: usize| match axis % 7 {
        3..6 if !gripper.contains(&axis) => std::f64::consts::PI / 180.0,
        _ => 1.0,
    };
    let fix = "rotations are in degrees, the data set's in radians: multiply them by π/180";
    push(&mut all, "degrees", fix, ActionChange::Multiply((0..scale.n()).map(degrees).collect()));
    for factor in [0.2, 0.5, 2.0, 5.0] {
        let fix = format!(
            "motions are {} times too {}: their rate or scale is another than the data set's",
            if factor < 1.0 { 1.0 / factor } else { factor },
            if factor < 1.0 { "long" } else { "short" }
        );
        push(&mut all, &format!("all times {factor}"), &fix, factors(factor));
    }
    all
}

fn grippers(scale: &Scale) -> Vec<Hypothesis> {
    let axes = gripper_axes(scale);
    let all = [
        (Cause::GripperInverted, "1 - x", -1.0, 1.0),
        (Cause::GripperInverted, "-x", -1.0, 0.0),
        (Cause::GripperInverted, "(1 - x) / 2", -0.5, 0.5),
        (Cause::GripperInverted, "1 - 2x", -2.0, 1.0),
        (Cause::GripperScale, "(x + 1) / 2", 0.5, 0.5),
        (Cause::GripperScale, "2x - 1", 2.0, -1.0),
        (Cause::GripperScale, "x / 100", 0.01, 0.0),
        (Cause::GripperScale, "x / 255", 1.0 / 255.0, 0.0),
        (Cause::GripperScale, "x / 0.08", 12.5, 0.0),
    ];
    let hypothesis = |(cause, name, factor, offset)| {
        let fix = match cause {
            Cause::GripperInverted => {
                format!("the gripper's sign is the other one: make it {name}")
            }
            _ => format!("the gripper's numbers have another range: make it {name}"),
        };
        let change = ActionChange::Gripper { axes: axes.clone(), factor, offset };
        hypothesis(cause, &format!("gripper is {name}"), &fix, Change::Action(change))
    };
    all.into_iter().map(hypothesis).collect()
}

fn permutations(n: usize) -> Vec<Hypothesis> {
    let seven: [(&str, [usize; 7]); 8] = [
        ("x and y are swapped", [1, 0, 2, 3, 4, 5, 6]),
        ("y and z are swapped", [0, 2, 1, 3, 4, 5, 6]),
        ("x and z are swapped", [2, 1, 0, 3, 4, 5, 6]),
        ("z x y", [1, 2, 0, 3, 4, 5, 6]),
        ("y z x", [2, 0, 1, 3, 4, 5, 6]),
        ("roll and yaw are swapped", [0, 1, 2, 5, 4, 3, 6]),
        ("rotations first", [3, 4, 5, 0, 1, 2, 6]),
        ("gripper first", [1, 2, 3, 4, 5, 6, 0]),
    ];
    let hypothesis = |(name, order): (&str, Vec<usize>)| {
        let fix = format!("numbers of the actions are in another order: take action[{order:?}]");
        hypothesis(Cause::Permuted, name, &fix, Change::Action(ActionChange::Permute(order)))
    };
    match n {
        7 => seven.into_iter().map(|(name, order)| hypothesis((name, order.to_vec()))).collect(),
        14 => vec![hypothesis(("the arms are swapped", (7..14).chain(0..7).collect()))],
        _ => Vec::new(),
    }
}

fn lags() -> Vec<Hypothesis> {
    let shifts = (-MAX_LAG..=MAX_LAG).filter(|shift| *shift != 0);
    let hypothesis = |shift: i32| {
        let n = shift.abs();
        let late = if shift > 0 { "late" } else { "early" };
        let sign = if shift > 0 { "+" } else { "-" };
        let fix =
            format!("actions come {n} frames too {late}: frame i goes with action i {sign} {n}");
        hypothesis(Cause::Lag, &format!("{n} frames {late}"), &fix, Change::Lag(shift))
    };
    shifts.map(hypothesis).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_tried_as_they_might_have_been_meant() {
        let prompt = Prompt::new(openvla::prompt::OPENVLA.into(), 3).unwrap();
        let tried = |given: &str| -> Vec<String> {
            let texts = instructions(&prompt, given).into_iter().map(|h| match h.change {
                Change::Instruction(text) => text,
                _ => unreachable!(),
            });
            texts.collect()
        };
        assert_eq!(tried("put it down"), ["put it down.", ""]);
        assert_eq!(tried("Put it down."), ["Put it down", ""], "case is not seen");
        assert!(tried("put_it_down").contains(&"put it down".to_owned()));
        let whole = prompt.text("put it down");
        assert!(tried(&whole).contains(&"put it down".to_owned()), "{:?}", tried(&whole));
    }
}
