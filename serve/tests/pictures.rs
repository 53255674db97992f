//! What strangers' pictures may cost, and whom.

mod common;

use std::sync::mpsc::channel;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{Answer, PATIENCE, Server, png};
use serde_json::json;

/// A progressive JPEG of one gray component whose scans are all empty: few bytes and much work.
fn empty_scans(side: u16, n: usize) -> Vec<u8> {
    let [high, low] = side.to_be_bytes();
    let table = [&[0xFF, 0xDB, 0, 67, 0][..], &[1; 64]].concat();
    let frame = [0xFF, 0xCA, 0, 11, 8, high, low, high, low, 1, 1, 0x11, 0];
    let scan = [0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 0, 0];
    [&[0xFF, 0xD8], &table[..], &frame, &scan.repeat(n), &[0xFF, 0xD9]].concat()
}

/// A top-down BMP of 2 x 2 black pixels, and one with OS/2's header.
fn bitmaps() -> [Vec<u8>; 2] {
    let file = |header: &[u8]| {
        let offset = 14 + header.len() as u8;
        [&b"BM"[..], &[0; 8], &[offset, 0, 0, 0], header, &[0; 16]].concat()
    };
    let sides = [2_i32, -2].map(i32::to_le_bytes);
    let windows = [&[40, 0, 0, 0], sides.as_flattened(), &[1, 0, 24, 0], &[0; 24]].concat();
    [file(&windows), file(&[12, 0, 0, 0, 2, 0, 2, 0, 1, 0, 24, 0])]
}

fn body(file: &[u8]) -> String {
    json!({ "image": STANDARD.encode(file), "instruction": "x" }).to_string()
}

fn show(server: &Server, file: &[u8]) -> Answer {
    server.post("/v1/act", &[("content-type", "application/json")], body(file).as_bytes())
}

#[test]
fn the_servers_limit_holds_for_every_file() {
    let server = Server::start(&["--max-pixels", "4"]);
    for file in bitmaps() {
        assert_eq!(show(&server, &file).status, 200);
    }
    assert_eq!(show(&server, &png(2, 2)).status, 200);
    let jpeg = empty_scans(8, 1);
    let filled = [&jpeg[..2], &[0xFF; 2], &jpeg[2..]].concat();
    for file in [png(5, 1), jpeg, filled] {
        let error = show(&server, &file).assert_error(422, "bad_image");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("4 in all may be decoded"), "{message}");
    }
    // Fewer pixels than may be, and more work than they can be.
    let server = Server::start(&["--max-pixels", "64"]);
    assert_eq!(show(&server, &empty_scans(8, 6)).status, 200);
    let error = show(&server, &empty_scans(8, 7)).assert_error(422, "bad_image");
    assert!(error["message"].as_str().unwrap().contains("scans"), "{error}");
}

/// Hostile clients send pictures that are as costly as can be. A good one that asks while they are
/// decoded has its answer before most of them.
#[test]
fn one_robots_pictures_cost_that_robot_alone() {
    const HOSTILE: usize = 10;
    let cores = openvla::cli::Threads::default().count();
    let server = Server::start(&[]);
    let url = &server.url("/v1/act");
    let (answered, answers) = channel();
    let ask = |name: &'static str, body: &str| {
        let agent = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).build();
        let request = ureq::Agent::from(agent).post(url).content_type("application/json");
        assert_eq!(request.send(body).unwrap().status(), 200);
        answered.send(name).unwrap();
    };
    let (ask, good) = (&ask, body(&png(224, 224)));
    let costly = &body(&empty_scans(2048, 6));
    std::thread::scope(|scope| {
        for _ in 0..HOSTILE * cores {
            scope.spawn(|| ask("hostile", costly));
        }
        answers.recv().unwrap();
        scope.spawn(|| ask("good", &good));
        let answers = std::iter::from_fn(|| answers.recv_timeout(PATIENCE).ok());
        let before = answers.take_while(|who| *who == "hostile").count();
        assert!(before < (HOSTILE - 1) * cores - 1, "{before} were answered before it");
    });
}
