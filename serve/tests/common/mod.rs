//! A server in this process, with a model that does what its instruction says.

#![allow(dead_code)] // each test binary uses its own part

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use openvla::image::{ImageFormat, RgbImage};
use openvla::prompt::{OPENVLA, Prompt};
use openvla::{
    ActionSpace, Bounds, OftConfig, OftHead, OpenVla, Preprocess, Profile, Resize, Session,
    Statistics, Timing,
};
use openvla_serve::models::{Files, Models};
use openvla_serve::observation::{Draft, Motion, Observation};
use openvla_serve::options::Options;
use openvla_serve::policy::{ModelInfo, Policy};
use openvla_serve::server::serve;
use openvla_serve::tokens::Tokens;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// What the reference's captures were answered.
pub const ACTION: [f64; 7] = [-0.0125, 0.0239, -0.0156, -0.0468, 0.0441, 0.1224, 0.99607843137];

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Doors that steps wait at: "wait" in the instruction.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<usize>, Condvar)>);

impl Gate {
    /// Lets so many steps pass.
    pub fn open(&self, n: usize) {
        *self.0.0.lock().unwrap() += n;
        self.0.1.notify_all();
    }

    pub fn pass(&self) {
        let left = self.0.0.lock().unwrap();
        *self.0.1.wait_while(left, |left| *left == 0).unwrap() -= 1;
    }
}

/// A model for tests. The instruction says what it does.
#[derive(Clone)]
pub struct Stub {
    gate: Gate,
    saw: Sender<Observation>,
    oft: Option<OftConfig>,
    pub fingerprint: String,
    /// Whether every step fails.
    pub fails: bool,
}

impl Stub {
    pub fn new(gate: Gate, saw: Sender<Observation>) -> Self {
        Self { gate, saw, oft: None, fingerprint: "0123456789abcdef".into(), fails: false }
    }
}

impl Policy for Stub {
    fn info(&self) -> ModelInfo {
        let (q01, q99, mask) = ([-0.1; 7], [0.1; 7], [vec![true; 6], vec![false]].concat());
        let dataset = json!({ "action": { "q01": q01, "q99": q99, "mask": mask } });
        let statistics = json!({ "bridge_orig": dataset, "fractal20220817_data": dataset });
        ModelInfo {
            name: "a stub".into(),
            file: "built-in".into(),
            fingerprint: self.fingerprint.clone(),
            image_size: 224,
            preprocess: None,
            shown: Preprocess {
                profile: Profile::Raw,
                center_crop: false,
                size: 224,
                resize: Resize::Naive,
                towers: Vec::new(),
            },
            actions: ActionSpace { end: 32_000, n_bin: 256 },
            oft: self.oft.clone(),
            prompt: Some(Prompt::new(OPENVLA.into(), 29_871).unwrap()),
            statistics: Statistics::parse(statistics.to_string()).unwrap(),
            memory: vec![("CPU".into(), 42)],
            scratch: 0,
        }
    }

    fn max_batch(&self) -> usize {
        8
    }

    fn act(
        &mut self,
        _: &mut Session,
        observation: &Observation,
        key: Option<&str>,
    ) -> openvla::Result<Motion> {
        assert!(!self.fails, "as it was told");
        let instruction = observation.instruction.as_str();
        if instruction != "warm up" {
            let _ = self.saw.send(observation.clone()); // a test may not look
        }
        let mut action = ACTION.to_vec();
        match instruction.split_once(' ').unwrap_or((instruction, "")) {
            ("wait", _) => self.gate.pass(),
            ("panic", _) => panic!("as it was told"),
            ("nan", _) => action[2] = f64::NAN,
            ("break", _) => {
                let why = std::io::Error::other("the device is gone");
                return Err(openvla::Error::Read { path: "/dev/null".into(), why });
            }
            ("move", x) => action = vec![x.parse().unwrap(); 7],
            _ => {}
        }
        let key = key.unwrap_or("bridge_orig");
        self.info().statistics.select(Some(key))?;
        let chunk = self.oft.as_ref().map_or(1, |oft| oft.chunk);
        Ok(Motion {
            normalized: vec![action.clone(); chunk],
            actions: vec![action; chunk],
            tokens: vec![31_872; 7],
            logits: Vec::new(),
            unnorm_key: key.into(),
            unconstrained: (vec![31_872; 7], !instruction.contains("unsure")),
            draft: Draft { passes: 7, accepted: vec![false; 6] },
            timing: Timing::default(),
        })
    }
}

/// A server of its own, stopped when dropped.
pub struct Server {
    pub address: SocketAddr,
    pub gate: Gate,
    pub saw: Receiver<Observation>,
    pub tokens: Arc<Tokens>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
    agent: ureq::Agent,
}

impl Server {
    /// With the stub.
    pub fn start(args: &[&str]) -> Self {
        let (gate, (send, saw)) = (Gate::default(), channel());
        let stub = Stub::new(gate.clone(), send);
        Self::with(args, gate, saw, move || Ok(stub.clone())).ready()
    }

    /// With a stub that computes chunks, of three cameras and a state.
    pub fn oft(args: &[&str]) -> Self {
        let (gate, (send, saw)) = (Gate::default(), channel());
        let oft = OftConfig {
            chunk: 4,
            n_action: 7,
            n_state: 3,
            cameras: ["full_image", "left_wrist_image", "right_wrist_image"]
                .map(String::from)
                .into(),
            bounds: Bounds::Quantiles,
            head: OftHead::L1,
            film: false,
        };
        let stub = Stub { oft: Some(oft), ..Stub::new(gate.clone(), send) };
        Self::with(args, gate, saw, move || Ok(stub.clone())).ready()
    }

    /// With the example checkpoint.
    pub fn example(args: &[&str]) -> Self {
        let model = options(args).model;
        Self::with(args, Gate::default(), channel().1, Files(model)).ready()
    }

    /// With whatever opens, ready or not.
    pub fn with(
        args: &[&str],
        gate: Gate,
        saw: Receiver<Observation>,
        models: impl Models,
    ) -> Self {
        let settings = options(args).settings;
        let tokens = settings.tokens().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let (send, address) = channel();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let known = Arc::clone(&tokens);
        let thread = std::thread::spawn(move || {
            let served = runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                send.send(listener.local_addr().unwrap()).unwrap();
                let stop = async { stopped.await.unwrap_or(()) };
                serve(listener, settings, known, models, stop).await
            });
            runtime.shutdown_background();
            served
        });
        let address = address.recv_timeout(PATIENCE).unwrap();
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build()
            .into();
        Self { address, gate, saw, tokens, stop: Some(stop), thread: Some(thread), agent }
    }

    fn ready(self) -> Self {
        self.wait_for("/readyz", 200);
        self
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Asks until the status is this one.
    pub fn wait_for(&self, path: &str, status: u16) {
        for _ in 0..600 {
            if self.get(path, &[]).status == status {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{path} never was {status}: {:?}", self.get(path, &[]));
    }

    pub fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let request = self.agent.get(self.url(path));
        let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
        read(request.call().unwrap())
    }

    pub fn post(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let request = self.agent.post(self.url(path));
        let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
        read(request.send(body).unwrap())
    }

    /// A step of the plain protocol with a picture of 2 x 2 pixels.
    pub fn step(&self, instruction: &str, headers: &[(&str, &str)]) -> Answer {
        let body = json!({ "image": STANDARD.encode(png(2, 2)), "instruction": instruction });
        let headers = [headers, &[("content-type", "application/json")]].concat();
        self.post("/v1/act", &headers, body.to_string().as_bytes())
    }

    /// A step in a thread of its own.
    pub fn step_beside(&self, instruction: &str, headers: &[(&str, &str)]) -> JoinHandle<Answer> {
        let body = json!({ "image": STANDARD.encode(png(2, 2)), "instruction": instruction });
        let mut request = self.agent.post(self.url("/v1/act")).content_type("application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        std::thread::spawn(move || read(request.send(body.to_string().as_bytes()).unwrap()))
    }

    /// The number of a line of the metrics.
    pub fn metric(&self, name: &str) -> f64 {
        let text = String::from_utf8(self.get("/metrics", &[]).body).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |number| number.parse().unwrap())
    }

    /// Waits until a metric is this.
    pub fn wait_for_metric(&self, name: &str, number: f64) {
        for _ in 0..600 {
            if self.metric(name) == number {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{name} is {}, not {number}", self.metric(name));
    }

    /// What the model saw next.
    pub fn seen(&self) -> Observation {
        self.saw.recv_timeout(PATIENCE).unwrap()
    }

    /// Asks it to end.
    pub fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// How it ended.
    pub fn ended(&mut self) -> Result<()> {
        self.thread.take().unwrap().join().unwrap()
    }

    /// A connection and nothing else.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// What is answered to bytes, until the server closes.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes); // the server may close before it has read all
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer); // so it may be reset
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.gate.open(1000);
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(()); // it may have ended by itself
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn options(args: &[&str]) -> Options {
    let fixed = ["openvla-serve", "--drain-s", "20"];
    Options::parse_from(fixed.iter().chain(args))
}

/// An answer as it came.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// An error of this status and code, with a sentence.
    pub fn assert_error(&self, status: u16, code: &str) -> Value {
        let json = self.json();
        assert_eq!((self.status, json["code"].as_str()), (status, Some(code)), "{json}");
        assert!(json["message"].as_str().unwrap().len() > 10, "{json}");
        json
    }
}

fn read(mut response: ureq::http::Response<ureq::Body>) -> Answer {
    let text = |value: &ureq::http::HeaderValue| value.to_str().unwrap().to_owned();
    let headers = response.headers().iter();
    let headers = headers.map(|(name, value)| (name.to_string(), text(value))).collect();
    let status = response.status().as_u16();
    Answer { status, headers, body: response.body_mut().read_to_vec().unwrap() }
}

/// A picture file.
pub fn png(width: u32, height: u32) -> Vec<u8> {
    let image = RgbImage::from_fn(width, height, |x, y| {
        openvla::image::Rgb([x, y, x * y].map(|v| v as u8))
    });
    let mut file = std::io::Cursor::new(Vec::new());
    image.write_to(&mut file, ImageFormat::Png).unwrap();
    file.into_inner()
}

/// A body of the reference's protocol.
pub fn numpy_body(instruction: &str) -> String {
    let array =
        json!({ "__numpy__": "AAECAwQFBgcICQoLDA0ODxAR", "dtype": "|u1", "shape": [2, 3, 3] });
    json!({ "image": array, "instruction": instruction }).to_string()
}

/// The example checkpoint, alone.
pub fn example(args: &[&str]) -> OpenVla {
    match options(args).model.open().unwrap() {
        openvla::Policy::OpenVla(policy) => policy,
        openvla::Policy::Oft(_) => unreachable!("the built-in example is an OpenVLA"),
    }
}
