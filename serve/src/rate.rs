//! How often a client may ask: `--rate HZ`, a bucket that holds the tokens of one second, and at least one. Without a clock:
//! the time is an argument.
//!
//! Each request takes a token, and is refused if there is none; what is refused takes nothing. A bucket is known by the time
//! at which it will be full again.
//!
//! ref: the generic cell rate algorithm, ITU-T I.371

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::recent::Recent;

/// Whose requests are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Who {
    /// Who shows a token that has a name.
    Token(String),
    /// Who names itself.
    Client(String),
    /// All others of a machine.
    Address(IpAddr),
}

/// When a client's bucket is full again.
#[derive(Debug, Default)]
struct Bucket(Option<Instant>);

impl Bucket {
    /// Takes a token of a bucket that gets one each `period` and is filled within `depth`.
    ///
    /// # Errors
    /// How long it takes until there is one.
    fn take(&mut self, now: Instant, period: Duration, depth: Duration) -> Result<(), Duration> {
        let full = self.0.map_or(now, |full| full.max(now));
        let wait = (full + period).saturating_duration_since(now + depth);
        if wait.is_zero() {
            self.0 = Some(full + period);
            Ok(())
        } else {
            Err(wait)
        }
    }
}

/// The buckets of all clients.
pub struct Rate {
    period: Duration,
    depth: Duration,
    buckets: Mutex<Recent<Who, Bucket>>,
}

impl Rate {
    /// So many requests a second.
    pub fn new(hz: f64) -> Self {
        let period = Duration::from_secs_f64(1.0 / hz);
        let depth = period.max(Duration::from_secs(1));
        // A bucket that is full again need not be remembered.
        Self { period, depth, buckets: Mutex::new(Recent::new(depth)) }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// How long to wait, if it is one too many.
    pub fn take(&self, who: Who, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.entry(who, now).take(now, self.period, self.depth)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn client(name: u8) -> Who {
        Who::Client(name.to_string())
    }

    #[test]
    fn a_second_s_worth_may_come_at_once_and_then_one_each_period() {
        let (rate, now) = (Rate::new(5.0), Instant::now());
        let taken = |at: Duration| rate.take(client(0), now + at).is_ok();
        assert_eq!((0..20).filter(|_| taken(Duration::ZERO)).count(), 5);
        let wait = rate.take(client(0), now).unwrap_err();
        assert_eq!(wait, Duration::from_millis(200));
        assert!(!taken(Duration::from_millis(199)) && taken(Duration::from_millis(200)));
        assert!(!taken(Duration::from_millis(200)));
        assert_eq!((0..20).filter(|_| taken(Duration::from_secs(9))).count(), 5, "and no more");
        let slow = Rate::new(0.1);
        assert!(slow.take(client(0), now).is_ok());
        assert_eq!(slow.take(client(0), now).unwrap_err(), Duration::from_secs(10));
        assert!(slow.take(client(1), now).is_ok(), "another's bucket");
    }

    proptest! {
        /// Whatever others send: within any time, a client is given at most what the bucket held and what came into it,
        /// and who keeps to the rate is never refused.
        #[test]
        fn floods_are_bounded_and_cost_others_nothing(
            hz in 1..50_u32,
            steps in prop::collection::vec((0..4_u8, 0..400_u64), 1..200),
        ) {
            let rate = Rate::new(hz.into());
            let (begun, period) = (Instant::now(), Duration::from_secs_f64(1.0 / f64::from(hz)));
            let (mut at, mut due) = (Duration::ZERO, Duration::ZERO);
            let mut taken = vec![Vec::new(); 4];
            for (name, ms) in steps {
                at += Duration::from_millis(ms);
                if rate.take(client(name), begun + at).is_ok() {
                    taken[usize::from(name)].push(at);
                }
                while due <= at {
                    let kept = rate.take(client(9), begun + at);
                    prop_assert!(kept.is_ok(), "who keeps to the rate is served");
                    due = at + period;
                }
            }
            for times in taken {
                for (i, from) in times.iter().enumerate() {
                    for (j, to) in times.iter().enumerate().skip(i) {
                        let most = (*to - *from).as_secs_f64() * f64::from(hz) + f64::from(hz);
                        prop_assert!((j - i + 1) as f64 <= most + 1e-6, "{} within {most}", j - i + 1);
                    }
                }
            }
        }
    }
}
