//! vla-eval's protocol: a websocket at `/vla-eval`, on which a benchmark asks for one action after the other.
//!
//! Every frame is a map of msgpack, `{type, payload, seq, timestamp}`, and the client speaks first: `hello` is answered
//! by what is served, each `observation` by one `action` of the same `seq`, and what is wrong with one by an `error`.
//! A chunk of actions is given out one by one; `episode_start` and `episode_end` throw away what is left of it.
//!
//! The URL says what the protocol has no field for: `?unnorm_key=KEY&n_actions=N&gripper=FORMAT`. Motions are in the
//! data set's units unless `gripper` asks for a format of vla-eval's; nothing turns pictures.
//!
//! ref: vla_eval 0.8 `model_servers/serve.py`, `model_servers/openvla.py`, `model_servers/oft.py`, `protocol`

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{WebSocketUpgrade, close_code};
use axum::extract::{Extension, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::interval_at;

use crate::app::{App, Connection};
use crate::error::{Code, Error};
use crate::meta::{Client, Meta};
use crate::observation::{Answer, Headers};
use crate::tokens::{Caller, Scope};
use crate::vla_frame::{Array, Draft, Head, Hello, Kind, PROTOCOL, Wishes};
use crate::websocket::{self, Disconnected, Frame, Socket};

/// How often a ping goes to the client, so that the system notices when its machine is gone. Nothing must come back: a
/// benchmark answers nothing while it sets up its world.
const PING: Duration = Duration::from_secs(20);

/// `GET /health`: whether observations are taken.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    let ready = app.engine.check_ready(app.settings.stall());
    // Not an error while it is stopped: who watches over servers would start another, which is not.
    let status = if app.stop.check(Instant::now()).is_err() { "stopped" } else { "ok" };
    ready.map(|()| Json(json!({ "status": status }))).into_response()
}

/// `GET /config`: what vla-eval's tools may set elsewhere, and nothing here.
pub async fn config(query: Result<Query<BTreeMap<String, String>>, QueryRejection>) -> Response {
    let errors: Vec<String> = match query {
        Ok(Query(wanted)) => wanted.keys().map(|key| format!("`{key}` cannot be set")).collect(),
        Err(why) => vec![why.body_text()],
    };
    if errors.is_empty() {
        return Json(json!({ "applied": {}, "config": {} })).into_response();
    }
    (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({ "errors": errors }))).into_response()
}

/// `GET /vla-eval`.
pub async fn upgrade(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Connection>,
    Extension(caller): Extension<Caller>,
    wishes: Result<Query<Wishes>, QueryRejection>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    // The client would take a refused handshake for a server that is not there yet, and say nothing about why.
    let wishes = wishes.map(|Query(wishes)| wishes).map_err(|why| {
        Error::bad_request(format!("the URL: {}", why.body_text())).hint(Wishes::HINT)
    });
    let at = Arc::clone(&app);
    websocket::accept(&at, upgrade, "vla-eval", async move |socket| {
        let (work, chunk) = (JoinSet::new(), VecDeque::new());
        let (reads, episode, step, waiting, asked) = (false, 0, None, None, Instant::now());
        let mut talk = Talk {
            app,
            connection,
            caller,
            wishes,
            socket,
            work,
            reads,
            episode,
            chunk,
            asked,
            step,
            waiting,
        };
        let _ = talk.run().await; // an error means that the client is gone, which is not our concern
    })
}

struct Talk {
    app: Arc<App>,
    connection: Connection,
    caller: Caller,
    /// What the URL asks for, or what is wrong with it.
    wishes: Result<Wishes, Error>,
    socket: Socket,
    /// A frame that is being read, and the step. Dropped with the connection, and with it the slot in the queue.
    work: JoinSet<Done>,
    /// Whether a frame is being read. The next one is not taken before.
    reads: bool,
    /// Counts the episodes.
    episode: u64,
    /// Actions that were computed and are not given out yet, and when their observation came.
    chunk: VecDeque<Vec<f32>>,
    asked: Instant,
    /// The step that is being computed.
    step: Option<(u64, AbortHandle)>,
    /// The observation after that: the newest.
    waiting: Option<Asked>,
}

/// An observation that came.
struct Asked {
    seq: u64,
    timestamp: f64,
    arrived: Instant,
    frame: Bytes,
}

enum Done {
    Read(Result<Kind, Error>, Asked),
    /// A step of an episode.
    Step(u64, u64, Box<Result<Answer, Error>>),
}

#[derive(Serialize)]
struct Out<P> {
    r#type: &'static str,
    payload: P,
    seq: u64,
    timestamp: f64,
}

#[derive(Serialize)]
struct Action {
    actions: Array,
}

#[derive(Serialize)]
struct Failed {
    error: String,
}

impl Talk {
    async fn run(&mut self) -> Result<(), Disconnected> {
        let mut draining = self.app.draining.clone();
        let mut ping = interval_at((Instant::now() + PING).into(), PING);
        loop {
            let ending = *draining.borrow();
            if ending && self.work.is_empty() {
                return self.socket.close(close_code::AWAY, "the server is going away").await;
            }
            tokio::select! {
                frame = self.socket.next(), if !self.reads => match frame? {
                    Frame::Binary(frame) => self.read(frame),
                    Frame::Text => {
                        let wrong = "a text frame came; binary frames of msgpack are wanted";
                        self.refuse(0, "frame", &Error::bad_request(wrong)).await?;
                    }
                    Frame::Alive => {}
                },
                Some(done) = self.work.join_next() => self.done(done).await?,
                _ = ping.tick() => self.socket.ping().await?,
                _ = draining.changed(), if !ending => {}
            }
        }
    }

    fn read(&mut self, frame: Bytes) {
        self.reads = true;
        let (app, arrived) = (Arc::clone(&self.app), Instant::now());
        let meta = self.meta(arrived, None);
        let mut asked = Asked { seq: 0, timestamp: 0.0, arrived, frame };
        self.work.spawn(async move {
            let frame = asked.frame.clone();
            let read = move || Head::read(&frame);
            let read = async { app.read(&meta?, asked.frame.len(), read).await };
            let kind = read.await.map(|head| {
                (asked.seq, asked.timestamp) = (head.seq, head.timestamp);
                head.kind
            });
            Done::Read(kind, asked)
        });
    }

    /// Of what came at `arrived` in this episode.
    fn meta(&self, arrived: Instant, timestamp: Option<f64>) -> Result<Meta, Error> {
        let number = self.connection.number;
        // Frames of one connection are in order. Its clock matters only to who asks for their age.
        let timestamp = timestamp.filter(|_| self.app.settings.max_age_ms.is_some());
        let headers = Headers { timestamp, ..Headers::default() };
        let meta = headers.meta(arrived, number, self.app.settings.deadline())?;
        let client = Client::Episode(number, self.episode);
        Ok(Meta { client, caller: self.caller.clone(), ..meta })
    }

    async fn done(&mut self, done: Result<Done, JoinError>) -> Result<(), Disconnected> {
        match done {
            Ok(Done::Read(kind, asked)) => {
                self.reads = false;
                match kind {
                    Ok(kind) => self.take(kind, asked).await,
                    Err(error) => self.refuse(asked.seq, "frame", &error).await,
                }
            }
            Ok(Done::Step(episode, seq, answer)) if episode == self.episode => {
                self.step = None;
                let wishes = self.wishes.clone();
                match answer.and_then(|answer| wishes?.actions(&answer)) {
                    Ok(actions) => {
                        self.chunk.extend(actions);
                        self.give(seq).await?;
                    }
                    Err(error) => self.refuse(seq, "observation", &error).await?,
                }
                match self.waiting.take() {
                    Some(asked) => self.observe(asked).await,
                    None => Ok(()),
                }
            }
            Ok(Done::Step(..)) => Ok(()),
            Err(error) if error.is_cancelled() => Ok(()),
            Err(_) => Err(Disconnected),
        }
    }

    async fn take(&mut self, kind: Kind, asked: Asked) -> Result<(), Disconnected> {
        match kind {
            Kind::Hello(PROTOCOL) => {
                let model = self.app.engine.model().ok_or(Disconnected)?;
                let key = self.app.settings.unnorm_key.as_deref();
                let hello = Hello::new(&model, self.wishes.as_ref().ok(), key);
                self.send("hello", hello, asked.seq).await
            }
            Kind::Hello(version) => {
                let message = format!("protocol version {version}; {PROTOCOL} is spoken here");
                self.refuse(asked.seq, "hello", &Error::bad_request(message)).await
            }
            Kind::EpisodeStart | Kind::EpisodeEnd => self.end_episode().await,
            Kind::Observation => {
                let permitted = self.app.tokens.permit(&self.caller, Scope::Act);
                let counted = || self.app.limit(&self.caller, None, &self.connection);
                match permitted.and_then(|()| counted()) {
                    Ok(()) => self.observe(asked).await,
                    Err(error) => self.refuse(asked.seq, "observation", &error).await,
                }
            }
            Kind::Error => Ok(()),
            Kind::Other(name) => {
                let message = format!("there are no frames of type `{name}`");
                self.refuse(asked.seq, "frame", &Error::bad_request(message)).await
            }
        }
    }

    /// What was asked for and not answered is of no use any more.
    async fn end_episode(&mut self) -> Result<(), Disconnected> {
        self.episode += 1;
        self.chunk.clear();
        let step = self.step.take().map(|(seq, step)| {
            step.abort();
            seq
        });
        for seq in step.into_iter().chain(self.waiting.take().map(|asked| asked.seq)) {
            let over = Error::new(Code::Superseded, "its episode is over");
            self.refuse(seq, "observation", &over).await?;
        }
        Ok(())
    }

    async fn observe(&mut self, asked: Asked) -> Result<(), Disconnected> {
        if self.step.is_some() {
            if let Some(older) = self.waiting.replace(asked) {
                let newer =
                    Error::new(Code::Superseded, "the same client sent a newer observation");
                self.refuse(older.seq, "observation", &newer).await?;
            }
            return Ok(());
        }
        if !self.chunk.is_empty() {
            return self.give(asked.seq).await;
        }
        let (app, episode, seq) = (Arc::clone(&self.app), self.episode, asked.seq);
        self.asked = asked.arrived;
        let meta = self.meta(asked.arrived, Some(asked.timestamp));
        let wishes = self.wishes.clone();
        let step = self.work.spawn(async move {
            let act = async {
                let (meta, wishes, frame) = (meta?, wishes?, asked.frame);
                let (n, model) = (frame.len(), app.engine.model());
                let max_pixels = app.settings.max_pixels;
                let read = move || Draft::read(&frame, &wishes, model.as_deref(), max_pixels);
                let draft = app.read(&meta, n, read).await?;
                let samples = draft.samples;
                let observation = app.decode(&meta, samples, move || draft.decode(max_pixels));
                let observation = observation.await?;
                app.act("vla_eval", observation, meta).await
            };
            Done::Step(episode, seq, Box::new(act.await))
        });
        self.step = Some((seq, step));
        Ok(())
    }

    /// Answers with the next action of the chunk. What was computed before an emergency stop is thrown away.
    async fn give(&mut self, seq: u64) -> Result<(), Disconnected> {
        if let Err(stopped) = self.app.stop.check(self.asked) {
            self.chunk.clear();
            return self.refuse(seq, "observation", &stopped).await;
        }
        let action = self.chunk.pop_front().ok_or(Disconnected)?;
        self.app.engine.metrics().answered("vla_eval", "ok", &self.caller);
        self.send("action", Action { actions: Array::new(&action) }, seq).await
    }

    async fn refuse(&mut self, seq: u64, what: &str, error: &Error) -> Result<(), Disconnected> {
        self.app.engine.metrics().answered("vla_eval", error.code.name(), &self.caller);
        let hint = error.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
        let error = format!("{what}_failed: {}: {}{hint}", error.code.name(), error.message);
        self.send("error", Failed { error }, seq).await
    }

    async fn send<P: Serialize>(
        &mut self,
        r#type: &'static str,
        payload: P,
        seq: u64,
    ) -> Result<(), Disconnected> {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let out = Out { r#type, payload, seq, timestamp: unix.as_secs_f64() };
        let frame = rmp_serde::to_vec_named(&out).map_err(|_| Disconnected)?;
        self.socket.send_binary(frame).await
    }
}
