//! Tokens of clients: what each may do, by every protocol, and what is kept of it.

mod common;
#[path = "common/sockets.rs"]
mod sockets;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;

use common::{Server, numpy_body};
use openvla_serve::routes::OPENAPI;
use openvla_serve::tokens::Scope;
use serde_json::Value;
use sockets::{Form, Robot};

/// What a route wants of who asks.
#[derive(Clone, Copy)]
enum Wants {
    Nothing,
    AnyToken,
    Scope(Scope),
}

const ACT: Wants = Wants::Scope(Scope::Act);
const ADMIN: Wants = Wants::Scope(Scope::Admin);
const WATCH: Wants = Wants::Scope(Scope::Watch);

/// Every route, as it is asked.
const ROUTES: [(&str, &str, &str, Wants); 23] = [
    ("GET", "/healthz", "", Wants::Nothing),
    ("GET", "/readyz", "", Wants::Nothing),
    ("GET", "/health", "", Wants::Nothing),
    ("GET", "/v1/model", "", Wants::AnyToken),
    ("GET", "/config", "", Wants::AnyToken),
    ("GET", "/openapi.json", "", Wants::AnyToken),
    ("GET", "/nothing", "", Wants::AnyToken),
    ("POST", "/act", "", ACT),
    ("POST", "/act/", "", ACT),
    ("POST", "/v1/act", "", ACT),
    ("POST", "/v1/act/", "", ACT),
    ("GET", "/v1/act", "", ACT),
    ("POST", "/v1/stop", "", ACT),
    ("POST", "/v1/release", "", ACT),
    ("GET", "/", UPGRADE, ACT),
    ("GET", "/v1/realtime/robot/openpi", UPGRADE, ACT),
    ("GET", "/vla-eval", UPGRADE, ACT),
    ("POST", "/", "", ACT),
    ("GET", "/v1/reload", "", ADMIN),
    ("POST", "/v1/reload", "", ADMIN),
    ("GET", "/", "", WATCH),
    ("GET", "/page/events", "", WATCH),
    ("GET", "/metrics", "", WATCH),
];

const UPGRADE: &str = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";

/// The token of who has these scopes.
fn token(scopes: &[Scope]) -> String {
    let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
    format!("the-token-of-{}", names.join("-"))
}

/// All sets of scopes but the empty one.
fn sets() -> Vec<Vec<Scope>> {
    let has = |set: u8| move |scope: &Scope| set & (1 << *scope as u8) != 0;
    (1..8).map(|set| Scope::ALL.into_iter().filter(has(set)).collect()).collect()
}

/// A client of each set of scopes, named by its number.
fn file(dir: &Path) -> String {
    let line = |(i, scopes): (usize, Vec<Scope>)| {
        let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
        format!("client-{i}\t{} {}\n", names.join(","), token(&scopes))
    };
    let path = dir.join("clients");
    std::fs::write(&path, sets().into_iter().enumerate().map(line).collect::<String>()).unwrap();
    path.display().to_string()
}

/// The status, and the JSON of an error.
fn ask(
    server: &Server,
    (method, path, more, _): (&str, &str, &str, Wants),
    token: Option<&str>,
) -> (u16, Value) {
    let mut stream = server.connect();
    let shown = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let connection = if more.is_empty() { "close" } else { "upgrade" };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: {connection}\r\nContent-Length: 0\r\n{shown}{more}\r\n",
        server.address
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head[9..12].parse().unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    if [401, 403].contains(&status) {
        stream.read_exact(&mut body).unwrap();
    }
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

#[test]
fn every_route_is_for_its_scope_alone() {
    let dir = tempfile::tempdir().unwrap();
    let single = dir.path().join("token");
    std::fs::write(&single, "the-token-for-everything").unwrap();
    let args = ["--client-tokens", &file(dir.path()), "--token-file", single.to_str().unwrap()];
    let server = Server::start(&args);
    for route in ROUTES {
        let (method, path, _, wants) = route;
        let at = format!("{method} {path}");
        let needs_token = !matches!(wants, Wants::Nothing);
        for unknown in [None, Some("the-token-of-nobody")] {
            let (status, error) = ask(&server, route, unknown);
            assert_eq!(status == 401, needs_token, "{at}: {status}");
            assert!(!needs_token || error["code"] == "unauthorized", "{at}: {error}");
        }
        for scopes in sets() {
            let may = match wants {
                Wants::Scope(scope) => scopes.contains(&scope),
                Wants::Nothing | Wants::AnyToken => true,
            };
            let (status, error) = ask(&server, route, Some(&token(&scopes)));
            assert_eq!(![401, 403].contains(&status), may, "{at} with {scopes:?}: {status}");
            if let (Wants::Scope(scope), false) = (wants, may) {
                assert_eq!((status, &error["code"]), (403, &Value::from("missing_scope")), "{at}");
                let message = error["message"].as_str().unwrap();
                assert!(message.contains(&format!("`{}`", scope.name())), "{at}: {message}");
                assert!(message.contains("`client-"), "{at}: {message}");
            }
        }
        let (status, _) = ask(&server, route, Some("the-token-for-everything"));
        assert!(![401, 403].contains(&status), "{at}: {status}");
    }
    let known: BTreeSet<&str> = ROUTES.iter().map(|(_, path, _, _)| *path).collect();
    let api: Value = serde_json::from_str(OPENAPI).unwrap();
    for path in api["paths"].as_object().unwrap().keys() {
        assert!(known.contains(path.as_str()), "{path} is not among the routes above");
    }
}

#[test]
fn a_robot_s_token_moves_it_by_every_protocol_and_is_named_in_what_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("audit.jsonl");
    let args = ["--client-tokens", &file(dir.path()), "--audit-log", log.to_str().unwrap()];
    let server = Server::start(&args);
    let (act, watch) = (token(&[Scope::Act]), token(&[Scope::Watch]));
    let bearer = |token: &str| format!("Bearer {token}");
    let (robot, wall) = (bearer(&act), bearer(&watch));
    assert_eq!(server.step("x", &[("authorization", &robot)]).status, 200);
    let body = numpy_body("x");
    assert_eq!(server.post("/act", &[("authorization", &robot)], body.as_bytes()).status, 200);
    server.step("x", &[("authorization", &wall)]).assert_error(403, "missing_scope");
    for form in [Form::OpenPi, Form::VlaEval] {
        assert!(Robot::connect(&server, form, Some(&act)).unwrap().step("x").is_ok());
        assert_eq!(Robot::connect(&server, form, Some(&watch)).err(), Some(403));
        assert_eq!(Robot::connect(&server, form, None).err(), Some(401));
    }
    assert_eq!(server.post("/v1/stop", &[("authorization", &robot)], b"").status, 200);
    let metrics = server.get("/metrics", &[("authorization", &wall)]);
    for line in [
        r#"openvla_token_requests_total{token="client-0",outcome="ok"} 5"#,
        r#"openvla_token_requests_total{token="client-1",outcome="missing_scope"} 3"#,
    ] {
        assert!(metrics.text().contains(line), "{line} is missing in\n{}", metrics.text());
    }
    drop(server);
    let lines = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 5, "four motions and a stop");
    assert!(lines.iter().all(|line| line["token"] == "client-0"), "{lines:?}");
}

/// Also over connections that are open.
#[test]
fn what_is_taken_back_is_of_no_use_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path());
    let server = Server::start(&["--client-tokens", &path]);
    let (act, watch) = (token(&[Scope::Act]), token(&[Scope::Watch]));
    let connect = |form| Robot::connect(&server, form, Some(&act)).unwrap();
    let mut robots = [Form::OpenPi, Form::VlaEval].map(connect);
    for robot in &mut robots {
        assert!(robot.step("x").is_ok());
    }
    let mut events = server.connect();
    let host = server.address;
    write!(
        events,
        "GET /page/events HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {watch}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    assert!(events.read(&mut [0; 64]).unwrap() > 0);
    std::fs::write(&path, format!("arm act {act}\nsomebody")).unwrap();
    assert!(server.tokens.reread().is_err(), "the second line is wrong");
    for robot in &mut robots {
        assert!(robot.step("x").is_ok(), "the file is as it was");
    }
    std::fs::write(&path, format!("arm watch {act}\nother act another-token-than-before")).unwrap();
    server.tokens.reread().unwrap();
    for robot in &mut robots {
        let refused = robot.step("x").unwrap_err();
        assert!(refused.contains("missing_scope") && refused.contains("`act`"), "{refused}");
    }
    std::fs::write(&path, "other act another-token-than-before").unwrap();
    server.tokens.reread().unwrap();
    for robot in &mut robots {
        assert!(robot.step("x").unwrap_err().contains("unauthorized"));
    }
    let _ = events.read_to_end(&mut Vec::new()).unwrap(); // the stream ends
    assert_eq!(
        server.step("x", &[("authorization", "Bearer another-token-than-before")]).status,
        200
    );
}
