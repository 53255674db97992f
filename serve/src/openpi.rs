//! openpi's protocol: a websocket at `/`, and at the path where vLLM has it, one msgpack frame each way for each step.
//!
//! The server speaks first and says what it serves. A text frame is an error. Observations are maps
//! with an image and a `prompt`; who sends the next one before the answer to the last gets both, or
//! word that the newer one superseded the older, or came before it: frames are decoded side by side.
//!
//! ref: openpi `WebsocketPolicyServer`, `openpi_client.msgpack_numpy`

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{WebSocketUpgrade, close_code};
use axum::extract::{Extension, State};
use axum::response::Response;
use serde::Serialize;
use tokio::task::{JoinError, JoinSet};
use tokio::time::interval_at;

use crate::app::{App, Connection};
use crate::description::Description;
use crate::error::Error;
use crate::field::Field;
use crate::message::{self, Schema};
use crate::meta::Meta;
use crate::numpy::{Convention, Msgpack, Ndarray};
use crate::observation::{Answer, Draft, Headers, Observation};
use crate::safety;
use crate::tokens::{Caller, Scope};
use crate::websocket::{self, Disconnected, Frame, Socket};

/// Observations of one connection that may be under way: one at the model, one in the queue, and a newer one.
const MAX_PENDING: usize = 4;

/// How often a silent client is asked whether it is there. It is gone if it does not say so until
/// the next time.
const PING: Duration = Duration::from_secs(20);

/// What a client of an OpenVLA-OFT model sends.
static OFT: Schema = Schema {
    wrists: true,
    options: &[
        "observation/state",
        "state",
        "n_actions",
        "unnorm_key",
        "client_id",
        "epoch",
        "seq",
        "timestamp",
        "deadline_ms",
    ],
    hint: "a map with `observation/image`, images with `wrist` in their names, `observation/state` and `prompt`, as \
           openpi_client.msgpack_numpy packs it",
    ..OPENVLA
};

static SCHEMA: Schema = OPENVLA;

/// What a client of an OpenVLA model sends. Other keys, such as `observation/state`, are not looked at.
const OPENVLA: Schema = Schema {
    image: &["observation/image", "image", "full_image", "observation/exterior_image_1_left"],
    wrists: false,
    cameras: true,
    instruction: &["prompt", "instruction"],
    options: &["unnorm_key", "client_id", "epoch", "seq", "timestamp", "deadline_ms"],
    hint: "a map with `observation/image` or `image`, an array of uint8, or of \
           float32 or float64 from 0 to 1, as openpi_client.msgpack_numpy packs it, and `prompt`, which is text",
};

/// What it gets. Only `actions` is an array, since openpi's broker cuts arrays into steps.
#[derive(Serialize)]
struct Reply<'a> {
    /// `[n_action, n]`
    actions: Msgpack<'static>,
    tokens: &'a [u32],
    unnorm_key: &'a str,
    ranges: &'a [[f64; 2]],
    all_actions: bool,
    warning: Option<&'static str>,
    safety: &'a safety::Report,
    draft: &'a Draft,
    fingerprint: &'a str,
    seq: Option<u64>,
    server_timing: ServerTiming,
}

#[derive(Serialize)]
struct ServerTiming {
    infer_ms: f64,
    queue_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prev_total_ms: Option<f64>,
}

/// `GET /`, `GET /v1/realtime/robot/openpi`.
pub async fn upgrade(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Connection>,
    Extension(caller): Extension<Caller>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let at = Arc::clone(&app);
    websocket::accept(&at, upgrade, "openpi", async move |socket| {
        let (steps, begun) = (JoinSet::new(), BTreeMap::new());
        let talk = Talk { app, connection, caller, socket, steps, begun, next: 0, last: None };
        talk.run().await;
    })
}

struct Talk {
    app: Arc<App>,
    connection: Connection,
    caller: Caller,
    socket: Socket,
    /// Dropped with the connection, and with it the slots in the queue.
    steps: JoinSet<(u64, Result<Motion, Error>)>,
    /// Observations by number, and their motions where they have one: a motion is sent after those of all
    /// earlier observations.
    begun: BTreeMap<u64, Option<Motion>>,
    /// The next observation's number.
    next: u64,
    /// Milliseconds between the last observation and its answer.
    last: Option<f64>,
}

/// An answer, and when its observation came.
type Motion = (Instant, Answer);

impl Talk {
    async fn run(mut self) {
        // An error means that the client is gone, which is not our concern.
        if self.greet().await.is_ok() {
            let _ = self.converse().await;
        }
    }

    async fn greet(&mut self) -> Result<(), Disconnected> {
        let model = self.app.engine.model().ok_or(Disconnected)?;
        let description = Description::new(&self.app, &model);
        let frame = rmp_serde::to_vec_named(&description).map_err(|_| Disconnected)?;
        self.socket.send_binary(frame).await
    }

    async fn converse(&mut self) -> Result<(), Disconnected> {
        let mut draining = self.app.draining.clone();
        let (mut ping, mut heard) = (interval_at((Instant::now() + PING).into(), PING), true);
        loop {
            let ending = *draining.borrow();
            if ending && self.steps.is_empty() {
                return self.socket.close(close_code::AWAY, "the server is going away").await;
            }
            tokio::select! {
                frame = self.socket.next(), if self.steps.len() < MAX_PENDING => {
                    heard = true;
                    match frame? {
                        Frame::Binary(frame) => self.begin(frame),
                        Frame::Text => {
                            let wrong = "a text frame came; binary frames of msgpack are wanted";
                            self.refuse(&Error::bad_request(wrong)).await?;
                        }
                        Frame::Alive => {}
                    }
                }
                Some(done) = self.steps.join_next() => self.done(done).await?,
                _ = ping.tick() => {
                    if !heard && self.steps.is_empty() {
                        return Err(Disconnected);
                    }
                    heard = false;
                    self.socket.ping().await?;
                }
                _ = draining.changed(), if !ending => {}
            }
        }
    }

    fn begin(&mut self, frame: Bytes) {
        let (app, connection) = (Arc::clone(&self.app), self.connection.clone());
        let caller = self.caller.clone();
        let (arrived, number) = (Instant::now(), self.next);
        self.next += 1;
        self.begun.insert(number, None);
        self.steps.spawn(async move {
            let at = Arc::clone(&app);
            let answer = async {
                app.tokens.permit(&caller, Scope::Act)?; // it may have been taken back
                let is_known = caller.name().is_some();
                if is_known {
                    app.limit(&caller, None, &connection)?; // before it is decoded
                }
                let meta = |headers: Headers| -> Result<Meta, Error> {
                    let meta = headers.meta(arrived, connection.number, app.settings.deadline())?;
                    Ok(Meta { caller: caller.clone(), ..meta })
                };
                let n = frame.len();
                // Whose turn it is must be known before the frame is decoded; what is wrong with it
                // is said then.
                let read = move || {
                    let step = message::Message::from_msgpack(&SCHEMA, &frame);
                    let headers = step.and_then(|mut step| headers(&mut step)).unwrap_or_default();
                    Ok((headers, frame))
                };
                let (headers, frame) = app.read(&meta(Headers::default())?, n, read).await?;
                let turn = meta(headers)?;
                if !is_known {
                    app.limit(&caller, turn.client.name(), &connection)?;
                }
                let decoded = app.read(&turn, n, move || {
                    let is_oft = at.engine.model().is_some_and(|model| model.oft.is_some());
                    observation(&frame, is_oft, at.settings.max_pixels)
                });
                let (observation, headers) = decoded.await?;
                let meta = meta(headers)?;
                app.act("openpi", observation, meta).await
            };
            (number, answer.await.map(|answer| (arrived, answer)))
        });
    }

    /// Sends an error at once, and every motion whose turn it is.
    async fn done(
        &mut self,
        done: Result<(u64, Result<Motion, Error>), JoinError>,
    ) -> Result<(), Disconnected> {
        let (number, motion) = done.map_err(|_| Disconnected)?;
        match motion {
            Ok(motion) => {
                self.begun.insert(number, Some(motion));
            }
            Err(error) => {
                self.begun.remove(&number);
                self.refuse(&error).await?;
            }
        }
        while let Some(first) = self.begun.first_entry().filter(|first| first.get().is_some()) {
            let Some((arrived, answer)) = first.remove() else { continue };
            match self.app.stop.check(arrived) {
                Ok(()) => self.answer(arrived, &answer).await?,
                Err(stopped) => self.refuse(&stopped).await?, // it has waited for an earlier one
            }
        }
        Ok(())
    }

    async fn answer(&mut self, arrived: Instant, answer: &Answer) -> Result<(), Disconnected> {
        let shape = vec![answer.actions.len(), answer.action.len()];
        let times = answer.timing_ms;
        let reply = Reply {
            actions: Msgpack(Ndarray::of_f64(&answer.actions.concat(), shape)),
            tokens: &answer.tokens,
            unnorm_key: &answer.unnorm_key,
            ranges: &answer.ranges,
            all_actions: answer.all_actions,
            warning: answer.warning,
            safety: &answer.safety,
            draft: &answer.draft,
            fingerprint: &answer.fingerprint,
            seq: answer.seq,
            server_timing: ServerTiming {
                infer_ms: times.step,
                queue_ms: times.queue,
                prev_total_ms: self.last,
            },
        };
        let frame = rmp_serde::to_vec_named(&reply).map_err(|_| Disconnected)?;
        self.app.engine.metrics().answered("openpi", "ok", &self.caller);
        self.socket.send_binary(frame).await?;
        self.last = Some(arrived.elapsed().as_secs_f64() * 1e3);
        Ok(())
    }

    /// An error ends the conversation only where the reference's would.
    async fn refuse(&mut self, error: &Error) -> Result<(), Disconnected> {
        self.app.engine.metrics().answered("openpi", error.code.name(), &self.caller);
        let text = serde_json::to_string(error).map_err(|_| Disconnected)?;
        self.socket.send_text(text).await?;
        if self.app.settings.compat_errors {
            self.socket.close(close_code::ERROR, "Internal server error").await
        } else {
            Ok(())
        }
    }
}

/// What the message says about itself.
fn headers(step: &mut message::Message<'_>) -> Result<Headers, Error> {
    Ok(Headers {
        client_id: step.option("client_id", Field::text)?,
        epoch: step.option("epoch", Field::integer)?,
        seq: step.option("seq", Field::integer)?,
        timestamp: step.option("timestamp", Field::float)?,
        deadline_ms: step.option("deadline_ms", Field::integer)?,
    })
}

/// Reads a frame, for an OpenVLA-OFT model or another: an observation, and what the frame says about itself.
///
/// # Errors
/// [`crate::error::Code::BadRequest`], [`crate::error::Code::BadImage`], and those of [`Observation::new`].
pub fn observation(
    frame: &[u8],
    is_oft: bool,
    max_pixels: usize,
) -> Result<(Observation, Headers), Error> {
    let schema = if is_oft { &OFT } else { &SCHEMA };
    let mut step = message::Message::from_msgpack(schema, frame)?;
    let image = |(name, field): message::Named<'_>| {
        let array = field.array(&name).map_err(|error| error.hint(schema.hint))?;
        array.image(Convention::OpenPi, max_pixels)
    };
    let (first, wrists) = (step.image()?, step.wrists());
    let instruction = step.instruction()?;
    let headers = headers(&mut step)?;
    let unnorm_key = step.option("unnorm_key", Field::text)?;
    let state = step.option("observation/state", Field::numbers)?;
    let state =
        state.map_or_else(|| step.option("state", Field::numbers), |state| Ok(Some(state)))?;
    let n_actions = step.option("n_actions", Field::integer)?;
    let observation = Observation::new(image(first)?, instruction, unnorm_key)?;
    let wrists = wrists.into_iter().map(image).collect::<Result<_, _>>()?;
    Ok((Observation { wrists, state, n_actions, ..observation }, headers))
}
