//! What the server costs and bears: minutes of load on the loopback, so only on demand.
//!
//! ```sh
//! cargo test --release -p openvla-serve --test load -- --ignored --nocapture --test-threads 1
//! ```
//!
//! `OPENVLA_LOAD_SECONDS` is how long it lasts. `OPENVLA_LOAD_URL` is a server that runs already, for
//! load in several parts.

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::Server;
use openvla_serve::numpy::{Json, Msgpack, Ndarray};
use serde_json::json;
use tungstenite::Message;

const TASK: &str = "put eggplant into pot";
const IDLE: usize = 1000;
const BUSY: usize = 64;

fn picture() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../example/table.png")).unwrap()
}

fn plain_body() -> String {
    json!({ "image": STANDARD.encode(picture()), "instruction": TASK }).to_string()
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    config.timeout_global(Some(Duration::from_secs(60))).build().into()
}

/// Milliseconds that half of the calls, and nine of ten, are done in.
fn quantiles(mut ms: Vec<f64>) -> String {
    ms.sort_by(f64::total_cmp);
    let at = |q: f64| ms[((ms.len() - 1) as f64 * q) as usize];
    format!("p50 {:.3} ms, p90 {:.3} ms, n {}", at(0.5), at(0.9), ms.len())
}

fn timed(call: &mut dyn FnMut()) -> f64 {
    let begun = Instant::now();
    call();
    begun.elapsed().as_secs_f64() * 1e3
}

/// The library and each protocol in turns, one call at a time, all with one thread.
#[test]
#[ignore = "measures"]
fn what_the_server_adds_to_a_step() {
    let file = picture();
    let image = openvla::decode(&file).unwrap();
    let (side, raw) = (vec![image.height() as usize, image.width() as usize, 3], image.as_raw());
    let array = |data: &[u8]| Ndarray {
        dtype: "|u1".into(),
        shape: side.clone(),
        data: data.to_vec().into(),
    };
    let act = json!({ "image": Json(array(raw)), "instruction": TASK }).to_string();
    #[derive(serde::Serialize)]
    struct Frame<'a> {
        image: Msgpack<'a>,
        prompt: &'a str,
    }
    let frame =
        rmp_serde::to_vec_named(&Frame { image: Msgpack(array(raw)), prompt: TASK }).unwrap();

    let mut library = common::example(&["--threads", "1"]);
    let server = Server::example(&["--threads", "1"]);
    let (agent, plain) = (agent(), plain_body());
    let post = |path: &str, body: &str| {
        let request = agent.post(server.url(path)).content_type("application/json");
        let mut response = request.send(body).unwrap();
        assert_eq!(response.status(), 200);
        let _ = response.body_mut().read_to_vec().unwrap(); // so that the connection is used again
    };
    let stream = server.connect();
    stream.set_nodelay(true).unwrap();
    let (mut socket, _) = tungstenite::client(format!("ws://{}", server.address), stream).unwrap();
    let mut until_binary = || while !matches!(socket.read().unwrap(), Message::Binary(_)) {};
    until_binary();

    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for i in 0..320 {
        let step = [
            (
                "library, decoded image",
                timed(&mut || drop(library.act(&image, TASK, None).unwrap())),
            ),
            (
                "library, PNG",
                timed(&mut || {
                    let image = openvla::decode(&file).unwrap();
                    drop(library.act(&image, TASK, None).unwrap());
                }),
            ),
            ("POST /v1/act", timed(&mut || post("/v1/act", &plain))),
            ("POST /act", timed(&mut || post("/act", &act))),
        ];
        for (name, ms) in step {
            if i >= 20 {
                times.entry(name).or_default().push(ms);
            }
        }
    }
    for _ in 0..300 {
        let ms = timed(&mut || {
            socket.send(Message::Binary(frame.clone().into())).unwrap();
            while !matches!(socket.read().unwrap(), Message::Binary(_)) {}
        });
        times.entry("websocket").or_default().push(ms);
    }
    for (name, ms) in times {
        eprintln!("{name:<24} {}", quantiles(ms));
    }
}

fn metric(agent: &ureq::Agent, url: &str, name: &str) -> f64 {
    let response = agent.get(format!("{url}/metrics")).call().unwrap();
    let text = response.into_body().read_to_string().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |number| number.parse().unwrap())
}

/// A thousand idle websockets, 64 robots that ask all the time, and some that behave badly.
#[test]
#[ignore = "takes as long as it is told"]
fn memory_stays_flat_under_load() {
    let own = std::env::var("OPENVLA_LOAD_URL").err();
    let own = own.map(|_| {
        Server::example(&["--threads", "1", "--max-connections", "2000", "--queue", "128"])
    });
    let url = match &own {
        Some(server) => server.url(""),
        None => std::env::var("OPENVLA_LOAD_URL").unwrap(),
    };
    let address = url.strip_prefix("http://").unwrap().to_owned();
    let seconds = std::env::var("OPENVLA_LOAD_SECONDS").map_or(60, |text| text.parse().unwrap());
    let idle: Vec<_> = (0..IDLE)
        .map(|_| {
            let stream = TcpStream::connect(&address).unwrap();
            tungstenite::client(format!("ws://{address}"), stream).unwrap().0
        })
        .collect();
    let idle = Mutex::new(idle);
    let (over, outcomes) = (AtomicBool::new(false), Mutex::new(BTreeMap::<String, usize>::new()));
    let latencies = Mutex::new(Vec::new());
    let (begun, body) = (Instant::now(), plain_body());
    std::thread::scope(|scope| {
        for client in 0..BUSY {
            let (url, body, over) = (&url, &body, &over);
            let (outcomes, latencies) = (&outcomes, &latencies);
            scope.spawn(move || {
                let (agent, name) = (agent(), format!("busy {client}"));
                while !over.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    let request =
                        agent.post(format!("{url}/v1/act")).content_type("application/json");
                    let response = request.header("x-client-id", &name).send(body).unwrap();
                    let outcome = response.status().to_string();
                    let _ = response.into_body().read_to_vec().unwrap();
                    latencies.lock().unwrap().push(asked.elapsed().as_secs_f64() * 1e3);
                    *outcomes.lock().unwrap().entry(outcome).or_default() += 1;
                }
            });
        }
        // Idle clients that still answer pings, as the libraries of robots do by themselves.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for socket in idle.lock().unwrap().iter_mut() {
                    socket.get_ref().set_nonblocking(true).unwrap();
                    let _ = socket.read(); // WouldBlock, mostly
                    let _ = socket.flush(); // the answer to a ping
                }
                std::thread::sleep(Duration::from_secs(2));
            }
        });
        // Half-sent bodies, pipelines that nobody reads, requests whose client dies.
        scope.spawn(|| {
            let mut kept = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let length = body.len();
                let head = format!("POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
                let mut half = TcpStream::connect(&address).unwrap();
                half.write_all(&[head.as_bytes(), &body.as_bytes()[..length / 2]].concat()).unwrap();
                let mut slow = TcpStream::connect(&address).unwrap();
                slow.set_nonblocking(true).unwrap();
                let _ = slow.write(&"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(500).into_bytes());
                kept.push((half, slow));
                let mut dead = TcpStream::connect(&address).unwrap();
                dead.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
                drop(dead);
                kept.drain(..kept.len().saturating_sub(20));
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        let agent = agent();
        while begun.elapsed() < Duration::from_secs(seconds) {
            let [memory, connections, depth] =
                ["openvla_resident_memory_bytes", "openvla_connections", "openvla_queue_depth"]
                    .map(|name| metric(&agent, &url, name));
            let at = begun.elapsed().as_secs();
            eprintln!("{at:>4} s  {:.1} MB, {connections} connections, {depth} wait", memory / 1e6);
            std::thread::sleep(Duration::from_secs(15.min(seconds)));
        }
        over.store(true, Ordering::Relaxed);
    });
    let took = begun.elapsed().as_secs_f64();
    let latencies = latencies.into_inner().unwrap();
    eprintln!("{:.1} requests a second; {}", latencies.len() as f64 / took, quantiles(latencies));
    let agent = agent();
    for name in [
        "openvla_stage_seconds_sum{stage=\"step\"}",
        "openvla_stage_seconds_count{stage=\"step\"}",
        "openvla_dropped_total",
    ] {
        eprintln!("{name} {}", metric(&agent, &url, name));
    }
    let outcomes = outcomes.into_inner().unwrap();
    eprintln!("{outcomes:?}");
    assert_eq!(outcomes.keys().collect::<Vec<_>>(), ["200 OK"], "{outcomes:?}");
}

/// Times of a good client's requests alone, and beside hostile ones. Their pictures take as long as any
/// may, and never come to the model, since their instructions are too long.
#[test]
#[ignore = "measures"]
fn what_hostile_pictures_cost_the_others() {
    // A progressive JPEG of 4096 x 4096 gray pixels and six scans without any data.
    let table = [&[0xFF, 0xD8, 0xFF, 0xDB, 0, 67, 0][..], &[1; 64]].concat();
    let frame = [0xFF, 0xCA, 0, 11, 8, 0x10, 0, 0x10, 0, 1, 1, 0x11, 0];
    let scans = [0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 0, 0].repeat(6);
    let costly = [&table[..], &frame, &scans, &[0xFF, 0xD9]].concat();
    let costly =
        json!({ "image": STANDARD.encode(costly), "instruction": "x".repeat(9000) }).to_string();
    let server = Server::example(&["--threads", "1"]);
    let (url, plain) = (server.url("/v1/act"), plain_body());
    let ask = |agent: &ureq::Agent, body: &str, status: u16| {
        let response = agent.post(&url).content_type("application/json").send(body).unwrap();
        assert_eq!(response.status(), status);
        let _ = response.into_body().read_to_vec().unwrap();
    };
    let times = || {
        let agent = agent();
        quantiles((0..50).map(|_| timed(&mut || ask(&agent, &plain, 200))).collect())
    };
    eprintln!("alone                   {}", times());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let agent = agent();
                while !over.load(Ordering::Relaxed) {
                    ask(&agent, &costly, 400);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(1));
        eprintln!("beside eight hostile    {}", times());
        over.store(true, Ordering::Relaxed);
    });
}
