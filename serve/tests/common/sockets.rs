//! Both websocket protocols, as far as tests of what surrounds them need.

#![allow(dead_code)] // each test binary uses its own part

use std::net::TcpStream;

use openvla_serve::field::Field;
use openvla_serve::numpy::{Msgpack, Ndarray};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tungstenite::client::IntoClientRequest;
use tungstenite::handshake::HandshakeError;
use tungstenite::{Error, Message, WebSocket, client};

use crate::common::Server;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    OpenPi,
    VlaEval,
}

/// A robot with a connection.
pub struct Robot {
    form: Form,
    socket: WebSocket<TcpStream>,
    seq: u64,
}

#[derive(Serialize)]
struct OpenPiFrame<'a> {
    image: Msgpack<'a>,
    prompt: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<&'a str>,
}

#[derive(Deserialize)]
struct OpenPiReply<'a> {
    #[serde(borrow)]
    actions: Field<'a>,
}

#[derive(Serialize)]
struct VlaEvalFrame<'a> {
    r#type: &'a str,
    payload: Payload<'a>,
    seq: u64,
    timestamp: f64,
}

#[derive(Serialize)]
struct Payload<'a> {
    images: Images,
    task_description: &'a str,
}

#[derive(Serialize)]
struct Images {
    agentview: Array,
}

/// An array of numpy's, as vla-eval packs it.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
pub struct Array {
    #[serde(rename = "__ndarray__")]
    pub is_array: bool,
    pub data: ByteBuf,
    pub dtype: String,
    pub shape: Vec<usize>,
}

#[derive(Deserialize)]
struct VlaEvalReply {
    payload: ReplyPayload,
}

#[derive(Deserialize)]
struct ReplyPayload {
    #[serde(default)]
    actions: Option<Array>,
    #[serde(default)]
    error: Option<String>,
}

impl Robot {
    /// Connects, or says with which status that was refused.
    pub fn connect(server: &Server, form: Form, token: Option<&str>) -> Result<Self, u16> {
        let path = if form == Form::OpenPi { "/" } else { "/vla-eval" };
        let url = format!("ws://{}{path}", server.address);
        let mut request = url.into_client_request().unwrap();
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().unwrap();
            request.headers_mut().insert("authorization", value);
        }
        let mut socket = match client(request, server.connect()) {
            Ok((socket, _)) => socket,
            Err(HandshakeError::Failure(Error::Http(refused))) => {
                return Err(refused.status().as_u16());
            }
            Err(other) => panic!("{other}"),
        };
        if form == Form::OpenPi {
            message(&mut socket); // what is served
        }
        Ok(Self { form, socket, seq: 0 })
    }

    /// A motion for a picture of 2 x 2 pixels, or the error's code and message.
    pub fn step(&mut self, instruction: &str) -> Result<Vec<f64>, String> {
        self.step_of(Some(&[7; 12]), instruction, None)
    }

    /// The same for a square picture, and by a name that openpi's frames have room for.
    pub fn step_of(
        &mut self,
        pixels: Option<&[u8]>,
        instruction: &str,
        client_id: Option<&str>,
    ) -> Result<Vec<f64>, String> {
        self.seq += 1;
        let pixels = pixels.unwrap_or_default();
        let side = (pixels.len() / 3).isqrt();
        let (dtype, shape) = ("|u1".to_owned(), vec![side, side, 3]);
        let frame = match self.form {
            Form::OpenPi => {
                let array = Ndarray { dtype: dtype.into(), shape, data: pixels.into() };
                let frame = OpenPiFrame { image: Msgpack(array), prompt: instruction, client_id };
                rmp_serde::to_vec_named(&frame)
            }
            Form::VlaEval => {
                let data = ByteBuf::from(pixels);
                let images = Images { agentview: Array { is_array: true, data, dtype, shape } };
                let payload = Payload { images, task_description: instruction };
                let (r#type, seq, timestamp) = ("observation", self.seq, 1.8e9);
                rmp_serde::to_vec_named(&VlaEvalFrame { r#type, payload, seq, timestamp })
            }
        };
        self.socket.send(Message::Binary(frame.unwrap().into())).unwrap();
        let numbers = |data: &[u8], size: usize| -> Vec<f64> {
            let number = |x: &[u8]| match *x {
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).into(),
                _ => f64::from_le_bytes(x.try_into().unwrap()),
            };
            data.chunks(size).map(number).collect()
        };
        match (self.form, message(&mut self.socket)) {
            (Form::OpenPi, Message::Text(text)) => {
                let error: serde_json::Value = serde_json::from_str(&text).unwrap();
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                Err(format!("{}: {}", text("code"), text("message")))
            }
            (Form::OpenPi, Message::Binary(bytes)) => {
                let reply: OpenPiReply<'_> = rmp_serde::from_slice(&bytes).unwrap();
                Ok(numbers(&reply.actions.array("actions").unwrap().data, 8))
            }
            (Form::VlaEval, Message::Binary(bytes)) => {
                let reply: VlaEvalReply = rmp_serde::from_slice(&bytes).unwrap();
                match reply.payload {
                    ReplyPayload { actions: Some(array), .. } => Ok(numbers(&array.data, 4)),
                    ReplyPayload { error, .. } => Err(error.unwrap()),
                }
            }
            (_, other) => panic!("{other:?}"),
        }
    }
}

/// The next message that is none of the protocol's own.
fn message(socket: &mut WebSocket<TcpStream>) -> Message {
    loop {
        match socket.read().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}
