//! What goes wrong with an episode of the tabletop: the faults that the doctor is to find.

use anyhow::Result;
use openvla::Scale;
use openvla::image::RgbImage;
use openvla::image::imageops::{self, FilterType};
use openvla_doctor::hypothesis::Cause;
use openvla_doctor::picture::{PictureChange, jpeg};
use openvla_tabletop::SceneRng;

use crate::recording::Recording;

/// Faults that are injected. `None` is none.
pub const FAULTS: [Cause; 14] = [
    Cause::None,
    Cause::Bgr,
    Cause::Rotated180,
    Cause::Rotated90,
    Cause::Mirrored,
    Cause::Cropped,
    Cause::Letterboxed,
    Cause::Jpeg,
    Cause::Statistics,
    Cause::GripperInverted,
    Cause::GripperScale,
    Cause::Permuted,
    Cause::Lag,
    Cause::Instruction,
];

/// Another data set's ranges: those of `bridge_orig` in openvla-7b, rounded.
pub fn bridge() -> (String, Scale) {
    let low = vec![-0.0287, -0.0417, -0.0261, -0.0809, -0.0929, -0.2072, 0.0];
    let high = vec![0.0283, 0.0409, 0.0402, 0.0819, 0.0779, 0.2038, 1.0];
    let mask = vec![true, true, true, true, true, true, false];
    ("bridge_orig".to_owned(), Scale { low, high, mask })
}

/// Injects a fault, drawn where there are several of its kind, and cuts the recording after `n` moments; `longer` has
/// three more. Returns the fault's name. `scale` is that of the actions.
pub fn inject(
    fault: Cause,
    longer: &Recording,
    n: usize,
    scale: &Scale,
    rng: &mut SceneRng,
) -> Result<(String, Recording)> {
    let mut recording = longer.clone();
    let mut name = fault.name();
    let picture =
        |recording: &mut Recording, change: &dyn Fn(&RgbImage) -> Result<RgbImage>| -> Result<()> {
            for image in recording.frames.iter_mut().flatten() {
                *image = change(image)?;
            }
            Ok(())
        };
    let by = |change: PictureChange| move |image: &RgbImage| Ok(change.apply(image));
    match fault {
        Cause::Bgr => picture(&mut recording, &by(PictureChange::SwapChannels))?,
        Cause::Rotated180 => picture(&mut recording, &by(PictureChange::Rotate180))?,
        Cause::Rotated90 => {
            let turns = [PictureChange::Clockwise, PictureChange::CounterClockwise];
            picture(&mut recording, &by(turns[rng.below(2)]))?;
        }
        Cause::Mirrored => {
            let flips = [PictureChange::Mirror, PictureChange::Flip];
            picture(&mut recording, &by(flips[rng.below(2)]))?;
        }
        Cause::Cropped => picture(&mut recording, &by(PictureChange::Crop))?,
        Cause::Letterboxed => picture(&mut recording, &|image| {
            let (w, h) = image.dimensions();
            let mut out = RgbImage::new(w, h);
            let small = imageops::resize(image, w, 3 * h / 4, FilterType::CatmullRom);
            imageops::replace(&mut out, &small, 0, i64::from(h / 8));
            Ok(out)
        })?,
        Cause::Jpeg => picture(&mut recording, &|image| jpeg(image, 10))?,
        Cause::Statistics => {
            let (_, other) = bridge();
            let kind = rng.below(3);
            name = ["of bridge_orig", "normalized", "centimeters"][kind].to_owned();
            for action in &mut recording.actions {
                match kind {
                    0 => *action = other.unnormalize(&scale.normalize(action)),
                    1 => *action = scale.normalize(action),
                    _ => action[..3].iter_mut().for_each(|x| *x *= 100.0),
                }
            }
        }
        Cause::GripperInverted | Cause::GripperScale => {
            let kinds: &[(&str, f64, f64)] = if fault == Cause::GripperInverted {
                &[("1 is closed, 0 open", -1.0, 1.0), ("1 is closed, -1 open", -2.0, 1.0)]
            } else {
                &[("-1 to 1", 2.0, -1.0), ("0 to 255", 255.0, 0.0), ("0 to 0.08", 0.08, 0.0)]
            };
            let (said, factor, offset) = kinds[rng.below(kinds.len())];
            name = said.to_owned();
            recording.actions.iter_mut().for_each(|action| action[6] = factor * action[6] + offset);
        }
        Cause::Permuted => {
            let orders = [
                [1, 0, 2, 3, 4, 5, 6],
                [0, 2, 1, 3, 4, 5, 6],
                [2, 1, 0, 3, 4, 5, 6],
                [3, 4, 5, 0, 1, 2, 6],
                [6, 0, 1, 2, 3, 4, 5],
            ];
            let order = orders[rng.below(orders.len())];
            name = format!("{order:?}");
            for action in &mut recording.actions {
                *action = order.iter().map(|axis| action[*axis]).collect();
            }
        }
        Cause::Lag => {
            let shift = [-3, -2, -1, 1, 2, 3][rng.below(6)];
            name = format!("{shift}");
            // At moment i, what was done at moment i - shift; before the first, the arm stands still.
            let at = |i: usize| match usize::try_from(i as i64 - shift) {
                Ok(i) => longer.actions[i].clone(),
                Err(_) => vec![0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
            };
            recording.actions = (0..n).map(at).collect();
        }
        Cause::Instruction => {
            let prompt = |task: &str| openvla::prompt::OPENVLA.replace("{instruction}", task);
            let task = &recording.instruction;
            let kinds = [
                ("full stop", format!("{task}.")),
                ("underscores", task.replace(' ', "_")),
                ("whole prompt", prompt(task)),
            ];
            let (said, text) = kinds[rng.below(3)].clone();
            (name, recording.instruction) = (said.to_owned(), text);
        }
        Cause::None | Cause::Unknown => {}
    }
    recording.frames.truncate(n);
    recording.states.truncate(n);
    recording.actions.truncate(n);
    Ok((name, recording))
}
