//! The same file, image, instruction and device give the same tokens, alone or under load.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{Server, example, png};
use openvla_serve::numpy::{Json, Ndarray};
use serde_json::{Value, json};

const INSTRUCTIONS: [&str; 3] = ["put eggplant into pot", "wave", "open the drawer slowly"];
const SIDES: [u32; 2] = [64, 224];

/// Instruction and side of the picture of the i-th request.
fn request(i: usize) -> (&'static str, u32) {
    (INSTRUCTIONS[i % 3], SIDES[i / 3 % 2])
}

#[test]
fn many_clients_get_what_one_gets_from_the_library() {
    let mut alone = example(&[]);
    let want: Vec<Value> = (0..6)
        .map(|i| {
            let (instruction, side) = request(i);
            let image = openvla::decode(&png(side, side)).unwrap();
            json!(alone.act(&image, instruction, None).unwrap().tokens)
        })
        .collect();
    let distinct: std::collections::BTreeSet<String> = want.iter().map(Value::to_string).collect();
    assert!(distinct.len() > 2, "the cases differ: {distinct:?}");

    let server = Server::example(&["--draft", "off"]);
    let (url, next) = ([server.url("/act"), server.url("/v1/act")], AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for client in 0..6 {
            let (url, next, want) = (&url, &next, &want);
            scope.spawn(move || {
                let name = format!("client {client}");
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= 24 {
                        return;
                    }
                    assert_eq!(tokens(&url[i % 2], &name, i, i % 2 == 0), want[i % 6], "{i}");
                }
            });
        }
    });
    assert_eq!(server.metric("openvla_requests_total{form=\"act\",outcome=\"ok\"}"), 12.0);
}

/// A robot that stands still repeats its motion, which is then checked in one pass.
#[test]
fn drafts_come_from_the_same_robots_last_motion() {
    let server = Server::example(&["--draft", "auto", "--session-s", "3"]);
    let passes = |name: &str| {
        let body = json!({ "image": STANDARD.encode(png(64, 64)), "instruction": "wave" });
        let request = ureq::post(server.url("/v1/act")).content_type("application/json");
        let response = request.header("x-client-id", name).send(body.to_string()).unwrap();
        let answer = response.into_body().read_to_vec().unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        answer["draft"]["passes"].as_u64().unwrap()
    };
    assert_eq!([passes("arm"), passes("leg")], [7, 7], "nothing is known of either");
    assert_eq!([passes("arm"), passes("leg")], [1, 1]);
    assert_eq!(server.metric("openvla_draft_accepted_total"), 12.0);
    std::thread::sleep(std::time::Duration::from_millis(3100));
    assert_eq!(passes("arm"), 7, "a session ends");
}

fn tokens(url: &str, name: &str, i: usize, as_array: bool) -> Value {
    let (instruction, side) = request(i);
    let image = if as_array {
        let data = openvla::decode(&png(side, side)).unwrap().into_raw();
        let shape = vec![side as usize, side as usize, 3];
        json!(Json(Ndarray { dtype: "|u1".into(), shape, data: data.into() }))
    } else {
        json!(STANDARD.encode(png(side, side)))
    };
    let body = json!({ "image": image, "instruction": instruction }).to_string();
    let request = ureq::post(url).content_type("application/json").header("x-client-id", name);
    let mut response = request.send(body).unwrap();
    if as_array {
        let tokens = response.headers()["x-openvla-tokens"].to_str().unwrap();
        return serde_json::from_str(&format!("[{tokens}]")).unwrap();
    }
    let answer = response.body_mut().read_to_vec().unwrap();
    serde_json::from_slice::<Value>(&answer).unwrap()["tokens"].take()
}
