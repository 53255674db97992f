//! What the websocket protocols share: the handshake, frames with patience, an end that says why.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::response::{IntoResponse, Response};
use tokio::time::timeout;

use crate::app::App;
use crate::error::{Code, Error};

/// Bytes that each connection keeps to read into: an eighth of what the library would take.
const READ_BUFFER: usize = 1 << 14;

/// An open connection.
pub struct Socket {
    socket: WebSocket,
    /// How long the client may take to read a frame.
    patience: Duration,
}

/// The connection is over.
pub struct Disconnected;

/// What a client sent.
pub enum Frame {
    /// A message.
    Binary(Bytes),
    /// Text, which no protocol here has.
    Text,
    /// A ping, or the answer to one: the client is there.
    Alive,
}

/// Answers a handshake: `talk` gets the connection, or the client the reason why there is none. `whose` names the
/// protocol to who comes without a websocket.
pub fn accept<F: Future<Output = ()> + Send + 'static>(
    app: &Arc<App>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    whose: &str,
    talk: impl FnOnce(Socket) -> F + Send + 'static,
) -> Response {
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade,
        Err(why) => {
            let message = format!("{whose}'s websocket is here: {}", why.body_text());
            let hint = "see /openapi.json for what plain HTTP takes";
            return Error::new(Code::UpgradeRequired, message).hint(hint).into_response();
        }
    };
    if let Err(error) = app.engine.check_ready(app.settings.stall()) {
        return error.into_response();
    }
    let (limit, patience) = (app.settings.max_body, app.settings.patience());
    let upgrade = upgrade.max_message_size(limit).max_frame_size(limit);
    let upgrade = upgrade.read_buffer_size(READ_BUFFER);
    upgrade.on_upgrade(move |socket| talk(Socket { socket, patience }))
}

impl Socket {
    /// The next frame. Nothing is lost if it is not waited for to the end.
    pub async fn next(&mut self) -> Result<Frame, Disconnected> {
        match self.socket.recv().await.ok_or(Disconnected)?.map_err(|_| Disconnected)? {
            Message::Binary(frame) => Ok(Frame::Binary(frame)),
            Message::Text(_) => Ok(Frame::Text),
            Message::Ping(_) | Message::Pong(_) => Ok(Frame::Alive),
            Message::Close(_) => Err(Disconnected),
        }
    }

    /// Sends a frame of msgpack.
    pub async fn send_binary(&mut self, frame: Vec<u8>) -> Result<(), Disconnected> {
        self.send(Message::Binary(frame.into())).await
    }

    /// Sends text.
    pub async fn send_text(&mut self, text: String) -> Result<(), Disconnected> {
        self.send(Message::Text(text.into())).await
    }

    /// Asks whether the client is there.
    pub async fn ping(&mut self) -> Result<(), Disconnected> {
        self.send(Message::Ping(Bytes::new())).await
    }

    /// Says why it ends, and waits a little for the client to agree.
    pub async fn close(&mut self, code: u16, reason: &'static str) -> Result<(), Disconnected> {
        let frame = CloseFrame { code, reason: reason.into() };
        self.send(Message::Close(Some(frame))).await?;
        let agreed = async { while let Some(Ok(_)) = self.socket.recv().await {} };
        let _ = timeout(Duration::from_secs(1), agreed).await; // it need not
        Err(Disconnected)
    }

    async fn send(&mut self, message: Message) -> Result<(), Disconnected> {
        let sent = timeout(self.patience, self.socket.send(message)).await;
        sent.map_err(|_| Disconnected)?.map_err(|_| Disconnected)
    }
}
