//! Turns at decoding: whose body is decoded next. `Line` is pure; the clock is an argument.
//!
//! - A client has one turn at a time, however many bodies it sends.
//! - Clients share the cores evenly by what their pictures cost, not by how many they send: a small
//!   picture does not wait for all the large ones that came before it.
//! - What is refused counts against a client's share the more, the more of its pictures were
//!   refused before. Where nobody else waits, that costs it nothing.
//!
//! This is weighted fair queueing. A client's work would be finished at a time of a clock that runs
//! slower the more clients there are; whoever would be finished first is next.
//!
//! ref: Demers, Keshav, Shenker 1989, "Analysis and simulation of a fair queueing algorithm"

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::queue::{Client, Ticket};
use crate::recent::Recent;

/// The most refusals that count against a client.
const MAX_REFUSED: u64 = 63;

/// Who waits for a turn, and whose turn it is. `T` is whatever tells a waiting one of it.
#[derive(Debug)]
struct Line<T> {
    /// Turns at a time.
    places: usize,
    /// How much work each client that has some has been given since the start.
    clock: u64,
    waiting: Vec<Waiting<T>>,
    busy: Vec<(Ticket, Client)>,
    /// When on the clock a client's work would be finished.
    finish: Recent<Client, u64>,
    /// How many of a client's pictures were refused. Forgotten a while after the last one.
    refused: Recent<Client, u64>,
    tickets: Ticket,
}

#[derive(Debug)]
struct Waiting<T> {
    ticket: Ticket,
    client: Client,
    cost: u64,
    finish: u64,
    item: T,
}

impl<T> Line<T> {
    fn new(places: usize, memory: Duration) -> Self {
        Self {
            places,
            clock: 0,
            waiting: Vec::new(),
            busy: Vec::new(),
            finish: Recent::new(memory),
            refused: Recent::new(memory),
            tickets: 0,
        }
    }

    /// Lines up.
    fn push(&mut self, client: Client, cost: u64, item: T, now: Instant) -> Ticket {
        let refused = self.refused.get(&client, now).map_or(0, |n| *n.min(&MAX_REFUSED));
        let last = self.finish.entry(client.clone(), now);
        *last = self.clock.max(*last) + cost * (1 + refused);
        let finish = *last;
        self.tickets += 1;
        self.waiting.push(Waiting { ticket: self.tickets, client, cost, finish, item });
        self.tickets
    }

    /// Gives the next one its turn, if there is a place.
    fn pop(&mut self) -> Option<T> {
        if self.busy.len() >= self.places {
            return None;
        }
        let is_idle = |waiting: &Waiting<T>| self.busy.iter().all(|(_, c)| *c != waiting.client);
        let idle = self.waiting.iter().enumerate().filter(|(_, waiting)| is_idle(waiting));
        let (next, _) = idle.min_by_key(|(_, waiting)| (waiting.finish, waiting.ticket))?;
        let waiting = self.waiting.iter().map(|waiting| &waiting.client);
        let active: HashSet<&Client> = waiting.chain(self.busy.iter().map(|(_, c)| c)).collect();
        let n = active.len() as u64;
        let Waiting { ticket, client, cost, item, .. } = self.waiting.remove(next);
        self.clock += cost / n;
        self.busy.push((ticket, client));
        Some(item)
    }

    /// Ends a turn, or leaves the line.
    fn leave(&mut self, ticket: Ticket) {
        self.waiting.retain(|waiting| waiting.ticket != ticket);
        self.busy.retain(|(busy, _)| *busy != ticket);
    }

    /// Notes that a client's picture was refused.
    fn refuse(&mut self, client: &Client, now: Instant) {
        *self.refused.entry(client.clone(), now) += 1;
    }
}

/// The turns of all clients. Clones are the same.
#[derive(Clone)]
pub struct Turns(Arc<Mutex<Line<oneshot::Sender<()>>>>);

/// A client's turn, or its place in the line; over when dropped.
pub struct Turn {
    turns: Turns,
    ticket: Ticket,
}

impl Turns {
    /// So many turns at a time. Silent clients are remembered for `memory`.
    pub fn new(places: usize, memory: Duration) -> Self {
        Self(Arc::new(Mutex::new(Line::new(places, memory))))
    }

    /// Waits for a client's turn at work of this cost, of which only proportions count.
    pub async fn turn(&self, client: &Client, cost: u64) -> Turn {
        let (go, gone) = oneshot::channel();
        let push = |line: &mut Line<_>| line.push(client.clone(), cost, go, Instant::now());
        let turn = Turn { turns: self.clone(), ticket: self.with(push) };
        let _ = gone.await; // it comes, since `turn` is in the line
        turn
    }

    /// Notes that a client's picture was refused.
    pub fn refuse(&self, client: &Client) {
        self.with(|line| line.refuse(client, Instant::now()));
    }

    /// Changes the line, and gives turns to those who can have one after it.
    fn with<R>(&self, change: impl FnOnce(&mut Line<oneshot::Sender<()>>) -> R) -> R {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut line);
        while let Some(go) = line.pop() {
            let _ = go.send(()); // who does not wait any more is about to leave
        }
        changed
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.with(|line| line.leave(self.ticket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn client(name: &str) -> Client {
        Client::Named(name.into())
    }

    fn line(places: usize) -> (Line<&'static str>, Instant) {
        (Line::new(places, Duration::from_secs(60)), Instant::now())
    }

    /// All who wait, each after the turn before it ended.
    fn order(line: &mut Line<&'static str>) -> Vec<&'static str> {
        let end = |line: &mut Line<_>| line.busy.clear();
        end(line);
        std::iter::from_fn(|| line.pop().inspect(|_| end(line))).collect()
    }

    #[test]
    fn a_client_has_one_turn_at_a_time() {
        let (mut line, now) = line(4);
        let first = line.push(client("a"), 1, "a1", now);
        line.push(client("a"), 1, "a2", now);
        line.push(client("b"), 9, "b1", now);
        assert_eq!([line.pop(), line.pop(), line.pop()], [Some("a1"), Some("b1"), None]);
        line.leave(first);
        assert_eq!(line.pop(), Some("a2"));
    }

    #[test]
    fn a_small_picture_goes_before_the_large_ones_of_many() {
        let (mut line, now) = line(2);
        for name in ["a", "b", "c", "d", "e", "f"] {
            line.push(client(name), 100_000, "large", now);
            line.pop();
        }
        line.push(client("good"), 10, "small", now);
        assert_eq!(order(&mut line)[0], "small");
    }

    #[test]
    fn a_client_that_floods_delays_itself() {
        let (mut line, now) = line(1);
        for _ in 0..3 {
            line.push(client("flood"), 100, "flood", now);
        }
        line.push(client("good"), 100, "good", now);
        assert_eq!(order(&mut line), ["flood", "good", "flood", "flood"]);
    }

    #[test]
    fn a_large_picture_is_not_passed_over_for_ever() {
        let (mut line, now) = line(1);
        line.push(client("large"), 1000, "large", now);
        let mut small = 0;
        loop {
            line.push(client("small"), 100, "small", now);
            line.busy.clear();
            match line.pop() {
                Some("small") => small += 1,
                _ => break,
            }
        }
        assert!((1..=20).contains(&small), "{small} went before it");
    }

    #[test]
    fn who_was_refused_again_and_again_is_later_until_that_is_forgotten() {
        let (mut line, now) = line(1);
        for _ in 0..5 {
            line.refuse(&client("hostile"), now);
        }
        line.push(client("hostile"), 100, "hostile", now);
        line.push(client("good"), 300, "good", now);
        assert_eq!(order(&mut line), ["good", "hostile"]);
        let later = now + Duration::from_secs(61);
        line.push(client("hostile"), 100, "hostile", later);
        line.push(client("good"), 300, "good", later);
        assert_eq!(order(&mut line), ["hostile", "good"]);
    }

    #[test]
    fn who_leaves_has_no_turn() {
        let (mut line, now) = line(1);
        let ticket = line.push(client("a"), 1, "a", now);
        line.leave(ticket);
        assert_eq!(line.pop(), None);
    }

    proptest! {
        /// Whatever comes: everyone has a turn, each client one at a time, and no more than may.
        #[test]
        fn everyone_has_a_turn(pushes in prop::collection::vec((0..4_u8, 0..1000_u64), 1..60)) {
            let (mut line, now) = line(2);
            let mut turns = 0;
            for (name, cost) in &pushes {
                line.push(client(&name.to_string()), *cost, "", now);
                turns += usize::from(line.pop().is_some());
                let clients: HashSet<_> = line.busy.iter().map(|(_, c)| c.clone()).collect();
                prop_assert!(line.busy.len() <= 2 && clients.len() == line.busy.len());
                if cost % 3 == 0 {
                    line.busy.pop();
                }
            }
            turns += order(&mut line).len();
            prop_assert_eq!(turns, pushes.len());
        }
    }
}
