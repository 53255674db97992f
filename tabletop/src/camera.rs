//! The cameras: where they are, and where in its picture each sees a point.

use crate::geometry::{Point, add, length, sub, turn};
use crate::world::Gripper;

/// Where the front camera is, in meters: in front of the table and above it.
const EYE: [f64; 3] = [0.0, -0.30, 0.75];
/// The point of the table's middle axis that it looks at.
const AIM: [f64; 3] = [0.0, 0.025, 0.03];
/// Tangent of half its angle of view.
const VIEW: f64 = 0.28;

/// Where the wrist camera is, as seen from between the fingertips: before the palm and above it, so
/// that it looks past the palm at what is between the fingers.
const WRIST_EYE: [f64; 3] = [0.0, -0.12, 0.14];
/// Tangent of half its angle of view, and of where the middle of its picture is from straight down:
/// its lens is shifted towards the fingertips.
const WRIST_VIEW: f64 = 0.8;
const WRIST_SHIFT: f64 = 0.7;

/// A camera.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Camera {
    /// It stands in front of the table and sees all of it.
    Front,
    /// It is fixed to this gripper, turns with it, and is above everything.
    Wrist(Gripper),
}

impl Camera {
    /// Where it sees a point: -1 … 1 from left to right and from top to bottom of its picture.
    pub fn seen(&self, at: Point, z: f64) -> Point {
        match self {
            Self::Front => seen_from_front(at, z),
            Self::Wrist(gripper) => {
                let [x, y] = turn(sub(at, wrist_eye(gripper)), -gripper.yaw);
                let depth = gripper.z + WRIST_EYE[2] - z;
                [x / depth, WRIST_SHIFT - y / depth].map(|tangent| tangent / WRIST_VIEW)
            }
        }
    }

    /// What grows with the distance from it, for things that stand on the table.
    pub fn distance(&self, at: Point) -> f64 {
        match self {
            Self::Front => at[1],
            Self::Wrist(gripper) => length(sub(at, wrist_eye(gripper))),
        }
    }
}

fn wrist_eye(gripper: &Gripper) -> Point {
    add(gripper.at, turn([WRIST_EYE[0], WRIST_EYE[1]], gripper.yaw))
}

fn seen_from_front([x, y]: Point, z: f64) -> Point {
    let (dy, dz) = (AIM[1] - EYE[1], AIM[2] - EYE[2]);
    let long = dy.hypot(dz);
    let (forward_y, forward_z) = (dy / long, dz / long);
    let (y, z) = (y - EYE[1], z - EYE[2]);
    let depth = VIEW * (y * forward_y + z * forward_z);
    [(x - EYE[0]) / depth, (y * forward_z - z * forward_y) / depth]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{CEILING, OPEN, REACH};

    /// A policy has nothing else to know it by.
    #[test]
    fn fingertips_are_in_the_front_picture_wherever_the_gripper_goes() {
        for at in [[-REACH, -REACH], [REACH, -REACH], [-REACH, REACH], [REACH, REACH]] {
            for z in [0.0, CEILING] {
                let seen = Camera::Front.seen(at, z);
                assert!(seen.iter().all(|x| x.abs() < 1.0), "{at:?} {z}: {seen:?}");
            }
        }
    }

    /// It moves and turns with them.
    #[test]
    fn the_wrist_camera_sees_the_fingertips_in_one_place_wherever_the_gripper_goes() {
        for (at, z, yaw) in [([0.0, 0.0], 0.0, 0.0), ([0.1, -0.07], 0.1, 1.2)] {
            let gripper = Gripper { at, z, yaw, opening: OPEN };
            let camera = Camera::Wrist(gripper);
            let [left, right] = gripper.fingers().map(|finger| camera.seen(finger, z));
            let middle = (WRIST_SHIFT + WRIST_EYE[1] / WRIST_EYE[2]) / WRIST_VIEW;
            let off = OPEN / 2.0 / WRIST_EYE[2] / WRIST_VIEW;
            for (seen, wanted) in [(left, [-off, middle]), (right, [off, middle])] {
                assert!(length(sub(seen, wanted)) < 1e-12, "{seen:?}, not {wanted:?}");
            }
        }
    }
}
