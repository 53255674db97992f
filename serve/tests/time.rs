//! One queue that knows about time, seen from outside.

mod common;

use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

use common::{Server, numpy_body};
use serde_json::json;

const ARM: (&str, &str) = ("x-client-id", "arm");

#[test]
fn the_newest_observation_of_a_client_wins() {
    let server = Server::start(&[]);
    let busy = server.step_beside("wait", &[ARM, ("x-seq", "1")]);
    assert_eq!(server.seen().instruction, "wait");
    let old = server.step_beside("old", &[ARM, ("x-seq", "2")]);
    server.wait_for_metric("openvla_queue_depth", 1.0);
    let other = server.step_beside("other", &[("x-client-id", "leg")]);
    server.wait_for_metric("openvla_queue_depth", 2.0);
    let new = server.step_beside("new", &[ARM, ("x-seq", "3")]);
    old.join().unwrap().assert_error(409, "superseded");
    server.gate.open(1);
    for (thread, seq) in [(busy, json!(1)), (new, json!(3)), (other, json!(null))] {
        let got = thread.join().unwrap();
        assert_eq!((got.status, &got.json()["seq"]), (200, &seq), "{got:?}");
    }
    let order = [server.seen().instruction, server.seen().instruction];
    assert_eq!(order, ["new", "other"], "the newer one keeps the place");
    assert_eq!(server.metric("openvla_superseded_total"), 1.0);
    assert_eq!(server.metric("openvla_requests_total{form=\"plain\",outcome=\"superseded\"}"), 1.0);
}

#[test]
fn clients_without_a_name_do_not_disturb_each_other() {
    let server = Server::start(&[]);
    let busy = server.step_beside("wait", &[]);
    server.seen();
    let both = [server.step_beside("a", &[]), server.step_beside("b", &[])];
    server.wait_for_metric("openvla_queue_depth", 2.0);
    server.gate.open(1);
    for thread in both.into_iter().chain([busy]) {
        assert_eq!(thread.join().unwrap().status, 200);
    }
}

/// The model is busy all the time, so whoever waits hears at the deadline, not after the step.
#[test]
fn nobody_is_answered_late() {
    let server = Server::start(&[]);
    let soon = [("x-deadline-ms", "60")];
    let running = server.step("wait", &soon).assert_error(504, "deadline_exceeded");
    assert!(running["message"].as_str().unwrap().contains("60 ms"), "{running}");
    server.seen();
    server.step("never seen", &soon).assert_error(504, "deadline_exceeded");
    server.gate.open(1);
    assert_eq!(server.step("after", &[]).status, 200);
    assert_eq!(server.seen().instruction, "after", "late work never reached the model");
    assert_eq!(server.metric("openvla_dropped_total"), 2.0, "one after its step, one before");
}

#[test]
fn the_line_is_bounded() {
    let server = Server::start(&["--queue", "1"]);
    let busy = server.step_beside("wait", &[]);
    server.seen();
    let waiting = server.step_beside("waits", &[]);
    server.wait_for_metric("openvla_queue_depth", 1.0);
    let refused = server.step("too many", &[]);
    refused.assert_error(503, "queue_full");
    assert!(refused.headers["retry-after"].parse::<u64>().unwrap() >= 1);
    server.gate.open(1);
    assert_eq!((busy.join().unwrap().status, waiting.join().unwrap().status), (200, 200));
}

#[test]
fn old_observations_are_refused() {
    let server = Server::start(&["--max-age-ms", "500"]);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let at = |seq: &str, seconds: f64| {
        server.step("x", &[ARM, ("x-seq", seq), ("x-timestamp", &seconds.to_string())])
    };
    assert_eq!(at("7", now + 60.0).status, 200, "a clock that is ahead");
    at("8", now - 10.0).assert_error(409, "stale");
    at("7", now + 60.0).assert_error(409, "out_of_order");
    at("9", now + 59.0).assert_error(409, "out_of_order");
    assert_eq!(at("9", now + 60.0).status, 200);
    let wrong = server.step("x", &[("x-seq", "minus one")]).assert_error(400, "bad_request");
    assert!(wrong["message"].as_str().unwrap().contains("x-seq"));
}

#[test]
fn a_program_that_starts_again_is_served_at_its_first_request() {
    let server = Server::start(&[]);
    let at = |seq: u64, epoch: &str| {
        server.step("x", &[ARM, ("x-seq", &seq.to_string()), ("x-epoch", epoch)])
    };
    for seq in 1..20 {
        assert_eq!(at(seq, "7").status, 200);
    }
    assert_eq!(at(1, "8").status, 200);
    let late = at(20, "7").assert_error(409, "out_of_order");
    assert!(late["hint"].as_str().unwrap().contains("X-Epoch"), "{late}");
    assert_eq!(at(2, "8").status, 200);
    // Without epochs, each run on connections of its own.
    let dog = |seq: u64| {
        let seq = seq.to_string();
        let headers = [("x-client-id", "dog"), ("connection", "close"), ("x-seq", seq.as_str())];
        server.step("x", &headers).status
    };
    assert_eq!([dog(0), dog(1), dog(2), dog(1), dog(0), dog(1)], [200, 200, 200, 409, 200, 200]);
}

#[test]
fn who_goes_away_leaves_the_line() {
    let server = Server::start(&[]);
    let busy = server.step_beside("wait", &[]);
    server.seen();
    let body = numpy_body("never seen");
    let mut stream = server.connect();
    let length = body.len();
    write!(stream, "POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    server.wait_for_metric("openvla_queue_depth", 1.0);
    drop(stream);
    server.wait_for_metric("openvla_queue_depth", 0.0);
    server.gate.open(1);
    assert_eq!(busy.join().unwrap().status, 200);
    assert_eq!(server.step("after", &[]).status, 200);
    assert_eq!(server.seen().instruction, "after");
    assert_eq!(server.metric("openvla_dropped_total"), 1.0);
}

#[test]
fn a_motion_is_held_near_the_clients_last() {
    let server = Server::start(&["--max-delta", "0.25", "--session-s", "1"]);
    server.step("move 0", &[]).assert_error(400, "client_needed");
    let moved = |client: &str, to: &str| {
        let json = server.step(&format!("move {to}"), &[("x-client-id", client)]).json();
        (json["action"][0].as_f64().unwrap(), json["safety"]["limited"].as_array().unwrap().len())
    };
    assert_eq!(moved("arm", "0"), (0.0, 0));
    assert_eq!(moved("arm", "1"), (0.25, 7));
    assert_eq!(moved("leg", "1"), (1.0, 0), "another robot");
    assert_eq!(moved("arm", "1"), (0.5, 7), "from where it was held");
    assert_eq!(moved("arm", "0.4"), (0.4, 0));
    let forgotten = Instant::now() + Duration::from_millis(1100);
    std::thread::sleep(forgotten - Instant::now());
    assert_eq!(moved("arm", "1"), (1.0, 0), "a session ends");
}
