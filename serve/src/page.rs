//! The page at `/`: one file, and a stream of server-sent events that it listens to.
//!
//! - The file is the same for everyone and holds no data, so who shows no token gets it too, as what asks for one: the
//!   page keeps the token in its tab and sends it as all clients do, in a header. It is in no address, so in no log, no
//!   history and no `Referer`.
//! - Its policy (CSP) lets it load nothing, run its own script alone, and talk to this server alone.
//! - Nothing is computed unless somebody watches, and then a few times a second however fast the robots are.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::Body;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::app::{App, Connection};
use crate::error::{Code, Error, Outcome};
use crate::live::{Event, Last, MAX_WATCHERS, Robot};
use crate::openpi;
use crate::policy::ModelInfo;
use crate::tokens::{Caller, Scope};
use crate::view::Views;

/// Where the page listens.
pub const EVENTS: &str = "/page/events";

/// How often new steps are looked for while somebody watches.
const TICK: Duration = Duration::from_millis(200);

/// How often the server's numbers are shown even if they are the same, so that who is gone is noticed.
const BEAT: Duration = Duration::from_secs(1);

const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// The page, and the policy that it is under.
struct Page {
    html: String,
    policy: HeaderValue,
}

static PAGE: LazyLock<Page> = LazyLock::new(|| {
    let html = include_str!("page/page.html");
    let html = html.replace("/* page.css */", STYLE).replace("/* page.js */", SCRIPT);
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
    let policy = format!(
        "default-src 'none'; script-src {}; style-src {}; img-src data:; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
        hash(SCRIPT),
        hash(STYLE)
    );
    Page { html, policy: HeaderValue::from_str(&policy).expect("it is ASCII") }
});

/// `GET /`: openpi's websocket for who asks for one, else the page.
pub async fn root(
    state: State<Arc<App>>,
    connection: Extension<Connection>,
    caller: Extension<Caller>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    request: Request,
) -> Response {
    if is_page(&state.0, &request) {
        return page(StatusCode::OK);
    }
    openpi::upgrade(state, connection, caller, upgrade).await
}

/// The page for a browser that shows no token: it asks for one. Nobody else takes a page for an answer.
pub fn sign_in(app: &App, request: &Request) -> Option<Response> {
    let accepts = request.headers().get(header::ACCEPT).and_then(|accepts| accepts.to_str().ok());
    let is_browser = accepts.is_some_and(|types| types.contains("text/html"));
    (request.uri().path() == "/" && is_page(app, request) && is_browser).then(|| {
        let mut response = page(StatusCode::UNAUTHORIZED);
        let bearer = HeaderValue::from_static("Bearer");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
        response.extensions_mut().insert(Outcome(Code::Unauthorized));
        response
    })
}

/// Whether a request for `/` is for the page.
pub fn is_page(app: &App, request: &Request) -> bool {
    let is_read = [Method::GET, Method::HEAD].contains(request.method());
    !app.settings.no_page && is_read && !request.headers().contains_key(header::UPGRADE)
}

fn page(status: StatusCode) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, PAGE.policy.clone()),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (status, headers, PAGE.html.as_str()).into_response()
}

/// `GET /page/events`: server-sent events, `server` and `robot`, each with a JSON object.
pub async fn events(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
) -> Response {
    if let Err(error) = app.admit_page(&headers) {
        return error.into_response();
    }
    let Some((seen, events)) = app.engine.live().watch() else {
        let message = format!("{MAX_WATCHERS} pages are open already");
        return Error::new(Code::QueueFull, message).retry_after(10).into_response();
    };
    let watcher = Watcher { app, caller, seen: seen.into(), events };
    let stream = stream::unfold(watcher, async |mut watcher| {
        let event = watcher.next().await?;
        Some((Ok::<_, Infallible>(event), watcher))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

/// Somebody who watches.
struct Watcher {
    app: Arc<App>,
    caller: Caller,
    /// What was there to see when they came.
    seen: VecDeque<Event>,
    events: Receiver<Event>,
}

impl Watcher {
    /// The next event, until the server drains, or their token is taken back.
    async fn next(&mut self) -> Option<Event> {
        let mut draining = self.app.draining.clone();
        let event = match self.seen.pop_front() {
            Some(event) => event,
            None => loop {
                tokio::select! {
                    event = self.events.recv() => match event {
                        Ok(event) => break event,
                        Err(RecvError::Lagged(_)) => {} // what is newer is still there
                        Err(RecvError::Closed) => return None,
                    },
                    _ = draining.wait_for(|draining| *draining) => return None,
                }
            },
        };
        self.app.tokens.permit(&self.caller, Scope::Watch).ok()?;
        Some(event)
    }
}

/// The server's numbers, as the page shows them.
#[derive(Debug, PartialEq, Serialize)]
struct Server {
    model: Option<String>,
    /// Why no requests are taken, if none are.
    why: Option<String>,
    waiting: i64,
    superseded: u64,
    dropped: u64,
    connections: i64,
    restarts: u64,
    robots: Vec<Robot>,
}

impl Server {
    fn of(app: &App) -> Self {
        let metrics = app.engine.metrics();
        let ready = app.engine.check_ready(app.settings.stall());
        let ready = app.stop.check(std::time::Instant::now()).and(ready);
        Self {
            model: app.engine.model().map(|model| model.name.clone()),
            why: ready.err().map(|error| error.message),
            waiting: metrics.waiting.get(),
            superseded: metrics.superseded.get(),
            dropped: metrics.dropped.get(),
            connections: metrics.connections.get(),
            restarts: metrics.restarts.get(),
            robots: app.engine.live().robots(),
        }
    }
}

/// Makes events of new steps while somebody watches, until the server drains.
pub async fn run(app: Arc<App>) {
    let mut draining = app.draining.clone();
    tokio::select! {
        _ = draining.wait_for(|draining| *draining) => {}
        () = show(&app) => {}
    }
}

async fn show(app: &App) {
    let live = app.engine.live();
    let (mut views, mut number) = (Views::default(), 0);
    let mut last: Option<(Server, Instant)> = None;
    loop {
        if live.watchers() == 0 {
            live.watched().await;
            (views, last) = (Views::default(), None); // what is in them is old
        }
        let server = Server::of(app);
        if !last.as_ref().is_some_and(|(shown, at)| *shown == server && at.elapsed() < BEAT) {
            live.show_server(&server.robots, event("server", &server));
            last = Some((server, Instant::now()));
        }
        let (newest, steps) = live.newer(number);
        if let Some(model) = app.engine.model().filter(|_| !steps.is_empty()) {
            number = newest;
            let robots = live.robots();
            let drawn = spawn_blocking(move || {
                views.keep(&robots);
                let events = draw(&mut views, &model, &steps);
                (views, events)
            });
            let events;
            (views, events) = drawn.await.unwrap_or_default(); // a panic has been logged
            events.into_iter().for_each(|(robot, event)| live.show(robot, event));
        }
        sleep(TICK).await;
    }
}

fn draw(views: &mut Views, model: &ModelInfo, steps: &[Last]) -> Vec<(Robot, Event)> {
    let draw = |last| match views.view(model, last) {
        Ok(view) => Some((last.step.robot.clone(), event("robot", &view))),
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "the page cannot show a step");
            None
        }
    };
    steps.iter().filter_map(draw).collect()
}

fn event(name: &str, data: &impl Serialize) -> Event {
    let json = serde_json::to_string(data).expect("strings and numbers");
    format!("event: {name}\ndata: {json}\n\n").into()
}
