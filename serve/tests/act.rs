//! The reference's protocol, byte for byte.

mod common;

use std::path::Path;

use common::{ACTION, Server, numpy_body};
use openvla_serve::field::Field;
use openvla_serve::numpy::Ndarray;
use serde_json::{Value, json};

/// Name, request, status and answer of the reference's server, for a model that gives `ACTION`.
fn captures() -> Vec<(String, Option<String>, u16, String)> {
    let wire = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/wire.json");
    let wire: Value = serde_json::from_str(&std::fs::read_to_string(wire).unwrap()).unwrap();
    assert_eq!(wire["action_returned"], json!(ACTION));
    let capture = |case: &Value| {
        let text = |key: &str| case[key].as_str().map(str::to_owned);
        let status = case["status"].as_u64().unwrap() as u16;
        (text("name").unwrap(), text("request_body"), status, text("response_body").unwrap())
    };
    wire["cases"].as_array().unwrap().iter().map(capture).collect()
}

fn answer(server: &Server, body: Option<&str>) -> common::Answer {
    match body {
        Some(body) => server.post("/act", &[("content-type", "application/json")], body.as_bytes()),
        None => server.get("/act", &[]),
    }
}

#[test]
fn with_compat_errors_every_byte_is_the_references() {
    let server = Server::start(&["--compat-errors"]);
    for (name, body, status, want) in captures() {
        let got = answer(&server, body.as_deref());
        assert_eq!((got.status, got.text()), (status, want.as_str()), "{name}");
        assert_eq!(got.headers["content-type"], "application/json", "{name}");
    }
    assert_eq!(server.get("/nothing", &[]).text(), r#"{"detail":"Not Found"}"#);
}

#[test]
fn without_them_motions_are_the_same_and_errors_say_what_is_wrong() {
    let server = Server::start(&[]);
    for (name, body, status, want) in captures() {
        let got = answer(&server, body.as_deref());
        if status == 200 && want != "\"error\"" {
            assert_eq!((got.status, got.text()), (200, want.as_str()), "{name}");
        } else {
            assert!((400..500).contains(&got.status), "{name}: {got:?}");
            assert!(got.json()["code"].is_string() && got.json()["message"].is_string(), "{name}");
        }
    }
}

#[test]
fn the_model_sees_what_was_sent() {
    let server = Server::start(&[]);
    let body = numpy_body("Put Eggplant")
        .replace("\"instruction\"", "\"unnorm_key\":\"fractal20220817_data\",\"instruction\"");
    let got = answer(&server, Some(&body));
    assert_eq!(got.status, 200, "{got:?}");
    assert_eq!(got.headers["x-openvla-unnorm-key"], "fractal20220817_data");
    let seen = server.seen();
    assert_eq!(seen.image.dimensions(), (3, 2));
    assert_eq!(seen.image.as_raw()[..], (0..18).collect::<Vec<u8>>());
    assert_eq!(seen.instruction, "Put Eggplant");
    let unknown = body.replace("fractal20220817_data", "nothing");
    let error = answer(&server, Some(&unknown)).assert_error(400, "unknown_unnorm_key");
    assert!(error["hint"].as_str().unwrap().contains("bridge_orig"));
}

#[test]
fn a_slash_at_the_end_changes_nothing() {
    let server = Server::start(&[]);
    let got = server.post("/act/", &[], numpy_body("x").as_bytes());
    assert_eq!(got.status, 200, "{got:?}");
    assert_eq!(server.metric("openvla_requests_total{form=\"act\",outcome=\"ok\"}"), 1.0);
    server.post("/v1/act/", &[], b"").assert_error(415, "unsupported_media_type");
}

#[test]
fn what_the_body_has_no_room_for_is_in_the_headers() {
    let server = Server::start(&["--clamp"]);
    let post = |instruction: &str| {
        let headers = [("x-seq", "3"), ("x-client-id", "arm")];
        server.post("/act", &headers, numpy_body(instruction).as_bytes())
    };
    let got = post("be unsure");
    assert!(got.headers["x-openvla-warning"].contains("not a motion"));
    assert_eq!(got.headers["x-openvla-tokens"], ["31872"; 7].join(","));
    assert_eq!(
        (got.headers["x-seq"].as_str(), got.headers["x-openvla-clamped"].as_str()),
        ("3", "5")
    );
    assert!(got.headers["server-timing"].starts_with("queue;dur="));
    for (instruction, doubt) in [
        (" \n", "the instruction is empty"),
        ("What action should the robot take to wave?", "holds the whole prompt"),
        ("wave_at_me", "underscores"),
    ] {
        let doubted = server.post("/act", &[], numpy_body(instruction).as_bytes());
        assert_eq!(doubted.status, 200, "as the reference has it");
        assert!(doubted.headers["x-openvla-warning"].contains(doubt), "{doubted:?}");
    }
    let array: Field<'_> = serde_json::from_slice(&got.body).unwrap();
    let mut clamped = ACTION;
    clamped[5] = 0.1;
    assert_eq!(array.array("answer").unwrap(), Ndarray::of_f64(&clamped, vec![7]));
}
