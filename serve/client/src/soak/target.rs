//! The server that is driven, what it is known to answer, and what was seen of it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::soak::forms::{Form, Said, Says};
use crate::soak::scene::Scene;

/// For how long a motion is worth something to a robot.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// How long a busy machine may keep a client from seeing an answer that is there.
const SLACK: Duration = Duration::from_secs(5);

/// What all clients share.
pub struct Target {
    /// Host and port.
    pub address: String,
    /// The value of `Authorization`.
    pub token: Option<String>,
    pub scenes: Vec<Scene>,
    /// Clients end when this is set.
    pub over: AtomicBool,
    /// Answers, by who asked and what was answered.
    outcomes: Mutex<BTreeMap<String, BTreeMap<String, u64>>>,
    /// How often each promise was broken, and how it was first.
    broken: Mutex<BTreeMap<&'static str, (u64, String)>>,
    /// Set from before a server is asked to end until the next one is ready.
    ending: AtomicBool,
    /// Servers that were asked to end, and those that were ended without being asked.
    ends: AtomicU64,
    kills: AtomicU64,
}

/// What was known of the server's end at a time.
#[derive(Clone, Copy)]
pub struct Moment {
    ending: bool,
    ends: u64,
    kills: u64,
}

impl Target {
    pub fn new(address: String, token: Option<String>, scenes: Vec<Scene>) -> Self {
        Self {
            address,
            token,
            scenes,
            over: AtomicBool::default(),
            outcomes: Mutex::default(),
            broken: Mutex::default(),
            ending: AtomicBool::default(),
            ends: AtomicU64::default(),
            kills: AtomicU64::default(),
        }
    }

    /// Asks for every scene once by every protocol, while nothing else runs.
    ///
    /// # Errors
    /// If one is not answered, the protocols differ, or the scenes are answered alike.
    pub fn learn(&mut self) -> Result<()> {
        for i in 0..self.scenes.len() {
            let mut known = None;
            for form in Form::ALL {
                let at = || format!("scene {i} by {}", form.name());
                let said = form.open(self).and_then(|mut line| {
                    line.send(self, &self.scenes[i], Says::default())?;
                    line.receive()
                });
                let said = said.with_context(at)?;
                ensure!(said.outcome == "ok", "{} is answered `{}`", at(), said.outcome);
                let (tokens, action) =
                    known.get_or_insert((said.tokens.clone(), said.action.clone()));
                let differs = |a: &str| format!("{}: the {a} are others than by /v1/act", at());
                ensure!(said.tokens.is_empty() || said.tokens == *tokens, differs("tokens"));
                ensure!(said.action == *action, differs("numbers"));
            }
            let scene = &mut self.scenes[i];
            (scene.tokens, scene.action) = known.unwrap_or_default();
        }
        let mut distinct: Vec<_> = self.scenes.iter().map(|scene| &scene.tokens).collect();
        distinct.sort();
        distinct.dedup();
        let (n, most) = (distinct.len(), self.scenes.len());
        ensure!(
            2 * n > most,
            "the model has {n} answers to {most} scenes; a trained one is wanted"
        );
        Ok(())
    }

    /// A header's line that shows the token, if there is one.
    pub fn authorization(&self) -> String {
        self.token.as_ref().map(|token| format!("Authorization: {token}\r\n")).unwrap_or_default()
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Sleeps, but not beyond the end.
    pub fn sleep(&self, time: Duration) {
        let begun = Instant::now();
        while !self.is_over() && begun.elapsed() < time {
            std::thread::sleep(Duration::from_millis(50).min(time - begun.elapsed().min(time)));
        }
    }

    pub fn count(&self, who: &str, outcome: &str) {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        *outcomes.entry(who.to_owned()).or_default().entry(outcome.to_owned()).or_default() += 1;
    }

    pub fn outcomes(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that a promise was broken.
    pub fn broke(&self, promise: &'static str, how: String) {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        broken.entry(promise).or_insert((0, how)).0 += 1;
    }

    pub fn broken(&self) -> BTreeMap<&'static str, (u64, String)> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A server is about to be asked to end, or to be ended without.
    pub fn ending(&self, is_asked: bool) {
        self.ending.store(true, Ordering::SeqCst);
        self.ends.fetch_add(1, Ordering::SeqCst);
        self.kills.fetch_add(u64::from(!is_asked), Ordering::SeqCst);
    }

    /// The next server is ready.
    pub fn ready(&self) {
        self.ending.store(false, Ordering::SeqCst);
    }

    pub fn now(&self) -> Moment {
        let [ends, kills] = [&self.ends, &self.kills].map(|n| n.load(Ordering::SeqCst));
        Moment { ending: self.ending.load(Ordering::SeqCst), ends, kills }
    }

    /// Whether a server that ends explains that a connection or a websocket, in use since then, is lost.
    pub fn explains(&self, since: Moment) -> bool {
        let now = self.now();
        since.ending || now.ending || now.ends != since.ends
    }

    /// Whether a request over HTTP may have been lost that was sent whole by `sent`, over a connection from `opened` on.
    /// SIGTERM loses none that came before it.
    pub fn may_lose(&self, opened: Moment, sent: Moment) -> bool {
        sent.ending || sent.ends != opened.ends || self.now().kills != sent.kills
    }

    /// Notes an answer that never came.
    pub fn lost(&self, who: &str, error: &io::Error, is_explained: bool) {
        self.count(who, "lost");
        if !is_explained {
            self.broke("each request is answered", format!("{who}: {error}"));
        }
    }

    /// Holds a motion against its scene and its deadline.
    pub fn check(&self, who: &str, scene: &Scene, said: &Said, took: Duration) {
        let is_own = said.tokens.is_empty() || said.tokens == scene.tokens;
        if !is_own || said.action != scene.action {
            let (got, want) = (&said.action, &scene.action);
            let how = format!("{who}, {}: {got:?}, not {want:?}", scene.instruction);
            self.broke("a motion is that of its own picture", how);
        }
        let deadline = DEADLINE.as_secs_f64() * 1e3;
        if said.ms.is_some_and(|ms| ms > deadline) || took > DEADLINE + SLACK {
            let how = format!("{who}: after {took:.1?}, by the server {:?} ms", said.ms);
            self.broke("a motion comes before its deadline", how);
        }
    }
}
