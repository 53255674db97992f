//! Bytes to a server and back: HTTP of which any part can be left out, and websockets.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use serde_json::Value;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

use crate::soak::target::Target;

/// For how long an answer is waited for. Deadlines are far shorter.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection that speaks HTTP/1.1.
pub struct Http {
    pub stream: TcpStream,
    /// Bytes that came and belong to no answer yet.
    rest: Vec<u8>,
}

/// An answer as it came.
pub struct Answer {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Http {
    pub fn connect(target: &Target) -> io::Result<Self> {
        Ok(Self { stream: connect(target)?, rest: Vec::new() })
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next answer, whole.
    pub fn answer(&mut self) -> io::Result<Answer> {
        loop {
            if let Some((answer, n)) = parse(&self.rest)? {
                self.rest.drain(..n);
                return Ok(answer);
            }
            let mut bytes = [0; 1 << 14];
            match self.stream.read(&mut bytes)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.rest.extend_from_slice(&bytes[..n]),
            }
        }
    }

    /// Whether more came than was asked for: a request has one answer.
    pub fn has_more(&mut self) -> bool {
        let _ = self.stream.set_nonblocking(true); // then nothing is found
        let more = self.stream.peek(&mut [0]).is_ok_and(|n| n > 0);
        let _ = self.stream.set_nonblocking(false);
        more || !self.rest.is_empty()
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// `ok`, or the error's code.
    pub fn outcome(&self) -> String {
        match (self.status, self.json()["code"].as_str()) {
            (200, _) => "ok".to_owned(),
            (_, Some(code)) => code.to_owned(),
            (status, None) => status.to_string(),
        }
    }
}

/// The answer that bytes begin with, if it is whole, and how many bytes it has.
fn parse(bytes: &[u8]) -> io::Result<Option<(Answer, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut headers);
    let status =
        head.parse(bytes).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?;
    let (httparse::Status::Complete(start), Some(code)) = (status, head.code) else {
        return Ok(None);
    };
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let headers = head.headers.iter().map(|header| (header.name.to_owned(), text(header.value)));
    let mut answer = Answer { status: code, headers: headers.collect(), body: Vec::new() };
    let length = answer.header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    let Some(body) = bytes[start..].get(..length) else { return Ok(None) };
    answer.body = body.to_vec();
    Ok(Some((answer, start + length)))
}

/// A request with a body; `headers` are whole lines.
pub fn post(target: &Target, path: &str, kind: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let (host, n, token) = (&target.address, body.len(), target.authorization());
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {n}\r\n{token}{headers}\r\n"
    );
    [head.as_bytes(), body].concat()
}

pub fn get(target: &Target, path: &str) -> Vec<u8> {
    let (host, token) = (&target.address, target.authorization());
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{token}\r\n").into_bytes()
}

fn connect(target: &Target) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(&target.address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// An open websocket.
pub struct Socket(WebSocket<TcpStream>);

impl Socket {
    pub fn connect(target: &Target, path: &str) -> io::Result<Self> {
        let url = format!("ws://{}{path}", target.address);
        let mut request = url.into_client_request().map_err(io::Error::other)?;
        if let Some(token) = target.token.as_ref().and_then(|token| token.parse().ok()) {
            request.headers_mut().insert("authorization", token);
        }
        let opened = tungstenite::client(request, connect(target)?).map_err(io::Error::other)?;
        Ok(Self(opened.0))
    }

    pub fn send(&mut self, frame: Vec<u8>) -> io::Result<()> {
        self.0.send(Message::Binary(frame.into())).map_err(io::Error::other)
    }

    /// The next message that is none of the protocol's own.
    pub fn read(&mut self) -> io::Result<Message> {
        loop {
            match self.0.read().map_err(io::Error::other)? {
                Message::Ping(_) | Message::Pong(_) => {}
                Message::Close(_) => return Err(io::ErrorKind::ConnectionAborted.into()),
                message => return Ok(message),
            }
        }
    }

    /// Begins a binary frame of `n` bytes, sends some of it, and hangs up.
    pub fn break_off(mut self, n: u16, some: &[u8]) -> io::Result<()> {
        let stream = self.0.get_mut();
        let [high, low] = n.to_be_bytes();
        // Final, binary; masked with zeros, a length of 16 bits.
        stream.write_all(&[0x82, 0x80 | 126, high, low, 0, 0, 0, 0])?;
        stream.write_all(some)?;
        stream.shutdown(Shutdown::Both)
    }
}
