//! Rate limits: who asks too often is told so, by every protocol, and nobody else is.

mod common;
#[path = "common/sockets.rs"]
mod sockets;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Server, numpy_body};
use sockets::{Form, Robot};

const LIMITED: (u16, &str) = (429, "rate_limited");

/// One motion, and the next in 100 seconds.
const SLOW: [&str; 2] = ["--rate", "0.01"];

#[test]
fn over_the_rate_every_protocol_says_so_and_goes_on() {
    let server = Server::start(&SLOW);
    let arm = [("x-client-id", "arm")];
    assert_eq!(server.step("x", &arm).status, 200);
    let refused = server.step("x", &arm);
    let error = refused.assert_error(LIMITED.0, LIMITED.1);
    assert!(error["hint"].as_str().unwrap().contains("--rate"), "{error}");
    let seconds: u64 = refused.headers["retry-after"].parse().unwrap();
    assert!((1..=100).contains(&seconds), "{seconds}");
    let body = numpy_body("x");
    server.post("/act", &arm, body.as_bytes()).assert_error(LIMITED.0, LIMITED.1);
    assert_eq!(server.post("/act", &[("x-client-id", "leg")], body.as_bytes()).status, 200);
    // One bucket for all that have neither a token nor a name, of this machine.
    let mut vla_eval = Robot::connect(&server, Form::VlaEval, None).unwrap();
    assert!(vla_eval.step("x").is_ok());
    for _ in 0..2 {
        let refused = vla_eval.step("x").unwrap_err();
        assert!(refused.starts_with("observation_failed: rate_limited: "), "{refused}");
    }
    server.step("x", &[]).assert_error(LIMITED.0, LIMITED.1);
    let mut openpi = Robot::connect(&server, Form::OpenPi, None).unwrap();
    assert!(openpi.step("x").unwrap_err().starts_with("rate_limited: "));
    for (name, is_first) in [("hand", true), ("hand", false), ("arm", false), ("foot", true)] {
        let step = openpi.step_of(Some(&[7; 12]), "x", Some(name));
        assert_eq!(step.is_ok(), is_first, "{name}: {step:?}");
    }
    // What is not a motion is not limited.
    for _ in 0..3 {
        assert_eq!(server.post("/v1/stop", &arm, b"").status, 200);
        assert_eq!(server.post("/v1/release", &arm, b"").status, 200);
        assert_eq!(server.get("/v1/model", &arm).status, 200);
    }
    for (form, n) in [("plain", 2.0), ("act", 1.0), ("openpi", 3.0), ("vla_eval", 2.0)] {
        let name = format!("openvla_requests_total{{form=\"{form}\",outcome=\"rate_limited\"}}");
        assert_eq!(server.metric(&name), n, "{name}");
    }
}

#[test]
fn a_token_s_robots_share_its_rate_whatever_they_call_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("clients");
    let tokens = "arm act the-token-of-the-arm\nleg act,watch the-token-of-the-leg\n";
    std::fs::write(&path, tokens).unwrap();
    let args = [&SLOW[..], &["--client-tokens", path.to_str().unwrap()]].concat();
    let server = Server::start(&args);
    let as_arm = |name: &str| {
        let token = ("authorization", "Bearer the-token-of-the-arm");
        server.step("x", &[token, ("x-client-id", name)])
    };
    assert_eq!(as_arm("a").status, 200);
    as_arm("b").assert_error(LIMITED.0, LIMITED.1);
    for form in [Form::OpenPi, Form::VlaEval] {
        let mut robot = Robot::connect(&server, form, Some("the-token-of-the-arm")).unwrap();
        let refused = robot.step_of(Some(&[7; 12]), "x", Some("c")).unwrap_err();
        assert!(refused.contains("rate_limited"), "{refused}");
    }
    let leg = [("authorization", "Bearer the-token-of-the-leg")];
    assert_eq!(server.step("x", &leg).status, 200);
    let metrics = server.get("/metrics", &leg);
    let line = r#"openvla_token_requests_total{token="arm",outcome="rate_limited"} 3"#;
    assert!(metrics.text().contains(line), "{}", metrics.text());
}

#[test]
fn a_flood_is_refused_and_costs_others_nothing() {
    let server = Server::start(&["--rate", "2"]);
    let (over, url) = (AtomicBool::new(false), server.url("/act"));
    let refused = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let mut refused = 0;
            let agent = ureq::Agent::config_builder().http_status_as_error(false).build();
            let agent = ureq::Agent::from(agent);
            while !over.load(Ordering::Relaxed) {
                let request = agent.post(&url).header("x-client-id", "flood");
                let got = request.send(numpy_body("x")).unwrap().status().as_u16();
                assert!([200, 429].contains(&got), "{got}");
                refused += usize::from(got == 429);
            }
            refused
        });
        for _ in 0..4 {
            assert_eq!(server.step("x", &[("x-client-id", "good")]).status, 200);
            std::thread::sleep(Duration::from_millis(501));
        }
        over.store(true, Ordering::Relaxed);
        flood.join().unwrap()
    });
    assert!(refused > 0);
}

#[test]
fn it_is_refused_before_its_body_is_read() {
    let server = Server::start(&SLOW);
    assert_eq!(server.step("x", &[]).status, 200);
    for path in ["/act", "/v1/act", "/act/", "/v1/act/"] {
        let mut stream = server.connect();
        let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap(); // no byte of the body was sent
        assert_eq!(&status, b"HTTP/1.1 429", "{path}");
    }
}
