//! A request over HTTP: its route, headers and body, to servers of several settings. The answer is the API's, and who
//! does not show the token gets no motion.
#![no_main]

#[path = "common/stub.rs"]
mod stub;

use std::io::Read;
use std::net::Ipv4Addr;
use std::sync::mpsc::channel;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Method, Request, Uri, header};
use clap::Parser;
use libfuzzer_sys::fuzz_target;
use openvla_serve::app::{App, Connection};
use openvla_serve::engine::Engine;
use openvla_serve::options::Options;
use openvla_serve::reload::reload;
use openvla_serve::routes::routes;
use openvla_serve::tokens::Tokens;
use openvla_serve::worker;
use stub::Stub;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, watch};
use tower_service::Service;

const METHODS: [Method; 4] = [Method::POST, Method::GET, Method::HEAD, Method::OPTIONS];
const ROUTES: [&str; 13] = [
    "/act",
    "/v1/act",
    "/v1/stop",
    "/v1/release",
    "/v1/reload",
    "/v1/model",
    "/",
    "/page/events",
    "/vla-eval",
    "/config?batch=1",
    "/health",
    "/metrics",
    "/openapi.json",
];
/// What everybody may ask.
const OPEN: [&str; 3] = ["/healthz", "/readyz", "/health"];

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("a runtime"));

/// A token that no input holds: another in each process.
static TOKEN: LazyLock<String> = LazyLock::new(|| {
    let mut bytes = [0; 16];
    let mut random = std::fs::File::open("/dev/urandom").expect("random numbers");
    random.read_exact(&mut bytes).expect("random numbers");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
});

struct Server {
    app: Arc<App>,
    router: Router,
    connections: Vec<Connection>,
    /// As long as it is kept, the server does not end.
    _drain: watch::Sender<bool>,
}

impl Server {
    fn new(is_oft: bool, with_token: bool, words: &[&str]) -> Self {
        let words = [&["openvla-serve", "--session-s", "1"], words].concat();
        let settings = Options::parse_from(words).settings;
        let (engine, rules) = (Engine::new(settings.limits()), settings.rules());
        let models = Arc::new(move || anyhow::Ok(Stub { is_oft }));
        let (successors, coming) = channel();
        let reload = reload(engine.clone(), rules.clone(), Arc::clone(&models), successors);
        let of_worker = engine.clone();
        std::thread::spawn(move || worker::run(&of_worker, &rules, &*models, &coming));
        while engine.check_ready(Duration::from_secs(60)).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let slots = Arc::new(Semaphore::new(4));
        let connection = |number| {
            let slot = Arc::clone(&slots).try_acquire_owned().expect("a slot");
            Connection::new(number, Ipv4Addr::LOCALHOST.into(), engine.clone(), slot)
        };
        let connections = (0..4).map(connection).collect();
        let path = std::env::temp_dir().join(format!("openvla-fuzz-{}", std::process::id()));
        std::fs::write(&path, &*TOKEN).expect("a file");
        let tokens = Tokens::read(with_token.then_some(path.as_path()), None).expect("a token");
        std::fs::remove_file(path).expect("a file");
        let (drain, draining) = watch::channel(false);
        let app = App::new(engine, settings, Arc::new(tokens), None, reload, draining);
        Self { router: routes(Arc::clone(&app)), app, connections, _drain: drain }
    }
}

static SERVERS: LazyLock<[Server; 4]> = LazyLock::new(|| {
    let strict = ["--compat-errors", "--no-page", "--clamp", "--max-delta", "0.1"];
    [
        Server::new(false, false, &[]),
        Server::new(true, false, &["--max-pixels", "4096", "--max-age-ms", "1000"]),
        Server::new(false, false, &strict),
        Server::new(false, true, &[]),
    ]
});

fuzz_target!(|input: &[u8]| {
    let Some(([which, route, how], rest)) = input.split_first_chunk() else { return };
    let server = &SERVERS[usize::from(which % 4)];
    let (head, body) = match rest.windows(2).position(|two| two == b"\n\n") {
        Some(end) => (&rest[..end], &rest[end + 2..]),
        None => (rest, &b""[..]),
    };
    let mut uri = Uri::from_static(ROUTES[usize::from(*route) % ROUTES.len()]);
    let mut request = Request::new(Body::from(body.to_vec()));
    for line in head.split(|byte| *byte == b'\n') {
        if line.starts_with(b"/") {
            uri = Uri::try_from(line).unwrap_or(uri);
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            request.headers_mut().append(name, value);
        }
    }
    let shows = how & 0x80 != 0;
    if shows {
        let bearer = HeaderValue::try_from(format!("Bearer {}", *TOKEN)).expect("a header");
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
    }
    let path = uri.path().to_owned();
    *request.uri_mut() = uri;
    *request.method_mut() = METHODS[usize::from(how % 4)].clone();
    request.extensions_mut().insert(server.connections[usize::from(how >> 2) % 4].clone());

    server.app.stop.release();
    let (status, is_json, body) = RUNTIME.block_on(async {
        let Ok(answer) = server.router.clone().call(request).await;
        let kind = answer.headers().get(header::CONTENT_TYPE).cloned();
        let kind = kind.map(|kind| kind.as_bytes().to_owned()).unwrap_or_default();
        let status = answer.status();
        let body = match kind.starts_with(b"text/event-stream") {
            true => Default::default(), // it has no end
            false => axum::body::to_bytes(answer.into_body(), 1 << 24).await.expect("a body"),
        };
        (status, kind.starts_with(b"application/json"), body)
    });
    assert!(status != 500, "{}", String::from_utf8_lossy(&body));
    if is_json && !body.is_empty() {
        serde_json::from_slice::<serde_json::Value>(&body).expect("JSON");
    }
    if which % 4 == 3 && !shows && !OPEN.contains(&path.as_str()) {
        assert_eq!(status, 401, "{path}");
    }
});
