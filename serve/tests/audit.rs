//! The audit log: a line for each motion and each refusal, by every protocol, whatever the disk does.

mod common;

use std::path::Path;

use common::{ACTION, Gate, Server, Stub, numpy_body};
use serde_json::{Value, json};

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn who_moved_what_when_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    std::fs::write(&path, "{\"of\": \"the server before\"}\n").unwrap();
    let server = Server::start(&["--audit-log", path.to_str().unwrap()]);
    let headers = [("x-client-id", "arm"), ("x-seq", "7")];
    assert_eq!(server.step("move 0.05", &headers).status, 200);
    assert_eq!(server.post("/act", &[], numpy_body("wave").as_bytes()).status, 200);
    server.step("move 0.05", &headers).assert_error(409, "out_of_order");
    server.post("/v1/stop", &[("x-client-id", "operator")], b"");
    server.post("/v1/release", &[], b"");
    server.post("/act", &[], b"no JSON").assert_error(400, "bad_json");
    drop(server); // the last lines are written before it ends
    let lines = lines(&path);
    let outcomes: Vec<_> = lines.iter().map(|line| line["outcome"].as_str()).collect();
    let expected = ["ok", "ok", "out_of_order", "stop", "release"].map(Some);
    assert_eq!(outcomes, [&[None][..], &expected].concat(), "the file is appended to");
    let [_, plain, act, refused, stop, _] = lines.as_slice() else { unreachable!("six lines") };
    for (key, value) in [
        ("protocol", json!("plain")),
        ("client", json!("arm")),
        ("seq", json!(7)),
        ("instruction", json!("move 0.05")),
        ("unnorm_key", json!("bridge_orig")),
        ("actions", json!(vec![vec![0.05; 7]])),
        ("tokens", json!(vec![31_872; 7])),
        ("model", json!("built-in")),
    ] {
        assert_eq!(plain[key], value, "{plain}");
    }
    assert!(plain["time"].as_f64() > Some(1.7e9) && plain["latency_ms"].as_f64() > Some(0.0));
    assert_eq!((&act["protocol"], &act["client"]), (&json!("act"), &Value::Null));
    assert_eq!(act["actions"], json!([ACTION]));
    assert!(refused["actions"].is_null() && refused["seq"] == 7, "{refused}");
    assert_eq!((&stop["client"], &stop["protocol"]), (&json!("operator"), &Value::Null));
}

#[test]
fn a_full_disk_stops_no_robot() {
    let server = Server::start(&["--audit-log", "/dev/full"]);
    for _ in 0..5 {
        assert_eq!(server.step("x", &[]).status, 200);
    }
    server.wait_for_metric("openvla_audit_dropped_total", 5.0);
}

/// A pipe that nobody reads takes 64 KiB, and then stands still as a broken disk does.
#[test]
fn a_disk_that_stands_still_stops_no_robot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let _reader = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let server = Server::start(&["--audit-log", path.to_str().unwrap()]);
    for _ in 0..1500 {
        assert_eq!(server.step("x", &[]).status, 200);
    }
    assert!(server.metric("openvla_audit_dropped_total") > 0.0);
}

#[test]
fn a_file_that_cannot_be_opened_is_said_at_once() {
    let (gate, (send, saw)) = (Gate::default(), std::sync::mpsc::channel());
    let stub = Stub::new(gate.clone(), send);
    let args = ["--audit-log", "/nowhere/audit.jsonl"];
    let mut server = Server::with(&args, gate, saw, move || Ok(stub.clone()));
    let error = format!("{:#}", server.ended().unwrap_err());
    assert!(error.contains("--audit-log /nowhere/audit.jsonl: "), "{error}");
}
