//! The way from a request to the model and back: the queue, shared by requests and the worker.
//!
//! A request waits in the queue until its answer or its deadline comes, whichever is first. A client that
//! disconnects while waiting leaves the queue.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;

use crate::error::{Code, Error};
use crate::live::Live;
use crate::meta::Meta;
use crate::metrics::Metrics;
use crate::observation::{Answer, Observation};
use crate::pace::Pace;
use crate::policy::ModelInfo;
use crate::queue::{Dropped, Evicted, Limits, Queue, Refused, Ticket};

/// The queue and the model's state, shared by requests and the worker. Clones share them too.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    metrics: Metrics,
    live: Live,
}

struct State {
    queue: Queue<Job>,
    phase: Phase,
    model: Option<Arc<ModelInfo>>,
    /// How long steps take.
    pace: Pace,
    /// When the current step began.
    busy_since: Option<Instant>,
    /// Robots that it is for.
    serving: usize,
}

/// Whether requests are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// The model is being opened, for the first time or after a failure, and this is why.
    Opening(String),
    /// They are accepted.
    Ready,
    /// No longer; those in the queue are still answered.
    Closing,
    /// Never again.
    Closed,
}

/// What the worker does next.
pub(crate) enum Next<T> {
    /// A step for these.
    Jobs(Vec<(Meta, Job)>),
    /// Something else.
    Other(T),
}

/// Work for the model.
pub struct Job {
    /// The input.
    pub observation: Observation,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<Answer, Error>>,
}

impl Engine {
    /// An engine without a model yet.
    pub fn new(limits: Limits) -> Self {
        let state = State {
            queue: Queue::new(limits),
            phase: Phase::Opening("the model is being opened".into()),
            model: None,
            pace: Pace::default(),
            busy_since: None,
            serving: 0,
        };
        let (state, wake) = (Mutex::new(state), Condvar::new());
        let (metrics, live) = (Metrics::default(), Live::default());
        Self { shared: Arc::new(Shared { state, wake, metrics, live }) }
    }

    /// Last steps, and those who watch them.
    pub fn live(&self) -> &Live {
        &self.shared.live
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// The model's description, once it was ready.
    pub fn model(&self) -> Option<Arc<ModelInfo>> {
        self.state().model.clone()
    }

    /// Queues an observation and waits for its answer.
    ///
    /// # Errors
    /// Any of the queue's, and those of the model.
    pub async fn act(&self, observation: Observation, meta: Meta) -> Result<Answer, Error> {
        let (reply, answer) = oneshot::channel();
        let late = late(&meta);
        let deadline = meta.deadline;
        let ticket = self.enqueue(meta, Job { observation, reply })?;
        let _slot = QueueSlot { engine: self, ticket };
        match tokio::time::timeout_at(deadline.into(), answer).await {
            Ok(Ok(Ok(_))) if Instant::now() >= deadline => Err(late),
            Ok(Ok(Err(error))) if error.code == Code::DeadlineExceeded => Err(late),
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Error::new(Code::ModelFailed, "the model was lost")),
            Err(_) => Err(late),
        }
    }

    fn enqueue(&self, meta: Meta, job: Job) -> Result<Ticket, Error> {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut state = self.state();
        state.check_ready()?;
        let pushed = state.queue.push(meta, job, Instant::now(), unix.as_secs_f64());
        let (ticket, left) = pushed.map_err(|refused| state.refusal(refused))?;
        self.count(&state);
        drop(state);
        self.shared.wake.notify_one();
        self.dismiss(left);
        Ok(ticket)
    }

    /// Whether requests are taken, and no step takes longer than `stall`.
    ///
    /// # Errors
    /// [`Code::NotReady`] says why not.
    pub fn check_ready(&self, stall: Duration) -> Result<(), Error> {
        let state = self.state();
        state.check_ready()?;
        match state.busy_since.map(|since| since.elapsed()) {
            Some(busy) if busy > stall => {
                let message = format!("the model has been busy with a step for {busy:.0?}");
                Err(Error::new(Code::NotReady, message))
            }
            _ => Ok(()),
        }
    }

    /// How many wait or are being served.
    pub fn pending(&self) -> usize {
        let state = self.state();
        state.queue.len() + state.serving
    }

    /// For how long the step goes on that goes on now.
    pub fn busy(&self) -> Option<Duration> {
        self.state().busy_since.map(|since| since.elapsed())
    }

    /// The next job, as soon as there is one, and up to `most` with those that wait by then and go with it: if all will be
    /// in time, and in less than `stall`. What `other` has goes first; who adds to that calls [`Engine::wake`]. `None`
    /// when there will be nothing.
    pub(crate) fn next<T>(
        &self,
        most: usize,
        stall: Duration,
        other: impl Fn() -> Option<T>,
    ) -> Option<Next<T>> {
        let mut state = self.state();
        loop {
            state.busy_since = None;
            if let Some(other) = other() {
                state.serving = 0;
                return Some(Next::Other(other));
            }
            let State { queue, pace, .. } = &mut *state;
            let now = Instant::now();
            let most = (2..=most).take_while(|n| pace.takes(*n) < stall).last().unwrap_or(1);
            let (next, late) = queue.pop(now, most, |n| pace.takes(n));
            state.serving = next.len();
            self.count(&state);
            self.dismiss(late);
            if !next.is_empty() {
                self.metrics().batch(next.len());
                state.busy_since = Some(now);
                return Some(Next::Jobs(next));
            }
            if matches!(state.phase, Phase::Closing | Phase::Closed) {
                return None;
            }
            state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes note of a step of `n` robots that has ended.
    pub(crate) fn stepped(&self, n: usize, took: Duration) {
        self.state().pace.note(n, took);
    }

    /// Makes the worker look for what is not a job.
    pub(crate) fn wake(&self) {
        let _state = self.state(); // so that it is not about to sleep
        self.shared.wake.notify_all();
    }

    /// From now on it is this model that serves, whose first step took so long.
    pub(crate) fn swap(&self, model: ModelInfo, took: Duration) {
        let mut state = self.state();
        self.metrics().model(&model);
        (state.model, state.pace) = (Some(Arc::new(model)), Pace::default());
        state.pace.note(1, took);
    }

    /// Takes requests from now on.
    pub(crate) fn open(&self, model: ModelInfo) {
        let mut state = self.state();
        self.metrics().model(&model);
        state.model = Some(Arc::new(model));
        if matches!(state.phase, Phase::Opening(_)) {
            state.phase = Phase::Ready;
            self.metrics().ready.set(1);
        }
    }

    /// Takes no requests until the model is open again. Those that wait go on waiting.
    pub(crate) fn reopen(&self, why: &str) {
        let mut state = self.state();
        (state.busy_since, state.serving) = (None, 0);
        self.metrics().ready.set(0);
        if state.phase == Phase::Ready {
            state.phase = Phase::Opening(format!("the model failed and is opened again: {why}"));
        }
    }

    /// Takes no requests any more; the worker ends after those that wait.
    pub fn close(&self) {
        let mut state = self.state();
        if state.phase != Phase::Closed {
            state.phase = Phase::Closing;
        }
        self.metrics().ready.set(0);
        self.shared.wake.notify_all();
    }

    /// Sends all away who still wait: there is no worker any more.
    pub(crate) fn end(&self) {
        let mut state = self.state();
        state.phase = Phase::Closed;
        self.metrics().ready.set(0);
        let (left, late) = state.queue.pop(Instant::now(), usize::MAX, |_| Duration::ZERO);
        self.dismiss(late);
        for (_, job) in left {
            let gone = Error::new(Code::NotReady, "the model failed and is not opened again");
            let _ = job.reply.send(Err(gone)); // whoever asked may have left
        }
        self.count(&state);
    }

    fn dismiss(&self, left: Evicted<Job>) {
        for (job, why) in left {
            let error = match why {
                Dropped::Superseded => {
                    self.metrics().superseded.inc();
                    Error::new(Code::Superseded, "the same client sent a newer observation")
                }
                Dropped::Late => {
                    self.metrics().dropped.inc();
                    Error::new(Code::DeadlineExceeded, "no turn came before the deadline")
                }
            };
            let _ = job.reply.send(Err(error)); // whoever asked may have left
        }
    }

    fn count(&self, state: &State) {
        self.metrics().waiting.set(state.queue.len() as i64);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check_ready(&self) -> Result<(), Error> {
        let why = match &self.phase {
            Phase::Ready => return Ok(()),
            Phase::Opening(why) => why,
            Phase::Closing | Phase::Closed => "the server is going away",
        };
        Err(Error::new(Code::NotReady, why).retry_after(1))
    }

    fn refusal(&self, refused: Refused) -> Error {
        match refused {
            Refused::Full => {
                let waiting = self.queue.len();
                let wait = self.pace.takes(1).as_secs_f64() * waiting as f64;
                let message = format!("{waiting} observations wait already");
                let hint = "fewer robots, a faster device, or a longer --queue";
                let seconds = wait.ceil().clamp(1.0, 3600.0) as u64;
                Error::new(Code::QueueFull, message).hint(hint).retry_after(seconds)
            }
            Refused::Stale(over) => {
                let message =
                    format!("the observation is {over:.0?} older than --max-age-ms allows");
                let hint = "send pictures as they are taken, and keep both clocks synchronized";
                Error::new(Code::Stale, message).hint(hint)
            }
            Refused::OutOfOrder(why) => Error::new(Code::OutOfOrder, why)
                .hint("a program that starts again should send X-Epoch, a number that is then higher, such as the time of its start"),
        }
    }
}

/// What a request is told that was not served in time.
pub(crate) fn late(meta: &Meta) -> Error {
    let allowed = meta.deadline.saturating_duration_since(meta.arrived).as_millis();
    let message = format!("there was no motion within the {allowed} ms that the request allowed");
    Error::new(Code::DeadlineExceeded, message)
}

/// A slot in the queue, freed when the request goes away.
struct QueueSlot<'a> {
    engine: &'a Engine,
    ticket: Ticket,
}

impl Drop for QueueSlot<'_> {
    fn drop(&mut self) {
        let mut state = self.engine.state();
        if state.queue.cancel(self.ticket).is_some() {
            self.engine.metrics().dropped.inc();
            self.engine.count(&state);
        }
    }
}
