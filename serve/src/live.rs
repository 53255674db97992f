//! What people watch: the last step of each robot, and events made of them for all who watch.
//!
//! The worker leaves each step here and goes on. Events are made beside it ([`crate::page`]), only while somebody
//! watches, and go through a bounded channel that drops the oldest: a reader that is slow, or stuck, sees fewer of
//! them, and nobody waits for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use axum::body::Bytes;
use tokio::sync::{Notify, broadcast};

use crate::error::Error;
use crate::meta::Meta;
use crate::observation::{Answer, Observation};

/// Robots whose last step is kept; of more, those that were silent for longest are forgotten.
pub const MAX_ROBOTS: usize = 8;

/// Pages that may be open.
pub const MAX_WATCHERS: usize = 16;

/// Events that a reader may be behind before it misses some.
const MAX_BEHIND: usize = 32;

/// A robot by its name; all that have none are one.
pub type Robot = Option<String>;

/// A step that has ended.
#[derive(Debug)]
pub struct Step {
    /// Whose.
    pub robot: Robot,
    /// The number of its connection.
    pub connection: u64,
    /// When it ended.
    pub at: SystemTime,
    /// Seconds between its picture and its arrival, by the robot's clock and ours, if the robot says when it looked.
    pub age: Option<f64>,
    /// What the model was given.
    pub observation: Observation,
    /// What the robot was told.
    pub outcome: Result<Answer, Error>,
}

impl Step {
    /// A step that ends now.
    pub fn new(meta: &Meta, observation: Observation, outcome: Result<Answer, Error>) -> Self {
        let at = SystemTime::now();
        let unix = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let arrived = unix.as_secs_f64() - meta.arrived.elapsed().as_secs_f64();
        let robot = meta.client.name().map(str::to_owned);
        let (connection, age) = (meta.connection, meta.timestamp.map(|looked| arrived - looked));
        Self { robot, connection, at, age, observation, outcome }
    }
}

/// A robot's last step.
#[derive(Debug, Clone)]
pub struct Last {
    /// The step.
    pub step: Arc<Step>,
    /// Counts the robot's steps, from 1.
    pub n: u64,
    /// Counts all robots' steps, from 1.
    number: u64,
}

/// An event as it goes over the wire.
pub type Event = Bytes;

/// Last steps and those who watch them.
pub struct Live {
    robots: Mutex<(u64, Vec<Last>)>,
    /// The last event of each robot, and the server's, for who comes later.
    shown: Mutex<Shown>,
    events: broadcast::Sender<Event>,
    watched: Notify,
}

#[derive(Default)]
struct Shown {
    server: Event,
    robots: BTreeMap<Robot, Event>,
}

impl Default for Live {
    fn default() -> Self {
        let (robots, shown, watched) = (Mutex::default(), Mutex::default(), Notify::new());
        Self { robots, shown, events: broadcast::Sender::new(MAX_BEHIND), watched }
    }
}

impl Live {
    /// Keeps a step in place of the robot's last.
    pub fn keep(&self, step: Step) {
        let mut robots = lock(&self.robots);
        let (number, last) = &mut *robots;
        *number += 1;
        let known = last.iter().position(|last| last.step.robot == step.robot);
        let oldest = (last.len() >= MAX_ROBOTS).then_some(0); // the order is that of the steps
        let before = known.or(oldest).map(|i| last.remove(i));
        let n = known.and(before.as_ref()).map_or(0, |before| before.n);
        last.push(Last { step: Arc::new(step), n: n + 1, number: *number });
        drop(robots); // before the picture that it takes the place of is freed
        drop(before);
    }

    /// Last steps that ended after step `number`, the oldest first, and the number of the newest.
    pub fn newer(&self, number: u64) -> (u64, Vec<Last>) {
        let robots = lock(&self.robots);
        let newer = robots.1.iter().filter(|last| last.number > number).cloned();
        (robots.0, newer.collect())
    }

    /// Robots whose last step is kept.
    pub fn robots(&self) -> Vec<Robot> {
        lock(&self.robots).1.iter().map(|last| last.step.robot.clone()).collect()
    }

    /// Comes back when somebody watches.
    pub async fn watched(&self) {
        while self.watchers() == 0 {
            self.watched.notified().await;
        }
    }

    /// How many watch.
    pub fn watchers(&self) -> usize {
        self.events.receiver_count()
    }

    /// What is there to see, and what comes; `None` if too many watch already.
    pub fn watch(&self) -> Option<(Vec<Event>, broadcast::Receiver<Event>)> {
        let shown = lock(&self.shown); // nothing is shown between the two
        if self.watchers() >= MAX_WATCHERS {
            return None;
        }
        let events = self.events.subscribe();
        self.watched.notify_one();
        let server = Some(&shown.server).filter(|event| !event.is_empty());
        Some((server.into_iter().chain(shown.robots.values()).cloned().collect(), events))
    }

    /// Shows an event of a robot.
    pub fn show(&self, robot: Robot, event: Event) {
        let mut shown = lock(&self.shown);
        shown.robots.insert(robot, event.clone());
        let _ = self.events.send(event); // nobody may watch any more
    }

    /// Shows an event of the server, and forgets those of robots that are not among `robots`.
    pub fn show_server(&self, robots: &[Robot], event: Event) {
        let mut shown = lock(&self.shown);
        shown.server = event.clone();
        shown.robots.retain(|robot, _| robots.contains(robot));
        let _ = self.events.send(event); // nobody may watch any more
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use openvla::image::RgbImage;
    use tokio::sync::broadcast::error::TryRecvError;

    use super::*;
    use crate::error::Code;
    use crate::meta::Client;
    use crate::tokens::Caller;

    fn step(robot: &str, instruction: &str) -> Step {
        let now = Instant::now();
        let client = match robot {
            "" => Client::Connection(7),
            name => Client::Named(name.into()),
        };
        let (caller, epoch, seq, timestamp) = (Caller::default(), None, None, Some(0.0));
        let (connection, arrived, deadline) = (7, now, now);
        let meta = Meta { client, caller, connection, epoch, seq, timestamp, arrived, deadline };
        let observation = Observation::new(RgbImage::new(1, 1), instruction.into(), None).unwrap();
        Step::new(&meta, observation, Err(Error::new(Code::NotFinite, "x")))
    }

    #[test]
    fn the_last_step_of_each_robot_is_kept_and_of_so_many_robots() {
        let live = Live::default();
        for (robot, instruction) in [("a", "1"), ("", "2"), ("a", "3")] {
            live.keep(step(robot, instruction));
        }
        let (number, all) = live.newer(0);
        let all: Vec<_> = all
            .iter()
            .map(|last| (last.step.robot.as_deref(), last.n, &*last.step.observation.instruction))
            .collect();
        assert_eq!((number, all), (3, vec![(None, 1, "2"), (Some("a"), 2, "3")]));
        assert_eq!(live.newer(2).1.len(), 1);
        assert!(live.newer(3).1.is_empty());
        for i in 0..MAX_ROBOTS - 1 {
            live.keep(step(&format!("b{i}"), "x"));
        }
        let robots = live.robots();
        assert!(robots.len() == MAX_ROBOTS && !robots.contains(&None), "{robots:?}");
        assert!(step("a", "x").age.unwrap() > 1e9, "seconds since 1970");
    }

    #[test]
    fn who_does_not_read_misses_events_and_holds_nobody_up() {
        let live = Live::default();
        let (seen, mut events) = live.watch().unwrap();
        assert!(seen.is_empty());
        for i in 0..1000_u32 {
            live.show(None, Event::from(i.to_string()));
        }
        assert!(matches!(events.try_recv(), Err(TryRecvError::Lagged(n)) if n > 900));
        assert!(events.try_recv().is_ok());
        let (seen, _) = live.watch().unwrap();
        assert_eq!(seen, [Event::from("999")], "who comes later sees the last");
        live.show_server(&[], Event::from("server"));
        assert_eq!(live.watch().unwrap().0, [Event::from("server")]);
    }

    #[test]
    fn so_many_may_watch() {
        let live = Live::default();
        let mut all: Vec<_> = (0..MAX_WATCHERS).map(|_| live.watch().unwrap()).collect();
        assert!(live.watch().is_none());
        all.pop();
        assert!(live.watch().is_some());
    }
}
