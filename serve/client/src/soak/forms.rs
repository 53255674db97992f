//! The server's protocols as robots speak them: an observation goes out whole, and one answer comes back.

use std::fmt::Write;
use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_bytes::{ByteBuf, Bytes};
use serde_json::{Value, json};
use tungstenite::Message;

use crate::soak::scene::Scene;
use crate::soak::target::{DEADLINE, Target};
use crate::soak::wire::{Answer, Http, Socket, post};

/// A protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `POST /v1/act`, JSON.
    Json,
    /// The same as a form.
    Multipart,
    /// `POST /act`, json_numpy.
    Act,
    /// openpi's websocket.
    Openpi,
    /// vla-eval's.
    VlaEval,
}

/// What a request says of itself.
#[derive(Debug, Clone, Copy)]
pub struct Says<'a> {
    pub client: Option<&'a str>,
    pub epoch: Option<u64>,
    pub seq: Option<u64>,
    pub timestamp: Option<f64>,
    pub deadline_ms: u64,
}

impl<'a> Says<'a> {
    /// What a good robot says.
    pub fn robot(client: &'a str, seq: u64) -> Self {
        let client = Some(client);
        Self { client, seq: Some(seq), ..Self::default() }
    }

    /// As lines of HTTP.
    fn headers(&self) -> String {
        let mut lines = format!("X-Deadline-Ms: {}\r\n", self.deadline_ms);
        let numbers = [("X-Epoch", self.epoch), ("X-Seq", self.seq)];
        let numbers = numbers.iter().filter_map(|(name, n)| Some((*name, (*n)?.to_string())));
        let timestamp = self.timestamp.map(|at| ("X-Timestamp", at.to_string()));
        let client = self.client.map(|client| ("X-Client-Id", client.to_owned()));
        for (name, value) in numbers.chain(timestamp).chain(client) {
            let _ = write!(lines, "{name}: {value}\r\n"); // a string takes all
        }
        lines
    }
}

impl Default for Says<'_> {
    fn default() -> Self {
        let deadline_ms = DEADLINE.as_millis() as u64;
        Self { client: None, epoch: None, seq: None, timestamp: None, deadline_ms }
    }
}

/// An answer of any protocol.
#[derive(Debug)]
pub struct Said {
    /// `ok`, or the error's code.
    pub outcome: String,
    pub seq: Option<u64>,
    /// Empty where the protocol has no room for them.
    pub tokens: Vec<u32>,
    pub action: Vec<f32>,
    /// Milliseconds between request and motion, by the server's clock.
    pub ms: Option<f64>,
}

/// An open connection.
pub enum Line {
    Http(Form, Http),
    Openpi(Socket),
    VlaEval(Socket),
}

impl Form {
    pub const ALL: [Self; 5] =
        [Self::Json, Self::Multipart, Self::Act, Self::Openpi, Self::VlaEval];

    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "/v1/act",
            Self::Multipart => "/v1/act, a form",
            Self::Act => "/act",
            Self::Openpi => "openpi",
            Self::VlaEval => "vla-eval",
        }
    }

    pub fn open(self, target: &Target) -> io::Result<Line> {
        Ok(match self {
            Self::Openpi => {
                let mut socket = Socket::connect(target, "/")?;
                socket.read()?; // it says first what it serves
                Line::Openpi(socket)
            }
            Self::VlaEval => Line::VlaEval(Socket::connect(target, "/vla-eval")?),
            form => Line::Http(form, Http::connect(target)?),
        })
    }

    /// An observation as it goes over the wire: a whole request, or a frame.
    pub fn bytes(self, target: &Target, scene: &Scene, says: Says) -> Vec<u8> {
        let instruction = &scene.instruction;
        match self {
            Self::Json => {
                let body =
                    json!({ "image": STANDARD.encode(&scene.png), "instruction": instruction });
                post(target, "/v1/act", JSON, &says.headers(), body.to_string().as_bytes())
            }
            Self::Act => {
                let array = json!({ "__numpy__": STANDARD.encode(&scene.pixels), "dtype": "|u1",
                                    "shape": [scene.side, scene.side, 3] });
                let body = json!({ "image": array, "instruction": instruction });
                post(target, "/act", JSON, &says.headers(), body.to_string().as_bytes())
            }
            Self::Multipart => {
                let part = |name: &str| {
                    format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"")
                };
                let image = format!("{}; filename=\"camera.png\"\r\n\r\n", part("image"));
                let text = part("instruction");
                let rest = format!("\r\n{text}\r\n\r\n{instruction}\r\n--{BOUNDARY}--\r\n");
                let body = [image.as_bytes(), &scene.png, rest.as_bytes()].concat();
                let kind = format!("multipart/form-data; boundary={BOUNDARY}");
                post(target, "/v1/act", &kind, &says.headers(), &body)
            }
            Self::Openpi => packed(&Prompted {
                image: Numpy {
                    is_array: true,
                    data: Bytes::new(&scene.pixels),
                    dtype: "|u1",
                    shape: [scene.side, scene.side, 3],
                },
                prompt: instruction,
                client_id: says.client,
                epoch: says.epoch,
                seq: says.seq,
                timestamp: says.timestamp,
                deadline_ms: says.deadline_ms,
            }),
            Self::VlaEval => {
                let data = Bytes::new(&scene.png);
                let (is_image, format) = (true, "png");
                let shape = [scene.side, scene.side, 3];
                let camera = Camera { camera: Picture { is_image, format, data, shape } };
                vla_eval(
                    "observation",
                    says,
                    Seen { images: camera, task_description: instruction },
                )
            }
        }
    }
}

const JSON: &str = "application/json";
const BOUNDARY: &str = "soak-soak-soak";

impl Line {
    pub fn form(&self) -> Form {
        match self {
            Self::Http(form, _) => *form,
            Self::Openpi(_) => Form::Openpi,
            Self::VlaEval(_) => Form::VlaEval,
        }
    }

    pub fn send(&mut self, target: &Target, scene: &Scene, says: Says) -> io::Result<()> {
        let bytes = self.form().bytes(target, scene, says);
        match self {
            Self::Http(_, http) => http.send(&bytes),
            Self::Openpi(socket) | Self::VlaEval(socket) => socket.send(bytes),
        }
    }

    /// The next answer.
    pub fn receive(&mut self) -> io::Result<Said> {
        match self {
            Self::Http(form, http) => Ok(Said::of_http(*form, &http.answer()?)),
            Self::Openpi(socket) => Said::of_openpi(socket.read()?),
            Self::VlaEval(socket) => Said::of_vla_eval(socket.read()?),
        }
    }

    /// Whether there is an answer to nothing. Websockets are known by the count of their answers.
    pub fn has_more(&mut self) -> bool {
        match self {
            Self::Http(_, http) => http.has_more(),
            Self::Openpi(_) | Self::VlaEval(_) => false,
        }
    }
}

/// The bytes of an array.
#[derive(Deserialize)]
struct Array {
    data: ByteBuf,
}

impl Said {
    fn refused(outcome: &str, seq: Option<u64>) -> Self {
        Self { outcome: outcome.to_owned(), seq, tokens: Vec::new(), action: Vec::new(), ms: None }
    }

    fn of_http(form: Form, answer: &Answer) -> Self {
        let json = answer.json();
        let mut said = Self::refused(&answer.outcome(), None);
        if answer.status != 200 {
            return said;
        }
        if form == Form::Act {
            let header = |name: &str| answer.header(name).unwrap_or_default();
            said.seq = header("x-seq").parse().ok();
            said.tokens = header("x-openvla-tokens").split(',').flat_map(str::parse).collect();
            said.action = doubles(&STANDARD.decode(text(&json["__numpy__"])).unwrap_or_default());
            let times = header("server-timing").split("dur=").skip(1);
            let times = times.filter_map(|rest| rest.split(',').next()?.parse::<f64>().ok());
            said.ms = Some(times.sum());
        } else {
            said.seq = json["seq"].as_u64();
            said.tokens = serde_json::from_value(json["tokens"].clone()).unwrap_or_default();
            said.action = serde_json::from_value(json["action"].clone()).unwrap_or_default();
            let times = &json["timing_ms"];
            said.ms = times["queue"].as_f64().zip(times["step"].as_f64()).map(|(q, s)| q + s);
        }
        said
    }

    fn of_openpi(message: Message) -> io::Result<Self> {
        #[derive(Deserialize)]
        struct Reply {
            actions: Array,
            tokens: Vec<u32>,
            seq: Option<u64>,
            server_timing: Timing,
        }
        #[derive(Deserialize)]
        struct Timing {
            infer_ms: f64,
            queue_ms: f64,
        }
        let frame = match message {
            Message::Text(text) => {
                let error: Value = serde_json::from_str(&text)?;
                return Ok(Self::refused(self::text(&error["code"]), None));
            }
            message => message.into_data(),
        };
        let reply: Reply = rmp_serde::from_slice(&frame).map_err(io::Error::other)?;
        let Timing { infer_ms, queue_ms } = reply.server_timing;
        let (seq, action) = (reply.seq, doubles(&reply.actions.data));
        Ok(Self {
            seq,
            tokens: reply.tokens,
            action,
            ms: Some(infer_ms + queue_ms),
            ..Self::refused("ok", None)
        })
    }

    fn of_vla_eval(message: Message) -> io::Result<Self> {
        #[derive(Deserialize)]
        struct Reply {
            payload: Payload,
            seq: u64,
        }
        #[derive(Deserialize)]
        struct Payload {
            actions: Option<Array>,
            error: Option<String>,
        }
        let frame = message.into_data();
        let Reply { payload, seq } = rmp_serde::from_slice(&frame).map_err(io::Error::other)?;
        let Some(actions) = payload.actions else {
            // `observation_failed: CODE: why`
            let error = payload.error.unwrap_or_default();
            let code = error.split(": ").nth(1).unwrap_or("other");
            return Ok(Self::refused(code, Some(seq)));
        };
        let numbers = actions.data.chunks_exact(4);
        let action = numbers.map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect();
        Ok(Self { action, ..Self::refused("ok", Some(seq)) })
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("other")
}

fn doubles(bytes: &[u8]) -> Vec<f32> {
    let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().unwrap_or_default()) as f32;
    bytes.chunks_exact(8).map(number).collect()
}

fn packed(frame: &impl Serialize) -> Vec<u8> {
    rmp_serde::to_vec_named(frame).expect("strings, numbers and bytes")
}

/// A frame of vla-eval's.
pub fn vla_eval(kind: &str, says: Says, payload: impl Serialize) -> Vec<u8> {
    #[derive(Serialize)]
    struct Frame<'a, P> {
        r#type: &'a str,
        payload: P,
        seq: u64,
        timestamp: f64,
    }
    let (seq, timestamp) = (says.seq.unwrap_or(0), says.timestamp.unwrap_or(0.0));
    packed(&Frame { r#type: kind, payload, seq, timestamp })
}

/// What openpi's client sends.
#[derive(Serialize)]
struct Prompted<'a> {
    #[serde(rename = "observation/image")]
    image: Numpy<'a>,
    prompt: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<f64>,
    deadline_ms: u64,
}

#[derive(Serialize)]
struct Numpy<'a> {
    #[serde(rename = "__ndarray__")]
    is_array: bool,
    data: &'a Bytes,
    dtype: &'static str,
    shape: [usize; 3],
}

/// What vla-eval's client sends.
#[derive(Serialize)]
struct Seen<'a> {
    images: Camera<'a>,
    task_description: &'a str,
}

#[derive(Serialize)]
struct Camera<'a> {
    camera: Picture<'a>,
}

#[derive(Serialize)]
struct Picture<'a> {
    #[serde(rename = "__image__")]
    is_image: bool,
    format: &'static str,
    data: &'a Bytes,
    shape: [usize; 3],
}
