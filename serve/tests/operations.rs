//! What an operator relies on: who may ask, what is bounded, what is said, how it fails and ends.

mod common;

use std::io::{Read, Write};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::{Gate, PATIENCE, Server, Stub, numpy_body};
use openvla_serve::models::Files;
use openvla_serve::routes::OPENAPI;

#[test]
fn with_a_token_only_those_who_show_it_may_ask() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "correct-horse-battery\n").unwrap();
    let server = Server::start(&["--token-file", file.to_str().unwrap()]);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(server.get(path, &[]).status, 200, "probes show nothing");
    }
    for path in ["/", "/v1/model", "/metrics", "/openapi.json", "/nothing"] {
        let got = server.get(path, &[]);
        got.assert_error(401, "unauthorized");
        assert_eq!(got.headers["www-authenticate"], "Bearer");
    }
    let with = |value: &str| server.step("x", &[("authorization", value)]).status;
    assert_eq!(with("Bearer correct-horse-battery"), 200);
    assert_eq!(with("Api-Key correct-horse-battery"), 200);
    assert_eq!(with("Bearer wrong-horse-battery"), 401);
    server.post("/act", &[], numpy_body("x").as_bytes()).assert_error(401, "unauthorized");
    let page = [("authorization", "Bearer correct-horse-battery"), ("origin", "https://x.org")];
    assert_eq!(server.step("x", &page).status, 200, "a page that knows the token may");
}

#[test]
fn without_one_web_pages_may_not() {
    let server = Server::start(&[]);
    let page = [("origin", "https://example.org")];
    server.step("x", &page).assert_error(403, "forbidden_origin");
    server.get("/", &page).assert_error(403, "forbidden_origin");
}

#[test]
fn bodies_are_bounded_however_they_come() {
    let server = Server::start(&["--max-body", "1000"]);
    let large = vec![b' '; 1001];
    server.post("/act", &[], &large).assert_error(413, "payload_too_large");
    server
        .post("/v1/act", &[("content-type", "application/json")], &large)
        .assert_error(413, "payload_too_large");
    let head =
        "POST /act HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunks = format!("{head}{}0\r\n\r\n", format!("1f4\r\n{}\r\n", "x".repeat(500)).repeat(3));
    let answer = server.raw(chunks.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let lie = "POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999\r\n\r\n";
    assert!(server.raw(lie.as_bytes()).starts_with("HTTP/1.1 413"));
    let headers = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "X: x\r\n".repeat(200));
    assert!(server.raw(headers.as_bytes()).starts_with("HTTP/1.1 431"));
    assert_eq!(server.step("x", &[]).status, 200);
}

#[test]
fn who_sends_or_reads_too_slowly_is_let_go() {
    let server = Server::start(&["--read-s", "1"]);
    let begun = Instant::now();
    let half = "POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"image\":";
    let answer = server.raw(half.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("request_timeout"), "{answer}");
    server.raw(b"POST /act HTTP/1.1\r\nHo"); // returns when it is closed
    server.raw(b""); // says nothing at all
    assert!(begun.elapsed() < PATIENCE);
    let mut reader = server.connect();
    reader.set_nonblocking(true).unwrap();
    let asks = "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(200);
    let mut closed = false;
    for _ in 0..1000 {
        match reader.write(asks.as_bytes()) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                closed = true;
                break;
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    assert!(closed, "a client that never reads may not stay");
    assert_eq!(server.step("x", &[]).status, 200);
}

#[test]
fn so_many_connections_and_no_more() {
    let server = Server::start(&["--max-connections", "3"]);
    let idle: Vec<_> = (0..2).map(|_| server.connect()).collect();
    server.wait_for_metric("openvla_connections", 3.0);
    let mut more = server.connect();
    assert_eq!(more.read(&mut [0; 9]).unwrap_or(0), 0, "closed at once");
    drop(idle);
    server.wait_for_metric("openvla_connections", 1.0);
    assert_eq!(server.metric("openvla_connections_refused_total"), 1.0);
}

#[test]
fn it_is_ready_when_the_model_has_acted_and_not_before() {
    let (open, opening) = channel::<()>();
    let opening = Mutex::new(opening);
    let (gate, (send, saw)) = (Gate::default(), channel());
    let stub = Stub::new(gate.clone(), send);
    let server = Server::with(&[], gate, saw, move || {
        let _ = opening.lock().unwrap().recv();
        Ok(stub.clone())
    });
    assert_eq!(server.get("/healthz", &[]).text(), "OK\n");
    server.get("/readyz", &[]).assert_error(503, "not_ready");
    server.get("/v1/model", &[]).assert_error(503, "not_ready");
    let refused = server.step("x", &[]);
    refused.assert_error(503, "not_ready");
    assert_eq!(refused.headers["retry-after"], "1");
    drop(open);
    server.wait_for("/readyz", 200);
    assert_eq!(server.metric("openvla_ready"), 1.0);
    assert_eq!(server.step("x", &[]).status, 200);
}

#[test]
fn it_need_not_be_ready_to_end() {
    let (_open, opening) = channel::<()>();
    let opening = Mutex::new(opening);
    let open = move || -> anyhow::Result<Stub> {
        let _ = opening.lock().unwrap().recv();
        anyhow::bail!("never")
    };
    let mut server = Server::with(&[], Gate::default(), channel().1, open);
    assert_eq!(server.get("/healthz", &[]).status, 200);
    server.stop();
    server.ended().unwrap();
}

#[test]
fn a_model_that_fails_is_opened_again() {
    let server = Server::start(&[]);
    for (i, failing) in ["panic", "break", "panic"].iter().enumerate() {
        server.step(failing, &[]).assert_error(500, "model_failed");
        server.wait_for("/readyz", 200);
        assert_eq!(server.metric("openvla_restarts_total"), (i + 1) as f64);
        assert_eq!(server.step("x", &[]).status, 200);
    }
    server.step("nan", &[]).assert_error(500, "not_finite");
    assert_eq!(server.metric("openvla_restarts_total"), 3.0, "that is the motion's fault alone");
}

#[test]
fn or_the_program_ends() {
    let mut server = Server::start(&["--on-failure", "exit"]);
    server.step("panic", &[]).assert_error(500, "model_failed");
    let error = format!("{:#}", server.ended().unwrap_err());
    assert!(error.contains("as it was told"), "{error}");
}

#[test]
fn a_model_that_keeps_failing_is_given_up() {
    let mut server = Server::start(&[]);
    for _ in 0..5 {
        server.wait_for("/readyz", 200);
        server.step("panic", &[]).assert_error(500, "model_failed");
    }
    assert!(server.ended().is_err());
}

#[test]
fn a_model_that_cannot_be_opened_ends_the_program() {
    let open = || -> anyhow::Result<Stub> { anyhow::bail!("there is no such file") };
    let mut server = Server::with(&[], Gate::default(), channel().1, open);
    assert!(server.ended().unwrap_err().to_string().contains("no such file"));
    let args = ["--unnorm-key", "nothing"];
    let files = Files(common::options(&args).model);
    let mut server = Server::with(&args, Gate::default(), channel().1, files);
    assert!(server.ended().unwrap_err().to_string().contains("`nothing`"));
}

#[test]
fn a_step_that_hangs_turns_it_red_and_then_ends_it() {
    let mut server = Server::start(&["--stall-s", "1"]);
    let _stuck = server.step_beside("wait", &[("x-deadline-ms", "100")]);
    server.wait_for("/readyz", 503);
    let error = server.ended().unwrap_err().to_string();
    assert!(error.contains("hangs"), "{error}");
}

#[test]
fn what_was_accepted_is_answered_before_the_end() {
    let mut server = Server::start(&[]);
    let running = server.step_beside("wait", &[]);
    server.seen();
    let waiting: Vec<_> = (0..9).map(|_| server.step_beside("waits", &[])).collect();
    server.wait_for_metric("openvla_queue_depth", 9.0);
    server.stop();
    std::thread::sleep(Duration::from_millis(50));
    server.gate.open(1);
    for thread in waiting.into_iter().chain([running]) {
        let got = thread.join().unwrap();
        assert_eq!((got.status, got.headers["connection"].as_str()), (200, "close"));
    }
    server.ended().unwrap();
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
}

#[test]
fn the_description_names_every_route_and_every_error() {
    let api: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
    let server = Server::start(&[]);
    assert_eq!(server.get("/openapi.json", &[]).json(), api);
    let paths: Vec<&String> = api["paths"].as_object().unwrap().keys().collect();
    let known = [
        "/",
        "/act",
        "/config",
        "/health",
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/readyz",
        "/v1/act",
        "/v1/model",
        "/v1/realtime/robot/openpi",
        "/v1/release",
        "/v1/reload",
        "/v1/stop",
        "/vla-eval",
    ];
    assert_eq!(paths, known);
    let codes = api["components"]["schemas"]["Error"]["properties"]["code"]["enum"].as_array();
    let mut described: Vec<&str> =
        codes.unwrap().iter().map(|code| code.as_str().unwrap()).collect();
    let mut all: Vec<_> = openvla_serve::error::Code::ALL.iter().map(|code| code.name()).collect();
    described.sort();
    all.sort();
    assert_eq!(described, all);
    server.get("/nothing", &[]).assert_error(404, "not_found");
    server.get("/v1/act", &[]).assert_error(405, "method_not_allowed");
    server.post("/metrics", &[], b"").assert_error(405, "method_not_allowed");
}
