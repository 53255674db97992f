//! How long steps take, of one robot and of several together, as far as those before tell.

use std::time::Duration;

/// An estimate that rises with a step that took longer at once, and falls slowly, so that a deadline it is held against is
/// rather kept.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    /// A step of one robot.
    alone: Duration,
    /// What each further robot adds; as much as the first, until it was measured.
    further: Option<Duration>,
}

impl Pace {
    /// How long a step of `n` robots takes.
    pub fn takes(&self, n: usize) -> Duration {
        let further = self.further.unwrap_or(self.alone);
        self.alone + further * u32::try_from(n.saturating_sub(1)).unwrap_or(u32::MAX)
    }

    /// Takes note of a step of `n` robots.
    pub fn note(&mut self, n: usize, took: Duration) {
        match u32::try_from(n) {
            Ok(n @ 2..) => {
                let further = took.saturating_sub(self.alone) / (n - 1);
                self.further = Some(self.further.map_or(further, |old| follow(old, further)));
            }
            _ => self.alone = follow(self.alone, took),
        }
    }
}

fn follow(old: Duration, new: Duration) -> Duration {
    new.max(old.saturating_sub(old.saturating_sub(new) / 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn it_rises_at_once_and_falls_slowly() {
        let mut pace = Pace::default();
        assert_eq!(pace.takes(1), Duration::ZERO);
        pace.note(1, 8 * SECOND);
        assert_eq!([1, 2, 4].map(|n| pace.takes(n)), [8 * SECOND, 16 * SECOND, 32 * SECOND]);
        pace.note(1, SECOND / 1000);
        assert!((7 * SECOND..8 * SECOND).contains(&pace.takes(1)));
        pace.note(1, 9 * SECOND);
        assert_eq!(pace.takes(1), 9 * SECOND);
    }

    #[test]
    fn company_is_measured_apart() {
        let mut pace = Pace::default();
        pace.note(1, 10 * SECOND);
        pace.note(3, 26 * SECOND);
        assert_eq!([1, 2, 3].map(|n| pace.takes(n)), [10 * SECOND, 18 * SECOND, 26 * SECOND]);
        pace.note(2, SECOND); // less than one alone
        assert_eq!(pace.takes(2), 17 * SECOND);
        pace.note(2, 22 * SECOND);
        assert_eq!(pace.takes(2), 22 * SECOND);
    }
}
