//! Fair queueing of decoding: whose body or image is decoded next. `FairQueue` has no clock: the time is
//! an argument.
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

use crate::meta::Client;
use crate::queue::Ticket;
use crate::recent::Recent;

/// The most refusals that count against a client.
const MAX_REFUSED: u64 = 63;

/// The waiting and the running turns. `T` notifies a waiting client of its turn.
#[derive(Debug)]
struct FairQueue<T> {
    /// Turns at a time.
    slots: usize,
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

impl<T> FairQueue<T> {
    fn new(slots: usize, memory: Duration) -> Self {
        Self {
            slots,
            clock: 0,
            waiting: Vec::new(),
            busy: Vec::new(),
            finish: Recent::new(memory),
            refused: Recent::new(memory),
            tickets: 0,
        }
    }

    /// Enqueues.
    fn push(&mut self, client: Client, cost: u64, item: T, now: Instant) -> Ticket {
        let refused = self.refused.get(&client, now).map_or(0, |n| *n.min(&MAX_REFUSED));
        let last = self.finish.entry(client.clone(), now);
        *last = self.clock.max(*last) + cost * (1 + refused);
        let finish = *last;
        self.tickets += 1;
        self.waiting.push(Waiting { ticket: self.tickets, client, cost, finish, item });
        self.tickets
    }

    /// Starts the next one, if a turn is free.
    fn pop(&mut self) -> Option<T> {
        if self.busy.len() >= self.slots {
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

    /// Ends a turn, or leaves the queue.
    fn leave(&mut self, ticket: Ticket) {
        self.waiting.retain(|waiting| waiting.ticket != ticket);
        self.busy.retain(|(busy, _)| *busy != ticket);
    }

    /// Notes that a client's picture was refused.
    fn refuse(&mut self, client: &Client, now: Instant) {
        *self.refused.entry(client.clone(), now) += 1;
    }
}

/// The turns of all clients. Clones share them.
#[derive(Clone)]
pub struct Turns(Arc<Mutex<FairQueue<oneshot::Sender<()>>>>);

/// A client's turn, or its place in the queue; over when dropped.
pub struct Turn {
    turns: Turns,
    ticket: Ticket,
}

impl Turns {
    /// So many turns at a time. Silent clients are remembered for `memory`.
    pub fn new(slots: usize, memory: Duration) -> Self {
        Self(Arc::new(Mutex::new(FairQueue::new(slots, memory))))
    }

    /// Waits for a client's turn at work of this cost, of which only proportions count.
    pub async fn turn(&self, client: &Client, cost: u64) -> Turn {
        let (go, gone) = oneshot::channel();
        let push = |queue: &mut FairQueue<_>| queue.push(client.clone(), cost, go, Instant::now());
        let turn = Turn { turns: self.clone(), ticket: self.with(push) };
        let _ = gone.await; // it comes, since `turn` is in the queue
        turn
    }

    /// Notes that a client's picture was refused.
    pub fn refuse(&self, client: &Client) {
        self.with(|queue| queue.refuse(client, Instant::now()));
    }

    /// Changes the queue, and gives turns to those who can have one after it.
    fn with<R>(&self, change: impl FnOnce(&mut FairQueue<oneshot::Sender<()>>) -> R) -> R {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut queue);
        while let Some(go) = queue.pop() {
            let _ = go.send(()); // who does not wait any more is about to leave
        }
        changed
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.with(|queue| queue.leave(self.ticket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn client(name: &str) -> Client {
        Client::Named(name.into())
    }

    fn queue(slots: usize) -> (FairQueue<&'static str>, Instant) {
        (FairQueue::new(slots, Duration::from_secs(60)), Instant::now())
    }

    /// All who wait, each after the turn before it ended.
    fn order(queue: &mut FairQueue<&'static str>) -> Vec<&'static str> {
        let end = |queue: &mut FairQueue<_>| queue.busy.clear();
        end(queue);
        std::iter::from_fn(|| queue.pop().inspect(|_| end(queue))).collect()
    }

    #[test]
    fn a_client_has_one_turn_at_a_time() {
        let (mut queue, now) = queue(4);
        let first = queue.push(client("a"), 1, "a1", now);
        queue.push(client("a"), 1, "a2", now);
        queue.push(client("b"), 9, "b1", now);
        assert_eq!([queue.pop(), queue.pop(), queue.pop()], [Some("a1"), Some("b1"), None]);
        queue.leave(first);
        assert_eq!(queue.pop(), Some("a2"));
    }

    #[test]
    fn a_small_picture_goes_before_the_large_ones_of_many() {
        let (mut queue, now) = queue(2);
        for name in ["a", "b", "c", "d", "e", "f"] {
            queue.push(client(name), 100_000, "large", now);
            queue.pop();
        }
        queue.push(client("good"), 10, "small", now);
        assert_eq!(order(&mut queue)[0], "small");
    }

    #[test]
    fn a_client_that_floods_delays_itself() {
        let (mut queue, now) = queue(1);
        for _ in 0..3 {
            queue.push(client("flood"), 100, "flood", now);
        }
        queue.push(client("good"), 100, "good", now);
        assert_eq!(order(&mut queue), ["flood", "good", "flood", "flood"]);
    }

    #[test]
    fn a_large_picture_is_not_passed_over_for_ever() {
        let (mut queue, now) = queue(1);
        queue.push(client("large"), 1000, "large", now);
        let mut small = 0;
        loop {
            queue.push(client("small"), 100, "small", now);
            queue.busy.clear();
            match queue.pop() {
                Some("small") => small += 1,
                _ => break,
            }
        }
        assert!((1..=20).contains(&small), "{small} went before it");
    }

    #[test]
    fn who_was_refused_again_and_again_is_later_until_that_is_forgotten() {
        let (mut queue, now) = queue(1);
        for _ in 0..5 {
            queue.refuse(&client("hostile"), now);
        }
        queue.push(client("hostile"), 100, "hostile", now);
        queue.push(client("good"), 300, "good", now);
        assert_eq!(order(&mut queue), ["good", "hostile"]);
        let later = now + Duration::from_secs(61);
        queue.push(client("hostile"), 100, "hostile", later);
        queue.push(client("good"), 300, "good", later);
        assert_eq!(order(&mut queue), ["hostile", "good"]);
    }

    #[test]
    fn who_leaves_has_no_turn() {
        let (mut queue, now) = queue(1);
        let ticket = queue.push(client("a"), 1, "a", now);
        queue.leave(ticket);
        assert_eq!(queue.pop(), None);
    }

    proptest! {
        /// Whatever comes: everyone has a turn, each client one at a time, and no more than may.
        #[test]
        fn everyone_has_a_turn(pushes in prop::collection::vec((0..4_u8, 0..1000_u64), 1..60)) {
            let (mut queue, now) = queue(2);
            let mut turns = 0;
            for (name, cost) in &pushes {
                queue.push(client(&name.to_string()), *cost, "", now);
                turns += usize::from(queue.pop().is_some());
                let clients: HashSet<_> = queue.busy.iter().map(|(_, c)| c.clone()).collect();
                prop_assert!(queue.busy.len() <= 2 && clients.len() == queue.busy.len());
                if cost % 3 == 0 {
                    queue.busy.pop();
                }
            }
            turns += order(&mut queue).len();
            prop_assert_eq!(turns, pushes.len());
        }
    }
}
