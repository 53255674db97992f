//! Checks of every motion before it is sent: finite, within bounds, and not too far from the last one.

use serde::Serialize;

use crate::error::{Code, Error};

/// The operator's limits of every motion. It must be finite in any case.
#[derive(Debug, Clone, Default)]
pub struct Safety {
    /// Whether to clamp each dimension to the data set's range.
    pub clamp: bool,
    /// The largest difference of each dimension to the client's last motion, in the data set's units. A
    /// single number applies to every dimension.
    pub max_delta: Option<Vec<f64>>,
}

/// What the checks changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Dimensions that were clamped to the range, in any action.
    pub clamped: Vec<usize>,
    /// Dimensions that were moved toward the action before, in any action.
    pub limited: Vec<usize>,
}

impl Safety {
    /// Checks and limits actions that are executed one after another: each is held near the one before it, the first
    /// near the client's last.
    ///
    /// # Errors
    /// As [`Safety::check`].
    pub fn check_all(
        &self,
        actions: &mut [Vec<f64>],
        ranges: &[[f64; 2]],
        last: Option<&[f64]>,
    ) -> Result<Report, Error> {
        let (mut report, mut last) = (Report::default(), last);
        for action in actions {
            let of_action = self.check(action, ranges, last)?;
            report.clamped.extend(of_action.clamped);
            report.limited.extend(of_action.limited);
            last = Some(action);
        }
        for dimensions in [&mut report.clamped, &mut report.limited] {
            dimensions.sort();
            dimensions.dedup();
        }
        Ok(report)
    }

    /// Checks and limits a motion. `last` is the client's previous motion, if that is known and in the same
    /// units.
    ///
    /// # Errors
    /// [`Code::NotFinite`] if a number is not finite; [`Code::BadRequest`] if
    /// `max_delta` is for motions of another length.
    pub fn check(
        &self,
        motion: &mut [f64],
        ranges: &[[f64; 2]],
        last: Option<&[f64]>,
    ) -> Result<Report, Error> {
        if let Some(i) = motion.iter().position(|x| !x.is_finite()) {
            let message =
                format!("dimension {i} of the motion is {}, which is not a number", motion[i]);
            return Err(Error::new(Code::NotFinite, message));
        }
        let clamped =
            if self.clamp { confine(motion, |i| ranges.get(i).copied()) } else { Vec::new() };
        let limited = match (&self.max_delta, last) {
            (Some(most), Some(last)) if last.len() == motion.len() => {
                if most.len() != 1 && most.len() != motion.len() {
                    let (wanted, found) = (motion.len(), most.len());
                    let message = format!("--max-delta has {found} numbers, this motion {wanted}");
                    return Err(Error::bad_request(message));
                }
                let most = |i: usize| *most.get(i).unwrap_or(&most[0]);
                confine(motion, |i| Some([last[i] - most(i), last[i] + most(i)]))
            }
            _ => Vec::new(),
        };
        Ok(Report { clamped, limited })
    }
}

/// Clamps each number to its range. Returns the indices of those that were outside.
fn confine(motion: &mut [f64], range: impl Fn(usize) -> Option<[f64; 2]>) -> Vec<usize> {
    let mut outside = Vec::new();
    for (i, x) in motion.iter_mut().enumerate() {
        let Some([low, high]) = range(i) else { continue };
        let inside = x.max(low.min(high)).min(high.max(low));
        if inside != *x {
            *x = inside;
            outside.push(i);
        }
    }
    outside
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES: [[f64; 2]; 3] = [[-1.0, 1.0], [0.0, 0.5], [-1.0, 1.0]];

    #[test]
    fn what_is_no_number_is_refused_by_name() {
        for wrong in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = Safety::default().check(&mut [0.0, wrong], &RANGES, None).unwrap_err();
            assert_eq!(error.code, Code::NotFinite);
            assert!(error.message.contains("dimension 1"), "{error}");
        }
    }

    #[test]
    fn nothing_is_done_unless_asked_for() {
        let mut motion = [9.0, -9.0, 0.0];
        let report = Safety::default().check(&mut motion, &RANGES, Some(&[0.0; 3])).unwrap();
        assert_eq!((motion, report), ([9.0, -9.0, 0.0], Report::default()));
    }

    #[test]
    fn clamping_reports_what_it_moved() {
        let (mut motion, safety) = ([0.5, 0.7, -3.0], Safety { clamp: true, max_delta: None });
        let report = safety.check(&mut motion, &RANGES, None).unwrap();
        assert_eq!(motion, [0.5, 0.5, -1.0]);
        assert_eq!(report, Report { clamped: vec![1, 2], limited: vec![] });
    }

    #[test]
    fn each_action_of_a_chunk_is_held_near_the_one_before() {
        let safety = Safety { clamp: true, max_delta: Some(vec![0.25]) };
        let mut chunk = [vec![1.0, 0.1, 0.0], vec![1.0, 0.1, 0.5], vec![1.0, 0.9, 0.5]];
        let report = safety.check_all(&mut chunk, &RANGES, Some(&[0.0; 3])).unwrap();
        assert_eq!(chunk, [vec![0.25, 0.1, 0.0], vec![0.5, 0.1, 0.25], vec![0.75, 0.35, 0.5]]);
        assert_eq!(report, Report { clamped: vec![1], limited: vec![0, 1, 2] });
        let mut chunk = [vec![0.5; 3], vec![1.0; 3]];
        safety.check_all(&mut chunk, &RANGES, None).unwrap();
        assert_eq!(
            chunk[1],
            [0.75, 0.5, 0.75],
            "without a last motion, from the first of the chunk"
        );
        let wrong = safety.check_all(&mut [vec![0.0; 3], vec![f64::NAN; 3]], &RANGES, None);
        assert_eq!(wrong.unwrap_err().code, Code::NotFinite);
    }

    #[test]
    fn a_motion_is_held_near_the_one_before() {
        let safety = |max_delta: &[f64]| Safety { clamp: true, max_delta: Some(max_delta.into()) };
        let mut motion = [1.0, 0.1, -5.0];
        let last = [0.0, 0.0, -0.9];
        let report = safety(&[0.25]).check(&mut motion, &RANGES, Some(&last)).unwrap();
        assert_eq!(motion, [0.25, 0.1, -1.0], "clamped first, then within reach of the last");
        assert_eq!(report, Report { clamped: vec![2], limited: vec![0] });

        let mut motion = [1.0, 0.1, 1.0];
        let each = [0.5, 0.5, f64::INFINITY];
        let report = safety(&each).check(&mut motion, &RANGES, Some(&last)).unwrap();
        assert_eq!((motion, report.limited), ([0.5, 0.1, 1.0], vec![0]));

        let mut motion = [1.0, 0.1, 1.0];
        assert!(safety(&[0.1]).check(&mut motion, &RANGES, None).unwrap().limited.is_empty());
        assert!(safety(&[0.1, 0.1]).check(&mut motion, &RANGES, Some(&last)).is_err());
    }
}
