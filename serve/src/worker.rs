//! The thread that owns the model: one observation after the other, or several that wait together, to one safe motion each.
//!
//! A step that panics, or a device that fails, ends the model's life but not the thread's: the model
//! is opened again, or the program ends, as the operator wants it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use openvla::Session;
use openvla::image::{Rgb, RgbImage};

use crate::engine::{Engine, Job, Next, late};
use crate::error::{Code, Error};
use crate::live::Step;
use crate::meta::{Client, Meta};
use crate::models::Models;
use crate::observation::{Answer, Motion, Observation, Times, UNSURE};
use crate::policy::{ModelInfo, Policy, Turn};
use crate::recent::Recent;
use crate::reload::Successor;
use crate::safety::Safety;

/// What happens after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnFailure {
    /// The model is opened again, until that does not help.
    Restart,
    /// The program ends.
    Exit,
}

/// How the worker works.
#[derive(Debug, Clone)]
pub struct Rules {
    /// What every motion must be.
    pub safety: Safety,
    /// The data set of requests that name none.
    pub unnorm_key: Option<String>,
    /// For how long a silent client's motions are remembered.
    pub memory: Duration,
    /// Whether the last step of each robot is kept for the page.
    pub page: bool,
    /// The most robots that one step serves.
    pub batch: usize,
    /// How long a step may take.
    pub stall: Duration,
    /// What happens after a failure.
    pub on_failure: OnFailure,
}

/// Failures in a row after which the model is not opened again.
const MAX_FAILURES: u32 = 5;

/// What is known of a client.
#[derive(Default)]
struct Known {
    session: Session,
    /// The data set and the motion of the last answer.
    last: Option<(String, Vec<f64>)>,
}

/// Serves until the engine closes.
///
/// # Errors
/// If the model cannot be opened, or fails more often than the rules bear.
pub fn run<M: Models>(
    engine: &Engine,
    rules: &Rules,
    models: &M,
    successors: &Receiver<Successor<M::Policy>>,
) -> Result<()> {
    let clients = Recent::new(rules.memory);
    let mut worker = Worker { engine, rules, clients, file: None, failures: 0 };
    loop {
        let Err(why) = worker.live(models, successors) else {
            engine.end();
            return Ok(());
        };
        worker.failures += 1;
        let first = engine.model().is_none();
        if first || rules.on_failure == OnFailure::Exit || worker.failures >= MAX_FAILURES {
            engine.end();
            return Err(why);
        }
        tracing::error!(error = format!("{why:#}"), "the model failed and is opened again");
        engine.metrics().restarts.inc();
        std::thread::sleep(Duration::from_millis(50 << worker.failures));
    }
}

struct Worker<'a> {
    engine: &'a Engine,
    rules: &'a Rules,
    clients: Recent<Client, Known>,
    /// The file that is served, if it is another than at the start.
    file: Option<PathBuf>,
    /// Failures since the last good step.
    failures: u32,
}

impl Worker<'_> {
    /// One life of the model: opened, warmed up, and used until the end or a failure. Others may take its place.
    fn live<M: Models>(
        &mut self,
        models: &M,
        successors: &Receiver<Successor<M::Policy>>,
    ) -> Result<()> {
        let mut policy = catch_panic(|| models.open(self.file.as_deref()))??;
        let took = warm_up(self.rules, &mut policy)?;
        let mut model = policy.info();
        self.engine.stepped(1, took);
        self.engine.open(model.clone());
        tracing::info!(model = model.name, fingerprint = model.fingerprint, "ready");
        let successor = || successors.try_recv().ok();
        loop {
            let most = self.rules.batch.min(policy.max_batch());
            match self.engine.next(most, self.rules.stall, successor) {
                None => return Ok(()),
                Some(Next::Jobs(jobs)) => self.serve(&mut policy, &model, jobs)?,
                Some(Next::Other(Successor { policy: new, file, took, before })) => {
                    let old = std::mem::replace(&mut policy, new);
                    (model, self.file) = (policy.info(), file);
                    // Of a robot, its last motion alone is kept, near which the next one is held.
                    self.clients.values_mut().for_each(|known| known.session = Session::default());
                    self.engine.swap(model.clone(), took);
                    let _ = before.send(old); // who put it there waits
                }
            }
            self.failures = 0;
        }
    }

    /// One step for all of some jobs. Each is answered as soon as its motion is known.
    ///
    /// # Errors
    /// If the model failed or panicked: those who have no motion by then are told.
    fn serve<P: Policy>(
        &mut self,
        policy: &mut P,
        model: &ModelInfo,
        jobs: Vec<(Meta, Job)>,
    ) -> Result<()> {
        let (begun, engine, page) = (Instant::now(), self.engine, self.rules.page);
        let n = jobs.len();
        let (mut asked, mut replies) = (Vec::new(), Vec::new());
        for (meta, Job { observation, reply }) in jobs {
            asked.push((meta, observation));
            replies.push(Some(reply));
        }
        let (mut shown, mut failed) = (Vec::new(), Vec::new());
        let mut answer = |at: usize, result: Result<Answer, Error>| match result {
            Err(error) if error.code == Code::ModelFailed => failed.push((at, error)),
            result => {
                shown.extend(page.then(|| (at, result.clone())));
                let reply = replies[at].take().expect("one answer for each");
                let _ = reply.send(result); // whoever asked may have left
            }
        };
        let step = || self.step(policy, model, &asked, begun, &mut answer);
        let panicked = catch_panic(step).err();
        if panicked.is_none() && failed.is_empty() {
            engine.stepped(n, begun.elapsed());
        }
        let mut asked: Vec<_> = asked.into_iter().map(Some).collect();
        for (at, outcome) in shown {
            let (meta, observation) = asked[at].take().expect("one answer for each");
            engine.live().keep(Step::new(&meta, observation, outcome));
        }
        let why =
            panicked.or_else(|| failed.first().map(|(_, error)| anyhow!(error.message.clone())));
        let Some(why) = why else { return Ok(()) };
        // Turns requests away before anyone hears of the failure, so that who asks again at once does not ask a model
        // that is gone.
        engine.reopen(&format!("{why:#}"));
        let of_panic = || Error::new(Code::ModelFailed, "the model failed");
        for (at, reply) in replies.iter_mut().enumerate() {
            let Some(reply) = reply.take() else { continue };
            let own = failed.iter().position(|(of, _)| *of == at);
            let error = own.map_or_else(of_panic, |i| failed.swap_remove(i).1);
            let _ = reply.send(Err(error)); // whoever asked may have left
        }
        Err(why)
    }

    /// Acts for all who ask, and calls `answer` with the place of each and what it is told.
    fn step(
        &mut self,
        policy: &mut impl Policy,
        model: &ModelInfo,
        asked: &[(Meta, Observation)],
        begun: Instant,
        answer: &mut impl FnMut(usize, Result<Answer, Error>),
    ) {
        let mut places = Vec::new();
        for (at, (_, observation)) in asked.iter().enumerate() {
            match n_actions(model, observation) {
                Ok(_) => places.push(at),
                Err(error) => answer(at, Err(error)),
            }
        }
        // A step that fails half way leaves no session behind.
        let mut take = |at: &usize| {
            let known = self.clients.entry(asked[*at].0.client.clone(), begun);
            std::mem::take(&mut known.session)
        };
        let mut sessions: Vec<Session> = places.iter().map(&mut take).collect();
        let turns = places.iter().zip(&mut sessions).map(|(at, session)| {
            let observation = &asked[*at].1;
            let unnorm_key = observation.unnorm_key.as_ref().or(self.rules.unnorm_key.as_ref());
            Turn { session, observation, unnorm_key: unnorm_key.map(String::as_str) }
        });
        let mut turns: Vec<_> = turns.collect();
        let mut acted = Vec::new();
        policy.act_each(&mut turns, &mut |turn, motion| {
            let at = places[turn];
            let (meta, observation) = &asked[at];
            acted.extend(motion.is_ok().then_some(turn));
            let motion = motion.map_err(Error::from);
            let check = |motion| self.check(model, meta, observation, begun, motion);
            answer(at, motion.and_then(check));
        });
        for turn in acted {
            let client = asked[places[turn]].0.client.clone();
            self.clients.entry(client, begun).session = std::mem::take(&mut sessions[turn]);
        }
    }

    /// A motion as an answer, if it is safe and in time.
    fn check(
        &mut self,
        model: &ModelInfo,
        meta: &Meta,
        observation: &Observation,
        begun: Instant,
        motion: Motion,
    ) -> Result<Answer, Error> {
        let known = self.clients.entry(meta.client.clone(), begun);
        let dataset = model.statistics.datasets().get(&motion.unnorm_key);
        let ranges = dataset.map(|dataset| dataset.action.ranges()).unwrap_or_default();
        let mut actions = motion.actions;
        actions.truncate(n_actions(model, observation)?);
        let last = known.last.as_ref().filter(|(key, _)| *key == motion.unnorm_key);
        let last = last.map(|(_, motion)| motion.as_slice());
        let safety = self.rules.safety.check_all(&mut actions, &ranges, last)?;
        let timing_ms = Times::new(begun.saturating_duration_since(meta.arrived), &motion.timing);
        self.engine.metrics().step(&timing_ms, &motion.draft);
        if Instant::now() >= meta.deadline {
            self.engine.metrics().dropped.inc();
            return Err(late(meta));
        }
        known.last = actions.last().map(|last| (motion.unnorm_key.clone(), last.clone()));
        self.engine.metrics().sessions.set(self.clients.len() as i64);
        let (unconstrained, all_actions) = motion.unconstrained;
        Ok(Answer {
            action: actions.first().cloned().unwrap_or_default(),
            actions,
            normalized: motion.normalized.into_iter().next().unwrap_or_default(),
            tokens: motion.tokens,
            logits: motion.logits,
            unnorm_key: motion.unnorm_key,
            ranges,
            all_actions,
            unconstrained,
            warning: warning(model, &observation.instruction, all_actions),
            safety,
            draft: motion.draft,
            timing_ms,
            fingerprint: model.fingerprint.clone(),
            file: model.file.clone(),
            seq: meta.seq,
        })
    }
}

/// Runs a step before the first request, so that this one is as fast as those after it. Gives the time that it took.
pub(crate) fn warm_up(rules: &Rules, policy: &mut impl Policy) -> Result<Duration> {
    let model = policy.info();
    let key = match &rules.unnorm_key {
        Some(key) => model.statistics.select(Some(key))?.0,
        None => model.statistics.first().0,
    };
    let image = RgbImage::from_pixel(model.image_size, model.image_size, Rgb([127; 3]));
    let n_state = model.oft.as_ref().map_or(0, |oft| oft.n_state);
    let observation = Observation {
        wrists: vec![image.clone(); model.n_camera() - 1],
        image,
        state: Some(vec![0.0; n_state]),
        instruction: "warm up".into(),
        unnorm_key: Some(key.into()),
        n_actions: None,
    };
    let begun = Instant::now();
    let act = || policy.act(&mut Session::default(), &observation, Some(key));
    catch_panic(act)?.context("the warm-up step failed")?;
    Ok(begun.elapsed())
}

/// How many actions of a chunk are wanted.
fn n_actions(model: &ModelInfo, observation: &Observation) -> Result<usize, Error> {
    let chunk = model.oft.as_ref().map_or(1, |oft| oft.chunk);
    match observation.n_actions {
        None => Ok(chunk),
        Some(n) if (1..=chunk as u64).contains(&n) => Ok(n as usize),
        Some(n) => {
            let message = format!(
                "`n_actions` is {n}; the model computes {chunk}, and 1 to {chunk} are wanted"
            );
            Err(Error::bad_request(message))
        }
    }
}

/// What a person should know about a motion.
fn warning(model: &ModelInfo, instruction: &str, all_actions: bool) -> Option<&'static str> {
    let doubt = model.prompt.as_ref().and_then(|prompt| prompt.doubt(instruction));
    doubt.or((!all_actions).then_some(UNSURE))
}

/// What a call returns, or the panic it ended with as an error.
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        anyhow!("the model panicked: {}", text.unwrap_or("no reason given"))
    })
}
