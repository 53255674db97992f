//! A bounded queue of observations with deadlines. It has no clock: the time is an argument.
//!
//! - A client has one slot. Its newer observation replaces the older one there, so a fast client neither
//!   waits longer for being fast nor keeps others from their turn.
//! - An observation past its deadline is never handed out.
//! - Several are handed out together only if all of them can be answered in time, so that no deadline is missed for
//!   the company.
//! - An observation is refused if the client sent a newer one before, or if it is older than the
//!   operator allows.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::meta::{Client, Meta};
use crate::order::Order;
use crate::recent::Recent;

/// The queue's rules.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The most observations in the queue.
    pub waiting: usize,
    /// How old an observation's timestamp may be when it arrives.
    pub max_age: Option<Duration>,
    /// For how long a silent client's order is remembered.
    pub memory: Duration,
}

/// Why an observation never got into the queue.
#[derive(Debug, Clone, PartialEq)]
pub enum Refused {
    /// The queue is full.
    Full,
    /// It is older than allowed, by this much.
    Stale(Duration),
    /// The client sent a newer one before.
    OutOfOrder(String),
}

/// Why an observation left the queue without reaching the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// The same client sent a newer one.
    Superseded,
    /// Its deadline passed.
    Late,
}

/// A slot in the queue.
pub type Ticket = u64;

/// Items that left the queue without reaching the model, and why.
pub type Evicted<T> = Vec<(T, Dropped)>;

/// The queue.
#[derive(Debug)]
pub struct Queue<T> {
    limits: Limits,
    waiting: VecDeque<Waiting<T>>,
    seen: Recent<Client, Order>,
    tickets: Ticket,
}

#[derive(Debug)]
struct Waiting<T> {
    ticket: Ticket,
    meta: Meta,
    item: T,
}

impl<T> Queue<T> {
    /// An empty queue.
    pub fn new(limits: Limits) -> Self {
        let seen = Recent::new(limits.memory);
        Self { limits, waiting: VecDeque::new(), seen, tickets: 0 }
    }

    /// The number of waiting observations.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no observation waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Enqueues. `now` and `unix`, in seconds since 1970, are the same moment.
    ///
    /// # Errors
    /// [`Refused`]; the queue is then as before.
    pub fn push(
        &mut self,
        meta: Meta,
        item: T,
        now: Instant,
        unix: f64,
    ) -> Result<(Ticket, Evicted<T>), Refused> {
        if let (Some(max), Some(timestamp)) = (self.limits.max_age, meta.timestamp) {
            let age = Duration::try_from_secs_f64(unix - timestamp).unwrap_or_default();
            if age > max {
                return Err(Refused::Stale(age - max));
            }
        }
        if let Some(seen) = self.seen.get(&meta.client, now) {
            seen.check(&meta).map_err(Refused::OutOfOrder)?;
        }
        let same = |waiting: &Waiting<T>| waiting.meta.client == meta.client;
        let index = self.waiting.iter().position(same);
        let in_time = self.waiting.iter().filter(|waiting| waiting.meta.deadline > now).count();
        if index.is_none() && in_time >= self.limits.waiting {
            return Err(Refused::Full);
        }
        self.seen.entry(meta.client.clone(), now).note(&meta);
        self.tickets += 1;
        let ticket = self.tickets;
        let new = Waiting { ticket, meta, item };
        let mut left = Vec::new();
        match index {
            Some(index) => {
                let old = std::mem::replace(&mut self.waiting[index], new);
                left.push((old.item, Dropped::Superseded));
            }
            None => self.waiting.push_back(new),
        }
        left.extend(self.take_late(now));
        Ok((ticket, left))
    }

    /// Dequeues the next observations in their order, and all that are past their deadlines: one if there is one, and as
    /// many more, up to `most`, as leave all of them in time. `takes` says how long it takes to serve so many together.
    pub fn pop(
        &mut self,
        now: Instant,
        most: usize,
        takes: impl Fn(usize) -> Duration,
    ) -> (Vec<(Meta, T)>, Evicted<T>) {
        let late = self.take_late(now);
        let deadlines = self.waiting.iter().take(most).map(|waiting| waiting.meta.deadline);
        let soonest = deadlines.scan(None, |soonest: &mut Option<Instant>, deadline| {
            *soonest = Some(soonest.map_or(deadline, |before| before.min(deadline)));
            *soonest
        });
        let bears = |(i, soonest): &(usize, Instant)| *i == 0 || now + takes(i + 1) < *soonest;
        let n = soonest.enumerate().take_while(bears).count();
        (self.waiting.drain(..n).map(|waiting| (waiting.meta, waiting.item)).collect(), late)
    }

    /// Removes an observation, if it is still in the queue.
    pub fn cancel(&mut self, ticket: Ticket) -> Option<T> {
        let index = self.waiting.iter().position(|waiting| waiting.ticket == ticket)?;
        self.waiting.remove(index).map(|waiting| waiting.item)
    }

    fn take_late(&mut self, now: Instant) -> Evicted<T> {
        let mut late = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            if waiting.meta.deadline > now {
                self.waiting.push_back(waiting)
            } else {
                late.push((waiting.item, Dropped::Late))
            }
        }
        late
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::Caller;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn queue(waiting: usize) -> Queue<&'static str> {
        let max_age = Some(Duration::from_millis(200));
        Queue::new(Limits { waiting, max_age, memory: 60 * SECOND })
    }

    fn meta(client: &str, now: Instant) -> Meta {
        let client = Client::Named(client.into());
        let (caller, arrived, deadline) = (Caller::default(), now, now + SECOND);
        let (epoch, seq, timestamp) = (None, None, None);
        Meta { client, caller, connection: 0, epoch, seq, timestamp, arrived, deadline }
    }

    fn next(queue: &mut Queue<&'static str>, now: Instant) -> Option<&'static str> {
        queue.pop(now, 1, |_| SECOND).0.pop().map(|(_, item)| item)
    }

    #[test]
    fn the_newest_of_a_client_wins_and_keeps_the_place() {
        let (mut queue, now) = (queue(8), Instant::now());
        queue.push(meta("a", now), "a1", now, 0.0).unwrap();
        queue.push(meta("b", now), "b1", now, 0.0).unwrap();
        let (_, left) = queue.push(meta("a", now), "a2", now, 0.0).unwrap();
        assert_eq!(left, [("a1", Dropped::Superseded)]);
        assert_eq!([next(&mut queue, now), next(&mut queue, now)], [Some("a2"), Some("b1")]);
        assert_eq!(next(&mut queue, now), None);
    }

    #[test]
    fn a_client_that_floods_gets_every_other_turn() {
        let (mut queue, now) = (queue(8), Instant::now());
        let mut turns = Vec::new();
        queue.push(meta("slow", now), "slow", now, 0.0).unwrap();
        for _ in 0..6 {
            for _ in 0..100 {
                queue.push(meta("fast", now), "fast", now, 0.0).unwrap();
            }
            let turn = next(&mut queue, now).unwrap();
            if turn == "slow" {
                queue.push(meta("slow", now), "slow", now, 0.0).unwrap();
            }
            turns.push(turn);
        }
        assert_eq!(turns, ["slow", "fast", "slow", "fast", "slow", "fast"]);
    }

    #[test]
    fn late_work_is_handed_back_and_makes_room() {
        let (mut queue, now) = (queue(1), Instant::now());
        queue.push(meta("a", now), "a", now, 0.0).unwrap();
        assert_eq!(queue.push(meta("b", now), "b", now, 0.0).unwrap_err(), Refused::Full);
        let later = now + SECOND;
        let (_, left) = queue.push(meta("b", later), "b", later, 0.0).unwrap();
        assert_eq!(left, [("a", Dropped::Late)]);
        let (next, left) = queue.pop(later + SECOND, 1, |_| SECOND);
        assert!(next.is_empty());
        assert_eq!(left, [("b", Dropped::Late)], "its deadline is over at the very moment");
    }

    #[test]
    fn a_full_queue_still_takes_news_of_those_in_it() {
        let (mut queue, now) = (queue(2), Instant::now());
        for client in ["a", "b"] {
            queue.push(meta(client, now), "old", now, 0.0).unwrap();
        }
        assert_eq!(queue.push(meta("c", now), "c", now, 0.0).unwrap_err(), Refused::Full);
        assert!(queue.push(meta("b", now), "new", now, 0.0).is_ok());
        assert_eq!(queue.len(), 2);
    }

    #[test]
    fn a_seq_or_a_timestamp_never_goes_back() {
        let (mut queue, now) = (queue(8), Instant::now());
        let at = |seq, timestamp| Meta { seq, timestamp, ..meta("a", now) };
        queue.push(at(Some(5), Some(100.0)), "5", now, 100.0).unwrap();
        for (seq, timestamp) in [(Some(5), None), (Some(4), Some(100.0)), (Some(6), Some(99.9))] {
            let refused = queue.push(at(seq, timestamp), "old", now, 100.0).unwrap_err();
            assert!(matches!(refused, Refused::OutOfOrder(_)), "{seq:?} {timestamp:?}");
        }
        queue.push(at(None, None), "none given", now, 100.0).unwrap();
        assert!(queue.push(at(Some(5), None), "5", now, 100.0).is_err(), "still known");
        queue.push(at(Some(6), Some(100.0)), "6", now, 100.0).unwrap();
        let b = Meta { seq: Some(1), ..meta("b", now) };
        queue.push(b, "another client counts for itself", now, 100.0).unwrap();
        let later = now + 61 * SECOND;
        queue.push(at(Some(0), None), "forgotten", later, 100.0).unwrap();
    }

    #[test]
    fn what_is_stale_when_it_comes_is_refused() {
        let (mut queue, now) = (queue(8), Instant::now());
        let at = |timestamp| Meta { timestamp: Some(timestamp), ..meta("a", now) };
        let refused = queue.push(at(99.0), "old", now, 100.0).unwrap_err();
        assert_eq!(refused, Refused::Stale(Duration::from_millis(800)));
        queue.push(at(99.9), "young", now, 100.0).unwrap();
        queue.push(at(1e300), "a clock that is ahead is not ours to judge", now, 100.0).unwrap();
    }

    #[test]
    fn who_leaves_is_not_served() {
        let (mut queue, now) = (queue(8), Instant::now());
        let (ticket, _) = queue.push(meta("a", now), "a", now, 0.0).unwrap();
        assert_eq!(queue.cancel(ticket), Some("a"));
        assert_eq!(queue.cancel(ticket), None);
        assert!(next(&mut queue, now).is_none());
    }

    proptest! {
        /// Whatever comes: each item leaves exactly once, never late, in the order of its client's
        /// place, and no more wait than may.
        #[test]
        fn nothing_is_lost_and_nothing_is_late(
            steps in prop::collection::vec((0..6_u8, 0..3_u32, 1..5_u32), 1..80),
            most in 1..4_usize,
        ) {
            let mut queue: Queue<usize> =
                Queue::new(Limits { waiting: 3, max_age: None, memory: 60 * SECOND });
            let mut now = Instant::now();
            let (mut pushed, mut out, mut deadlines) = (0, Vec::new(), Vec::new());
            for (client, wait, life) in steps {
                now += wait * SECOND;
                if client == 5 {
                    let (next, left) = queue.pop(now, most, |n| n as u32 * SECOND);
                    prop_assert!(next.len() <= most);
                    for (item, why) in left {
                        prop_assert!(why == Dropped::Late && deadlines[item] <= now);
                        out.push(item);
                    }
                    for (meta, item) in next {
                        prop_assert!(meta.deadline > now);
                        out.push(item);
                    }
                } else {
                    let deadline = now + life * SECOND;
                    let meta = Meta { deadline, ..meta(&client.to_string(), now) };
                    if let Ok((_, left)) = queue.push(meta, pushed, now, 0.0) {
                        deadlines.push(deadline);
                        pushed += 1;
                        out.extend(left.into_iter().map(|(item, _)| item));
                    }
                }
                prop_assert!(queue.len() <= 3);
            }
            now += 60 * SECOND;
            out.extend(queue.pop(now, most, |_| SECOND).1.into_iter().map(|(item, _)| item));
            out.sort();
            prop_assert_eq!(out, (0..pushed).collect::<Vec<_>>());
        }

        /// Those who wait, served together as far as the rule lets them: who would be in time if all before it were served
        /// one after another is in time together, as long as company costs no more than a turn. A server that serves one
        /// at a time may do better by one of them: it drops those who are late by then, whom company would have served.
        #[test]
        fn nobody_is_late_for_the_company(
            lives in prop::collection::vec(1..40_u32, 1..10),
            most in 1..9_usize,
            step in 1..6_u32,
            further in 0..6_u32,
        ) {
            let further = further.min(step);
            let takes = |n: usize| (step + (n as u32 - 1) * further) * SECOND;
            let begun = Instant::now();
            let mut queue: Queue<usize> =
                Queue::new(Limits { waiting: 10, max_age: None, memory: 60 * SECOND });
            for (i, life) in lives.iter().enumerate() {
                let meta = Meta { deadline: begun + *life * SECOND, ..meta(&i.to_string(), begun) };
                queue.push(meta, i, begun, 0.0).unwrap();
            }
            let (mut now, mut together, mut all) = (begun, Vec::new(), 0);
            loop {
                let (batch, late) = queue.pop(now, most, takes);
                all += batch.len() + late.len();
                if batch.is_empty() {
                    break;
                }
                now += takes(batch.len());
                for (meta, item) in &batch {
                    prop_assert!(batch.len() == 1 || now < meta.deadline, "each bears the company");
                    together.extend((now < meta.deadline).then_some(*item));
                }
            }
            prop_assert_eq!(all, lives.len());
            prop_assert!(together.is_sorted());
            for (i, life) in lives.iter().enumerate() {
                let is_in_time = (i as u32 + 1) * step < *life;
                prop_assert!(!is_in_time || together.contains(&i), "{i} is not in {together:?}");
            }
        }
    }
}
