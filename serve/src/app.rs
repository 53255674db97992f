//! The state that all requests share, and the steps of a request before the engine: metadata, body, image.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use openvla::cli::Threads;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::{timeout, timeout_at};

use crate::audit::{Audit, Entry};
use crate::auth::{check_origin, check_page};
use crate::engine::{Engine, late};
use crate::error::{Code, Error};
use crate::meta::{Client, Meta};
use crate::observation::{Answer, Headers, Observation};
use crate::options::Settings;
use crate::rate::{Rate, Who};
use crate::reload::Reload;
use crate::stop::Stop;
use crate::tokens::{Caller, Tokens};
use crate::turns::Turns;

/// The state that all requests share.
pub struct App {
    /// Queue and model.
    pub engine: Engine,
    /// The settings of the command line.
    pub settings: Settings,
    /// Whether the server is shutting down.
    pub draining: watch::Receiver<bool>,
    /// The emergency stop.
    pub stop: Stop,
    /// Who may do what.
    pub tokens: Arc<Tokens>,
    /// Puts another model in the place of what is served.
    pub reload: Arc<Reload>,
    /// Whether nobody does so now.
    pub reloading: Arc<Semaphore>,
    audit: Option<Arc<Audit>>,
    /// How often each client may ask, if there is a limit.
    rate: Option<Rate>,
    /// Limits how many bodies are decoded at a time: one for each core, since they may be large.
    bodies: Turns,
    /// Limits how many image files are decoded at a time: one for each core. Bodies are read meanwhile.
    pictures: Turns,
}

/// When a request's headers were read.
#[derive(Clone, Copy)]
pub struct Arrived(pub Instant);

/// A request's connection: its number, and its slot among those that may be open, which an upgraded
/// connection keeps.
#[derive(Clone)]
pub struct Connection {
    /// Counts from 0.
    pub number: u64,
    /// Where it comes from.
    pub address: IpAddr,
    _slot: Arc<Slot>,
}

/// A slot among the connections that may be open; counted as long as it is taken.
struct Slot {
    engine: Engine,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.engine.metrics().connections.dec();
    }
}

impl Connection {
    /// A connection that was just accepted, with a permit to be open.
    pub fn new(number: u64, address: IpAddr, engine: Engine, permit: OwnedSemaphorePermit) -> Self {
        engine.metrics().connections.inc();
        Self { number, address, _slot: Arc::new(Slot { engine, _permit: permit }) }
    }
}

impl App {
    /// The state of a server that has not accepted anything yet.
    pub fn new(
        engine: Engine,
        settings: Settings,
        tokens: Arc<Tokens>,
        audit: Option<Arc<Audit>>,
        reload: Arc<Reload>,
        draining: watch::Receiver<bool>,
    ) -> Arc<Self> {
        let cores = Threads::default().count();
        let [bodies, pictures] = [(); 2].map(|()| Turns::new(cores, settings.memory()));
        let stop = Stop::new(engine.metrics().stopped.clone());
        let rate = settings.rate.map(Rate::new);
        let reloading = Arc::new(Semaphore::new(1));
        Arc::new(Self {
            engine,
            settings,
            draining,
            stop,
            tokens,
            reload,
            reloading,
            audit,
            rate,
            bodies,
            pictures,
        })
    }

    /// The metadata of a request, from its headers.
    ///
    /// # Errors
    /// [`Code::Stopped`], [`Code::BadRequest`], [`Code::ClientNeeded`].
    pub fn meta(&self, request: &Request) -> Result<Meta, Error> {
        let Arrived(arrived) = *extension(request);
        self.stop.check(arrived)?; // before its body is read
        let Connection { number, .. } = *extension(request);
        let headers = Headers::of(request.headers())?;
        let meta = headers.meta(arrived, number, self.settings.deadline())?;
        let meta = Meta { caller: extension::<Caller>(request).clone(), ..meta };
        if self.settings.max_delta.is_some() && matches!(meta.client, Client::Connection(_)) {
            let message = "--max-delta compares a motion with the client's last one";
            let hint = "name the robot in the header X-Client-Id";
            return Err(Error::new(Code::ClientNeeded, message).hint(hint));
        }
        Ok(meta)
    }

    /// A request's whole body.
    ///
    /// # Errors
    /// [`Code::PayloadTooLarge`], [`Code::RequestTimeout`], [`Code::BadRequest`].
    pub async fn body(&self, mut request: Request) -> Result<Bytes, Error> {
        let (limit, patience) = (self.settings.max_body, self.settings.patience());
        let too_large = || {
            let message = format!("the body is larger than {limit} bytes");
            Error::new(Code::PayloadTooLarge, message).hint("smaller pictures, or --max-body")
        };
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        DefaultBodyLimit::max(limit).apply(&mut request);
        match timeout(patience, Bytes::from_request(request, &())).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(why)) if why.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large()),
            Ok(Err(why)) => Err(Error::bad_request(format!("the body broke off: {why}"))),
            Err(_) => {
                let message = format!("the body did not come within {patience:.0?}");
                Err(Error::new(Code::RequestTimeout, message))
            }
        }
    }

    /// Reads a body of `n` bytes beside the connections' threads, when it is the client's turn.
    ///
    /// # Errors
    /// Those of `work`, and [`Code::DeadlineExceeded`].
    pub async fn read<T: Send + 'static>(
        &self,
        meta: &Meta,
        n: usize,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.take_turn(&self.bodies, meta, n as u64, work).await
    }

    /// Decodes a picture file of so many samples beside the connections' threads, when it is the
    /// client's turn.
    ///
    /// # Errors
    /// Those of `work`, and [`Code::DeadlineExceeded`].
    pub async fn decode<T: Send + 'static>(
        &self,
        meta: &Meta,
        samples: u64,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.take_turn(&self.pictures, meta, samples, work).await
    }

    /// Waits for the motion, unless there is an emergency stop, and keeps what comes of it in the audit log. `protocol` is
    /// the metrics' name for it.
    ///
    /// # Errors
    /// [`Code::Stopped`], [`Code::DeadlineExceeded`], and those of [`Engine::act`].
    pub async fn act(
        &self,
        protocol: &'static str,
        observation: Observation,
        meta: Meta,
    ) -> Result<Answer, Error> {
        let arrived = meta.arrived;
        let asked = |audit| (audit, Entry::asked(protocol, &observation, &meta));
        let entry = self.audit.as_ref().map(asked);
        let answer = self.stop.unless(arrived, self.step(observation, meta)).await;
        if let Some((audit, entry)) = entry {
            audit.answered(entry, arrived.elapsed(), &answer);
        }
        answer
    }

    /// Keeps something in the audit log that is not a motion.
    pub fn note(&self, entry: Entry) {
        if let Some(audit) = &self.audit {
            audit.add(entry);
        }
    }

    /// Makes the picture the square that the model takes, when it is the client's turn, and asks for the
    /// motion. The model's own thread would do that for all robots, one after the other.
    async fn step(&self, observation: Observation, meta: Meta) -> Result<Answer, Error> {
        let model = self.engine.model();
        let Some(preprocess) = model.and_then(|model| model.preprocess.clone()) else {
            return self.engine.act(observation, meta).await;
        };
        let images = [&observation.image].into_iter().chain(&observation.wrists);
        let samples = images.map(|image| image.as_raw().len() as u64).sum();
        let square = move || {
            let image = preprocess.square(&observation.image)?;
            let wrists = observation.wrists.iter().map(|image| preprocess.square(image));
            let wrists = wrists.collect::<Result<_, _>>()?;
            Ok(Observation { image, wrists, ..observation })
        };
        let observation = self.decode(&meta, samples, square).await?;
        self.engine.act(observation, meta).await
    }

    async fn take_turn<T: Send + 'static>(
        &self,
        turns: &Turns,
        meta: &Meta,
        cost: u64,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let decoded = async {
            let turn = turns.turn(&meta.client, cost).await;
            let work = move || {
                let _turn = turn; // kept until the work ends, even if nobody waits for it any more
                work()
            };
            spawn_blocking(work).await.unwrap_or_else(|_| Err(Error::bad_image("decoding failed")))
        };
        let decoded = timeout_at(meta.deadline.into(), decoded).await;
        let decoded = decoded.unwrap_or_else(|_| Err(late(meta)));
        if decoded.as_ref().is_err_and(|error| error.code == Code::BadImage) {
            self.bodies.refuse(&meta.client);
            self.pictures.refuse(&meta.client);
        }
        decoded
    }

    /// Who asks: by its token, or anybody where a server has none and no other site's page asks. What they may do is
    /// [`Tokens::permit`]'s.
    ///
    /// # Errors
    /// [`Code::Unauthorized`], [`Code::ForbiddenOrigin`].
    pub fn admit(&self, headers: &HeaderMap, path: &str) -> Result<Caller, Error> {
        if ["/healthz", "/readyz", "/health"].contains(&path) {
            return Ok(Caller::default());
        }
        if self.tokens.is_empty() {
            return check_origin(headers).map(|()| Caller::default());
        }
        self.tokens.check(headers)
    }

    /// Counts a request for a motion, by who asks: the name of its token, else its own, else its address.
    ///
    /// # Errors
    /// [`Code::RateLimited`].
    pub fn limit(
        &self,
        caller: &Caller,
        client: Option<&str>,
        connection: &Connection,
    ) -> Result<(), Error> {
        let Some(rate) = &self.rate else { return Ok(()) };
        let who = match (caller.name(), client) {
            (Some(token), _) => Who::Token(token.to_owned()),
            (None, Some(client)) => Who::Client(client.to_owned()),
            (None, None) => Who::Address(connection.address),
        };
        rate.take(who, Instant::now()).map_err(|wait| {
            let message = format!("more than --rate allows: the next may come in {wait:.0?}");
            let hint = "ask again when the last answer is there, or raise --rate";
            let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
            Error::new(Code::RateLimited, message).hint(hint).retry_after(seconds)
        })
    }

    /// Whether the page may show what the robots see, given that the request was [admitted](App::admit).
    ///
    /// # Errors
    /// [`Code::ForbiddenOrigin`].
    pub fn admit_page(&self, headers: &HeaderMap) -> Result<(), Error> {
        if self.tokens.is_empty() { check_page(headers) } else { Ok(()) }
    }
}

/// What the connection and `guard` add to every request.
pub fn extension<T: Clone + Send + Sync + 'static>(request: &Request) -> &T {
    request.extensions().get().expect("every request has it")
}
