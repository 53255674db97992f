//! The order of a client's observations: what is older than one that came before is refused.
//!
//! A program that starts again counts from its first number again, and must be served at once, while a late
//! request of the program before it must never move the robot. Which of the two a low `seq` is:
//!
//! 1. By `epoch`, if the client sends one: any number that is higher each time the program starts, such as the
//!    time of its start. A higher epoch begins anew, a lower one is refused.
//! 2. Else by `timestamp`: a lower `seq` of a later picture begins anew.
//! 3. Else by connections: a `seq` that is not above the program's first, on a connection that was opened after
//!    all that the program had used, begins anew; from then on, what comes over earlier connections is of the
//!    program before. This assumes that a program opens connections in the order of its count, and that its first
//!    request is the first of its to arrive. Behind a proxy that shares connections, neither is sure: send an epoch
//!    or timestamps there.

use crate::meta::Meta;

/// What is known of a client's observations.
#[derive(Debug, Default)]
pub struct Order {
    epoch: Option<u64>,
    timestamp: Option<f64>,
    count: Option<Count>,
}

/// The count of one run of the client's program.
#[derive(Debug, Clone, Copy)]
struct Count {
    first: u64,
    last: u64,
    /// Its first connection, and the latest that it used.
    connections: [u64; 2],
}

impl Order {
    /// Whether an observation may follow those before it.
    ///
    /// # Errors
    /// Says what it came after.
    pub fn check(&self, meta: &Meta) -> Result<(), String> {
        self.starts_again(meta).map(drop)
    }

    /// Remembers an observation that was accepted.
    pub fn note(&mut self, meta: &Meta) {
        if self.starts_again(meta) == Ok(true) {
            *self = Self::default();
        }
        self.epoch = meta.epoch.or(self.epoch);
        self.timestamp = meta.timestamp.or(self.timestamp);
        if let Some(seq) = meta.seq {
            let new = Count { first: seq, last: seq, connections: [meta.connection; 2] };
            let count = self.count.get_or_insert(new);
            count.last = seq;
            count.connections[1] = count.connections[1].max(meta.connection);
        }
    }

    /// Whether it is the first observation of a program that started again.
    fn starts_again(&self, meta: &Meta) -> Result<bool, String> {
        match (meta.epoch, self.epoch) {
            (Some(new), Some(old)) if new < old => {
                return Err(format!("epoch {new} came after epoch {old}"));
            }
            (Some(new), old) if Some(new) != old => return Ok(true),
            _ => {}
        }
        let age = meta.timestamp.zip(self.timestamp).map(|(new, old)| old - new);
        if let Some(age) = age.filter(|age| *age > 0.0) {
            return Err(format!("it was made {age:.3} s before one that came earlier"));
        }
        let (Some(seq), Some(Count { first, last, connections: [oldest, newest] })) =
            (meta.seq, self.count)
        else {
            return Ok(false);
        };
        let is_back = seq <= last;
        let is_first = match (meta.epoch, age) {
            (Some(_), _) => false,
            (None, Some(age)) => age < 0.0,
            (None, None) => seq <= first && meta.connection > newest,
        };
        if is_back && is_first {
            Ok(true)
        } else if is_back {
            Err(format!("seq {seq} came after seq {last}"))
        } else if (meta.epoch, age) == (None, None) && meta.connection < oldest {
            Err("it came over a connection of the program that ran before".to_owned())
        } else {
            Ok(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::meta::Client;
    use crate::tokens::Caller;

    fn meta(connection: u64, epoch: Option<u64>, seq: Option<u64>, timestamp: Option<f64>) -> Meta {
        let (client, now) = (Client::Named("arm".into()), Instant::now());
        let (caller, arrived, deadline) = (Caller::default(), now, now);
        Meta { client, caller, connection, epoch, seq, timestamp, arrived, deadline }
    }

    fn takes(order: &mut Order, meta: &Meta) -> bool {
        let taken = order.check(meta).is_ok();
        if taken {
            order.note(meta);
        }
        taken
    }

    #[test]
    fn a_program_that_starts_again_is_served_at_its_first_request() {
        for (epochs, timed) in [(true, false), (false, true), (false, false)] {
            let mut order = Order::default();
            let mut time = 0.0;
            for run in 0..3 {
                let epoch = epochs.then_some(7 + run);
                for seq in 1..100 {
                    time += 0.2;
                    let timestamp = timed.then_some(time);
                    assert!(
                        takes(&mut order, &meta(run, epoch, Some(seq), timestamp)),
                        "{run} {seq}"
                    );
                }
                let late = meta(run, epoch, Some(50), timed.then_some(time - 5.0));
                assert!(!takes(&mut order, &late), "{run}");
            }
        }
    }

    #[test]
    fn the_first_request_of_a_run_is_taken_once_on_a_connection() {
        let mut order = Order::default();
        let [first, second] = [0, 1].map(|seq| meta(4, None, Some(seq), None));
        assert!(takes(&mut order, &first) && takes(&mut order, &second));
        assert!(!takes(&mut order, &first));
        assert!(!takes(&mut order, &meta(3, None, Some(0), None)), "an earlier connection");
        assert!(
            !takes(&mut order, &meta(5, None, Some(1), None)),
            "the count does not start again"
        );
        assert!(takes(&mut order, &meta(5, None, Some(0), None)));
        assert!(!takes(&mut order, &meta(4, None, Some(2), None)), "of the run before");
    }

    /// A request of a run of the program: its number, and its connection.
    #[derive(Debug, Clone, Copy)]
    struct Sent {
        run: usize,
        seq: u64,
        connection: u64,
    }

    proptest! {
        /// Two runs of one client, each with several connections that it opens in the order of its count, and
        /// a network that keeps only the order of each connection.
        #[test]
        fn a_late_request_of_the_run_before_never_moves_the_robot(
            uses in [prop::collection::vec(0..3_usize, 1..12), prop::collection::vec(0..3_usize, 1..12)],
            arrivals in prop::collection::vec(0..6_usize, 0..80),
            early in 0..12_usize,
            marks in 0..3_u8,
        ) {
            let mut connections: Vec<VecDeque<Sent>> = Vec::new();
            let mut first_of_second = 0;
            for (run, uses) in uses.iter().enumerate() {
                let opened = connections.len();
                if run == 1 {
                    first_of_second = opened;
                }
                for (seq, connection) in (1..).zip(uses) {
                    // A connection is opened when it is first used, the next after those that are open.
                    let connection = (opened + connection).min(connections.len());
                    if connection == connections.len() {
                        connections.push(VecDeque::new());
                    }
                    let sent = Sent { run, seq, connection: connection as u64 };
                    connections[connection].push_back(sent);
                }
            }
            // The second run begins when some of the first have arrived, and all others are late.
            let mut arrived = Vec::new();
            for (i, pick) in arrivals.iter().enumerate() {
                let open = if i < early { first_of_second } else { connections.len() };
                arrived.extend(connections[pick % open].pop_front());
            }
            arrived.extend(connections.into_iter().flatten());
            let mut order = Order::default();
            let (mut last, mut is_second) = (0, false);
            for Sent { run, seq, connection } in arrived {
                if marks == 2 && run == 1 && !is_second && seq > 1 {
                    continue; // without marks, the first must come first
                }
                let epoch = (marks == 0).then_some(100 + run as u64);
                let timestamp = (marks == 1).then_some((100 * run) as f64 + seq as f64);
                let taken = takes(&mut order, &meta(connection, epoch, Some(seq), timestamp));
                if run == 0 {
                    prop_assert!(!(taken && is_second), "{seq} of the run before");
                }
                if run == 1 && !is_second {
                    prop_assert!(taken, "{seq} of the new run");
                    (is_second, last) = (true, 0);
                }
                if taken {
                    prop_assert!(seq > last, "{seq} after {last}");
                    last = seq;
                }
            }
        }
    }
}
