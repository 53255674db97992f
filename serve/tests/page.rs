//! The page: who gets it, what it may do, and what its events say of the robots. `tests/page` has it in a browser.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{Gate, PATIENCE, Server, Stub, png};
use openvla::image::{Rgb, RgbImage};
use openvla::{ActionSpace, Preprocess, Resize};
use openvla_serve::live::{Live, MAX_WATCHERS, Step};
use openvla_serve::meta::{Client, Meta};
use openvla_serve::observation::{Answer, Draft, Observation, Times};
use openvla_serve::policy::{ModelInfo, Policy};
use openvla_serve::safety::Report;
use openvla_serve::tokens::Caller;
use openvla_serve::view::Views;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const TOKEN: &str = "correct-horse-battery";

fn with_token() -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, TOKEN).unwrap();
    let server = Server::start(&["--token-file", file.to_str().unwrap()]);
    (dir, server)
}

/// A stream of events.
struct Events(BufReader<TcpStream>);

impl Events {
    fn of(server: &Server, headers: &str) -> Self {
        let mut stream = server.connect();
        let host = server.address;
        write!(stream, "GET /page/events HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n").unwrap();
        Self(BufReader::new(stream))
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.0.read_line(&mut line).unwrap() > 0).then_some(line)
    }

    /// The next event of this name, if the stream does not end before.
    fn next(&mut self, name: &str) -> Option<Value> {
        let name = format!("event: {name}\n");
        while self.line()? != name {}
        Some(serde_json::from_str(self.line()?.strip_prefix("data: ")?).unwrap())
    }
}

#[test]
fn everyone_may_have_the_page_and_it_may_do_nothing_else() {
    let server = Server::start(&[]);
    let got = server.get("/", &[]);
    assert_eq!((got.status, &*got.headers["content-type"]), (200, "text/html; charset=utf-8"));
    let policy = &got.headers["content-security-policy"];
    assert!(policy.starts_with("default-src 'none'; "), "{policy}");
    let between = |open: &str, close: &str| {
        let (_, rest) = got.text().split_once(open).unwrap();
        rest.split_once(close).unwrap().0
    };
    for (kind, text) in [
        ("style-src", between("<style>", "</style>")),
        ("script-src", between("<script>", "</script>")),
    ] {
        assert!(text.len() > 1000);
        let hash = STANDARD.encode(Sha256::digest(text));
        assert!(policy.contains(&format!("{kind} 'sha256-{hash}';")), "{kind} in {policy}");
    }
    assert!(!got.text().contains(" style="), "which the policy forbids");
    let outside = got.text().replace("http://www.w3.org/2000/svg", "");
    assert!(!outside.contains("http://") && !outside.contains("https://"), "nothing is elsewhere");
    assert_eq!(got.headers["referrer-policy"], "no-referrer");
    assert_eq!(server.metric(r#"openvla_requests_total{form="page",outcome="ok"}"#), 1.0);
}

#[test]
fn with_a_token_the_page_asks_for_it_and_shows_nothing_without() {
    let (_dir, server) = with_token();
    let got = server.get("/", &[("accept", "text/html,*/*;q=0.8")]);
    assert_eq!((got.status, &*got.headers["www-authenticate"]), (401, "Bearer"));
    assert!(got.text().contains("id=\"token-form\""));
    let upgrade = [("accept", "text/html"), ("upgrade", "websocket")];
    server.get("/", &upgrade).assert_error(401, "unauthorized");
    server.get("/", &[]).assert_error(401, "unauthorized");
    let wrong = [("authorization", "Bearer wrong-horse-battery"), ("accept", "text/html")];
    for headers in [&wrong[..], &[]] {
        server.get("/page/events", headers).assert_error(401, "unauthorized");
    }
    let right = ("authorization", &*format!("Bearer {TOKEN}"));
    assert_eq!(server.get("/", &[right]).status, 200);
    // Whoever shows the token may ask from anywhere.
    let elsewhere = format!("Authorization: Bearer {TOKEN}\r\nSec-Fetch-Site: cross-site\r\n");
    assert_eq!(Events::of(&server, &elsewhere).next("server").unwrap()["model"], "a stub");
}

#[test]
fn an_emergency_stop_is_seen() {
    let server = Server::start(&[]);
    let mut events = Events::of(&server, "");
    assert!(events.next("server").unwrap()["why"].is_null());
    server.post("/v1/stop", &[("x-client-id", "operator")], b"");
    let why = loop {
        if let Some(why) = events.next("server").unwrap()["why"].as_str() {
            break why.to_owned();
        }
    };
    assert!(why.contains("the emergency stop is set by `operator`"), "{why}");
}

#[test]
fn without_one_pages_of_others_see_no_robots() {
    let server = Server::start(&[]);
    let refused = |headers: &[(&str, &str)]| {
        server.get("/page/events", headers).assert_error(403, "forbidden_origin");
    };
    refused(&[("origin", "https://example.org")]);
    refused(&[("sec-fetch-site", "cross-site")]);
    refused(&[("host", "example.org")]);
    assert!(Events::of(&server, "Sec-Fetch-Site: same-origin\r\n").next("server").is_some());
}

#[test]
fn it_can_be_left_out() {
    let server = Server::start(&["--no-page"]);
    server.get("/", &[("accept", "text/html")]).assert_error(426, "upgrade_required");
    server.get("/page/events", &[]).assert_error(404, "not_found");
}

#[test]
fn a_step_is_seen_as_the_model_saw_it_also_by_who_comes_later() {
    let server = Server::example(&["--threads", "1"]);
    let model = common::example(&["--threads", "1"]);
    let file = png(320, 200);
    let body = json!({ "image": STANDARD.encode(&file), "instruction": "put carrot into pot" });
    let headers = [("x-client-id", "arm"), ("content-type", "application/json")];
    let answer = server.post("/v1/act", &headers, body.to_string().as_bytes()).json();
    assert!(answer.get("logits").is_none(), "which are for the page");
    for _ in 0..2 {
        let mut events = Events::of(&server, "");
        let seen = events.next("robot").unwrap();
        assert_eq!((&seen["robot"], &seen["n"]), (&json!("arm"), &json!(1)));
        assert_eq!(seen["instruction"], "put carrot into pot");
        assert_eq!(seen["timing_ms"]["step"], answer["timing_ms"]["step"]);
        let dimensions = seen["motion"]["dimensions"].as_array().unwrap();
        for (i, dimension) in dimensions.iter().enumerate() {
            assert_eq!(dimension["value"], answer["action"][i]);
            let alternatives: Vec<(f64, f64)> =
                serde_json::from_value(dimension["alternatives"].clone()).unwrap();
            assert!(alternatives.iter().map(|(_, p)| p).sum::<f64>() <= 1.0 + 1e-9);
            let best = alternatives.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
            assert!((best.0 - dimension["value"].as_f64().unwrap()).abs() < 1e-12, "{dimension}");
        }
        let data = seen["pictures"][0]["data"].as_str().unwrap();
        let file = STANDARD.decode(data.strip_prefix("data:image/jpeg;base64,").unwrap()).unwrap();
        let shown = openvla::decode(&file).unwrap();
        let picture = openvla::decode(&png(320, 200)).unwrap();
        let square = model.config().preprocess.shown(&picture).unwrap();
        assert_eq!(shown.dimensions(), square.dimensions());
        let pairs = shown.as_raw().iter().zip(square.as_raw());
        let off: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        assert!(off / square.as_raw().len() as u64 <= 3, "but for JPEG");
    }
}

#[test]
fn who_does_not_read_delays_no_robot_and_too_many_may_not_watch() {
    let mut server = Server::start(&[]);
    let mut stuck: Vec<_> = (0..MAX_WATCHERS).map(|_| Events::of(&server, "")).collect();
    stuck.iter_mut().for_each(|events| assert!(events.next("server").is_some()));
    server.get("/page/events", &[]).assert_error(503, "queue_full");
    let body = json!({ "image": STANDARD.encode(png(500, 500)), "instruction": "x" }).to_string();
    let headers = [("x-client-id", "arm"), ("content-type", "application/json")];
    let begun = Instant::now();
    let mut n = 0;
    while begun.elapsed() < Duration::from_secs(2) {
        assert_eq!(server.post("/v1/act", &headers, body.as_bytes()).status, 200);
        n += 1;
    }
    let robot = std::iter::from_fn(|| stuck[0].next("robot")).find(|robot| robot["n"] == n);
    assert!(robot.is_some(), "the last step is seen");
    server.stop();
    for mut events in stuck {
        while events.line().is_some() {}
    }
    server.ended().unwrap();
}

/// A model that is known by its description alone.
fn model() -> ModelInfo {
    Stub::new(Gate::default(), channel().0).info()
}

/// Steps of one robot at given seconds, and the warnings after the last.
fn warnings(steps: impl IntoIterator<Item = (f64, Step)>) -> Vec<String> {
    let (live, mut views, mut number) = (Live::default(), Views::default(), 0);
    let mut warnings = Value::Null;
    for (seconds, step) in steps {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(1e9 + seconds);
        live.keep(Step { at, ..step });
        let (newest, last) = live.newer(number);
        number = newest;
        let view = views.view(&model(), &last[0]).unwrap();
        warnings = serde_json::to_value(&view).unwrap()["warnings"].take();
    }
    serde_json::from_value(warnings).unwrap()
}

fn scene(seed: u8) -> RgbImage {
    RgbImage::from_fn(224, 224, |x, y| Rgb([x as u8 ^ seed, y as u8, 90]))
}

fn step(image: RgbImage, change: impl FnOnce(&mut Answer)) -> Step {
    let now = Instant::now();
    let meta = Meta {
        client: Client::Named("arm".into()),
        caller: Caller::default(),
        connection: 0,
        epoch: None,
        seq: None,
        timestamp: None,
        arrived: now,
        deadline: now + PATIENCE,
    };
    let mut answer = Answer {
        action: vec![0.01; 7],
        actions: vec![vec![0.01; 7]],
        normalized: vec![0.1; 7],
        tokens: vec![31_872; 7],
        logits: Vec::new(),
        unnorm_key: "bridge_orig".into(),
        ranges: [vec![[-0.1, 0.1]; 6], vec![[-1.0, 1.0]]].concat(),
        all_actions: true,
        unconstrained: Vec::new(),
        warning: None,
        safety: Report::default(),
        draft: Draft::default(),
        timing_ms: Times::new(Duration::ZERO, &openvla::Timing::default()),
        fingerprint: String::new(),
        file: String::new(),
        seq: None,
    };
    change(&mut answer);
    Step::new(&meta, Observation::new(image, "x".into(), None).unwrap(), Ok(answer))
}

#[test]
fn what_only_several_steps_show_is_said_after_a_while() {
    let frozen = |until: f64| {
        warnings([(0.0, scene(1)), (until, scene(1))].map(|(at, image)| (at, step(image, |_| {}))))
    };
    assert!(frozen(1.5).is_empty());
    assert!(frozen(3.5)[0].contains("same for 3 s"), "{:?}", frozen(3.5));
    let moving = (0..9).map(|i| (f64::from(i), step(scene(i as u8), |_| {})));
    assert!(warnings(moving).is_empty());

    // The gripper, which is not scaled, may stay open.
    let fast = |i: u8, x: f64| {
        (f64::from(i), step(scene(i), |answer| (answer.action[1], answer.action[6]) = (x, 1.0)))
    };
    let said = warnings((0..4).map(|i| fast(i, -0.0996)));
    assert!(
        said.len() == 1 && said[0].starts_with("At the end of its range for 3 s: dy. "),
        "{said:?}"
    );
    assert!(warnings((0..4).map(|i| fast(i, if i == 2 { 0.05 } else { 0.1 }))).is_empty());
}

#[test]
fn what_one_step_shows_is_said_at_once() {
    let now = |change: fn(&mut Answer)| warnings([(0.0, step(scene(0), change))]);
    assert!(now(|_| {}).is_empty());
    let unsure = now(|answer| answer.warning = Some("among all tokens"));
    assert_eq!(unsure, ["Among all tokens."]);
    let held = now(|answer| (answer.safety.clamped, answer.safety.limited) = (vec![0], vec![2, 6]));
    assert!(held[0].contains("dx") && held[1].contains("dz, gripper"), "{held:?}");
    let aged = |age| warnings([(0.0, Step { age: Some(age), ..step(scene(0), |_| {}) })]);
    assert!(aged(0.1).is_empty());
    assert!(aged(0.9)[0].contains("0.9 s old") && aged(-2.0)[0].contains("from the future"));
    let dark = warnings([(0.0, step(RgbImage::new(224, 224), |_| {}))]);
    assert!(dark[0].contains("too dark"), "{dark:?}");
    let late = openvla_serve::error::Error::new(openvla_serve::error::Code::DeadlineExceeded, "x");
    let late = warnings([(0.0, Step { outcome: Err(late), ..step(scene(0), |_| {}) })]);
    assert!(late[0].contains("too late"), "{late:?}");
}

/// Two ids share the last bin, and each bin's value is the one that decoding gives.
#[test]
fn alternatives_are_values_with_the_probabilities_of_their_ids() {
    let space = ActionSpace { end: 32_000, n_bin: 256 };
    let mut logits = vec![0.0; 256];
    // Of ids 31744 and 31745, which are the same motion, and of 31999.
    (logits[0], logits[1], logits[255]) = (20.0, 20.0, 21.0);
    let weights = [2.0 * 20.0_f64.exp(), 21.0_f64.exp()];
    let sum: f64 = weights.iter().sum::<f64>() + 253.0;
    let live = Live::default();
    live.keep(step(scene(0), |answer| answer.logits = vec![logits; 7]));
    let (_, last) = live.newer(0);
    let (model, mut views) = (model(), Views::default());
    let view = serde_json::to_value(views.view(&model, &last[0]).unwrap()).unwrap();
    let got: Vec<(f64, f64)> =
        serde_json::from_value(view["motion"]["dimensions"][0]["alternatives"].clone()).unwrap();
    let want = [(31_999, weights[1] / sum), (31_744, weights[0] / sum)];
    assert_eq!(got.len(), 2, "others are not likely enough");
    for ((value, p), (id, want)) in got.iter().zip(want) {
        assert!(
            (value - 0.1 * space.center(space.bin(id))).abs() < 1e-12 && (p - want).abs() < 1e-9
        );
    }
}

/// A model of which pictures are shown that were letterboxed has bars by right.
#[test]
fn the_models_own_bars_are_no_fault() {
    let bars = RgbImage::from_fn(320, 160, |x, y| Rgb([x as u8, y as u8, 90]));
    let resize = Resize::Letterbox { fill: [0; 3] };
    let letterbox = ModelInfo { shown: Preprocess { resize, ..model().shown }, ..model() };
    let live = Live::default();
    live.keep(step(bars, |_| {}));
    let (_, last) = live.newer(0);
    let view = serde_json::to_value(Views::default().view(&letterbox, &last[0]).unwrap()).unwrap();
    assert_eq!(view["warnings"], json!([]));
    assert_eq!(view["pictures"][0]["width"], 224);
}
