//! The conventions of LIBERO's environment, which are its client's business and not the model's.
//!
//! ref: openvla `experiments/robot/robot_utils.py` `normalize_gripper_action`, `invert_gripper_action`;
//! `experiments/robot/libero/libero_utils.py` `quat2axisangle`

/// A motion's gripper, of a data set where 0 is closed and 1 open, for the environment, where -1 opens
/// and 1 closes. What is exactly between stays 0.
pub fn gripper(gripper: f64) -> f64 {
    let centered = 2.0 * gripper - 1.0;
    if centered == 0.0 { 0.0 } else { -centered.signum() }
}

/// A rotation as axis times angle in radians, as states of LIBERO have it, of a quaternion x, y, z, w.
/// Angles reach 2π: the quaternion's sign is not normalized.
pub fn axis_angle(quaternion: [f64; 4]) -> [f64; 3] {
    let [x, y, z, w] = quaternion;
    let w = w.clamp(-1.0, 1.0);
    let sine = (1.0 - w * w).sqrt();
    if sine == 0.0 {
        return [0.0; 3];
    }
    [x, y, z].map(|part| part * 2.0 * w.acos() / sine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::PI;

    #[test]
    fn the_gripper_opens_at_minus_one() {
        assert_eq!(
            [-0.3, 0.0, 0.49, 0.51, 1.0, 7.0].map(gripper),
            [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
        );
        assert_eq!(gripper(0.5), 0.0);
        assert!(gripper(f64::NAN).is_nan());
    }

    #[test]
    fn rotations_are_an_axis_times_an_angle() {
        let half = 0.5_f64.sqrt();
        let close = |got: [f64; 3], want: [f64; 3]| {
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12), "{got:?} {want:?}");
        };
        close(axis_angle([half, 0.0, 0.0, half]), [PI / 2.0, 0.0, 0.0]);
        close(axis_angle([0.0, 0.6, 0.8, 0.0]), [0.0, 0.6 * PI, 0.8 * PI]);
        // The same rotation with the other sign is the long way round.
        close(axis_angle([-half, 0.0, 0.0, -half]), [-1.5 * PI, 0.0, 0.0]);
        for w in [1.0, -1.0, 1.0000001, -1.0000001] {
            assert_eq!(axis_angle([0.0, 0.0, 0.0, w]), [0.0; 3]);
        }
    }
}
