//! A client of openvla-serve: a picture and an instruction go there, a motion comes back.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::http::{Response, Uri};
use ureq::{Body, RequestBuilder};

/// Which server, and as whom.
#[derive(Debug, Clone, clap::Args)]
pub struct Server {
    /// Where openvla-serve listens
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// File with its token
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The data set whose units are wanted
    #[arg(long, value_name = "KEY")]
    pub unnorm_key: Option<String>,
    /// This robot's name; a program that begins anew needs a new one
    #[arg(long, default_value_t = format!("client-{}", std::process::id()))]
    pub client_id: String,
    /// For how long an answer is worth something
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub deadline_ms: u64,
}

/// The server's `POST /v1/act`, over connections that are kept. Clones share them.
#[derive(Debug, Clone)]
pub struct Client {
    server: Server,
    url: String,
    authorization: Option<String>,
    agent: ureq::Agent,
    /// What every request says beside picture and instruction.
    fields: Map<String, Value>,
}

/// What a server serves.
#[derive(Debug, Clone, Deserialize)]
pub struct Model {
    /// Sides of the square that pictures become, in pixels.
    pub image_size: u32,
    /// Actions of an answer.
    pub action_horizon: usize,
    /// Whose pictures an OpenVLA-OFT is shown, in its order; `None` of an OpenVLA.
    pub cameras: Option<Vec<String>>,
    /// Numbers of the arm's state that an OpenVLA-OFT reads.
    #[serde(default)]
    pub state_length: usize,
}

/// Why there is no motion.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The server's code, such as `superseded`; `no_answer` if it did not answer.
    pub code: String,
    /// A sentence for people, with what to try.
    pub why: String,
}

/// The answer's JSON object, `action` or `actions` among it, or why there is none.
pub type Reply = std::result::Result<Value, Refusal>;

impl Client {
    /// Reads the token. Nothing is sent yet.
    ///
    /// # Errors
    /// If the token's file cannot be read.
    pub fn new(server: Server) -> Result<Self> {
        let token = server.token_file.as_ref().map(|path| {
            let text = std::fs::read_to_string(path);
            text.with_context(|| format!("cannot read {}", path.display()))
        });
        let authorization = token.transpose()?.map(|text| format!("Bearer {}", text.trim()));
        let url = server.url.trim_end_matches('/').to_owned();
        let proxy = ureq::Proxy::try_from_env().filter(|_| !is_loopback(&url));
        let agent = ureq::Agent::config_builder()
            .proxy(proxy)
            .http_status_as_error(false)
            // The server answers in time; this is for a network that does not.
            .timeout_global(Some(Duration::from_millis(server.deadline_ms.saturating_add(2000))))
            .build();
        Ok(Self { server, url, authorization, agent: agent.into(), fields: Map::new() })
    }

    /// The header `Authorization` that requests have.
    pub fn authorization(&self) -> Option<&String> {
        self.authorization.as_ref()
    }

    /// Adds what an OpenVLA-OFT model reads beside the picture: picture files of its wrist cameras, in its order, and
    /// the arm's state. All further requests send it.
    pub fn with_arm(mut self, wrists: &[Vec<u8>], state: Option<&[f64]>) -> Self {
        for (i, wrist) in wrists.iter().enumerate() {
            // Fields are sent in the order of their names.
            self.fields.insert(format!("wrist_image_{i:03}"), STANDARD.encode(wrist).into());
        }
        self.fields.extend(state.map(|state| ("state".to_owned(), state.into())));
        self
    }

    /// Asks what is served.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn model(&self) -> std::result::Result<Model, Refusal> {
        let url = format!("{}/v1/model", self.url);
        let answer = self.answer(&url, self.authorized(self.agent.get(&url)).call())?;
        let lost =
            |error: serde_json::Error| Refusal { code: "no_answer".into(), why: error.to_string() };
        serde_json::from_value(answer).map_err(lost)
    }

    /// Asks for the motion that belongs to a picture file's bytes. `seq` counts the pictures, `taken` is when
    /// the camera took it; the server refuses what is older than what came before.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn act(&self, seq: u64, taken: SystemTime, picture: &[u8], instruction: &str) -> Reply {
        let since = taken.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (image, unnorm_key) = (STANDARD.encode(picture), &self.server.unnorm_key);
        let mut body = self.fields.clone();
        let seen = json!({ "image": image, "instruction": instruction, "unnorm_key": unnorm_key });
        body.extend(seen.as_object().cloned().unwrap_or_default());
        let url = format!("{}/v1/act", self.url);
        let request = self
            .authorized(self.agent.post(&url))
            .content_type("application/json")
            .header("X-Client-Id", &self.server.client_id)
            .header("X-Seq", seq.to_string())
            .header("X-Timestamp", since.as_secs_f64().to_string())
            .header("X-Deadline-Ms", self.server.deadline_ms.to_string());
        self.answer(&url, request.send(Value::Object(body).to_string()))
    }

    fn authorized<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.authorization {
            Some(authorization) => request.header("Authorization", authorization),
            None => request,
        }
    }

    /// The object that a server answered, or why it did not.
    fn answer(
        &self,
        url: &str,
        response: std::result::Result<Response<Body>, ureq::Error>,
    ) -> Reply {
        let lost = |error| Refusal { code: "no_answer".into(), why: self.no_answer(url, &error) };
        let mut response = response.map_err(lost)?;
        let bytes = response.body_mut().read_to_vec().map_err(lost)?;
        let answer: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if response.status().is_success() {
            return Ok(answer);
        }
        let text = |key: &str| answer[key].as_str().unwrap_or("no reason given").to_owned();
        Err(Refusal { code: text("code"), why: [text("message"), text("hint")].join("; ") })
    }

    /// Who was asked, through whom, and what came of it. A proxy's password is not shown.
    fn no_answer(&self, url: &str, error: &ureq::Error) -> String {
        let uri = url.parse().unwrap_or_default();
        let proxy = self.agent.config().proxy().filter(|proxy| !proxy.is_no_proxy(&uri));
        let through = proxy.map(|proxy| {
            let (host, port) = (proxy.host(), proxy.port());
            format!(" through the proxy {host}:{port} (no_proxy=HOST goes around it)")
        });
        format!("{url}{}: {error}", through.unwrap_or_default())
    }
}

/// Whether a URL is this machine's, whose proxy cannot know it.
fn is_loopback(url: &str) -> bool {
    let uri = url.parse::<Uri>().unwrap_or_default();
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let address = host.parse::<IpAddr>().map(|address| address.to_canonical());
    address.map_or(host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}
