//! The emergency stop: nothing gets out, whoever asked and however far it was, until it is released.

mod common;

use common::{Server, numpy_body};
use serde_json::json;

const STOPPED: (u16, &str) = (503, "stopped");

#[test]
fn what_comes_what_waits_and_what_is_computed_does_not_get_out() {
    let server = Server::start(&[]);
    let computed = server.step_beside("wait", &[("x-client-id", "arm")]);
    server.seen();
    let waiting: Vec<_> = (0..3).map(|_| server.step_beside("waits", &[])).collect();
    server.wait_for_metric("openvla_queue_depth", 3.0);
    let got = server.post("/v1/stop", &[("x-client-id", "operator")], b"");
    assert_eq!(
        (got.status, &got.json()["stopped"], &got.json()["by"]),
        (200, &json!(true), &json!("operator"))
    );
    assert!(got.json()["since"].as_f64() > Some(1.7e9), "{got:?}");
    for thread in waiting.into_iter().chain([computed]) {
        let error = thread.join().unwrap().assert_error(STOPPED.0, STOPPED.1);
        assert!(error["message"].as_str().unwrap().contains("`operator`"), "{error}");
    }
    server.wait_for_metric("openvla_queue_depth", 0.0);
    server.gate.open(1); // the model finishes, for nobody
    server.step("x", &[]).assert_error(STOPPED.0, STOPPED.1);
    server.post("/act", &[], numpy_body("x").as_bytes()).assert_error(STOPPED.0, STOPPED.1);
    assert!(server.saw.try_recv().is_err(), "the model sees nothing while it is stopped");
    let got = server.post("/v1/release", &[], b"");
    assert_eq!((got.status, got.json()), (200, json!({ "stopped": false })));
    assert_eq!(server.step("x", &[]).status, 200);
}

/// The first stop is the one that is told of, and one release ends it, whoever sends it.
#[test]
fn it_holds_through_failures_of_the_model_until_it_is_released() {
    let server = Server::start(&[]);
    let failing = server.step_beside("wait", &[]);
    server.seen();
    for name in ["operator", "robot"] {
        let got = server.post("/v1/stop", &[("x-client-id", name)], b"");
        assert_eq!(got.json()["by"], "operator");
    }
    failing.join().unwrap().assert_error(STOPPED.0, STOPPED.1);
    server.gate.open(1);
    server.post("/v1/release", &[], b"");
    server.step("panic", &[]).assert_error(500, "model_failed");
    server.post("/v1/stop", &[], b"");
    server.wait_for("/readyz", 200);
    server.step("x", &[]).assert_error(STOPPED.0, STOPPED.1);
    server.post("/v1/release", &[], b"");
    assert_eq!(server.step("x", &[]).status, 200);
}

#[test]
fn health_metrics_and_probes_say_so_and_are_no_errors() {
    let server = Server::start(&[]);
    assert_eq!(server.get("/health", &[]).json(), json!({ "status": "ok" }));
    assert_eq!(server.metric("openvla_stopped"), 0.0);
    server.post("/v1/stop", &[], b"");
    // Who watches over servers would start one that is not stopped.
    assert_eq!(server.get("/readyz", &[]).status, 200);
    let health = server.get("/health", &[]);
    assert_eq!((health.status, health.json()), (200, json!({ "status": "stopped" })));
    assert_eq!(server.metric("openvla_stopped"), 1.0);
    server.step("x", &[]).assert_error(STOPPED.0, STOPPED.1);
    assert_eq!(server.metric("openvla_requests_total{form=\"plain\",outcome=\"stopped\"}"), 1.0);
    server.post("/v1/release", &[], b"");
    assert_eq!(server.metric("openvla_stopped"), 0.0);
}

#[test]
fn only_who_may_ask_for_motions_may_stop_and_release() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "correct-horse-battery\n").unwrap();
    let with_token = Server::start(&["--token-file", file.to_str().unwrap()]);
    let without = Server::start(&[]);
    for path in ["/v1/stop", "/v1/release"] {
        with_token.post(path, &[], b"").assert_error(401, "unauthorized");
        let token = [("authorization", "Bearer correct-horse-battery")];
        assert_eq!(with_token.post(path, &token, b"").status, 200);
        let page = [("origin", "https://example.org")];
        without.post(path, &page, b"").assert_error(403, "forbidden_origin");
        without.get(path, &[]).assert_error(405, "method_not_allowed");
    }
    assert_eq!(without.step("x", &[]).status, 200, "no page has stopped it");
}
