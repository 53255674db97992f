//! The command line of `openvla-serve`, and with it everything that can be set.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, Parser};
use openvla::OpenVla;
use openvla::cli::{ModelArgs, between, output_file};
use prometheus_client::metrics::counter::Counter;

use crate::audit::Audit;
use crate::queue::Limits;
use crate::safety::Safety;
use crate::tokens::Tokens;
use crate::worker::{OnFailure, Rules};

/// Serves an OpenVLA model to robots: `POST /act` as the reference, openpi's websocket at `/`,
/// vla-eval's at `/vla-eval`, and `POST /v1/act` with a PNG or JPEG. A browser sees at `/` what the robots do.
/// `GET /openapi.json` describes it all.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Options {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The server.
    #[command(flatten)]
    pub settings: Settings,
    /// Log lines of this level and above
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: tracing::Level,
    /// Log JSON, one object a line
    #[arg(long)]
    pub log_json: bool,
}

/// How the server serves.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Address to listen on; other machines need a token, or --insecure
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", value_parser = host)]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one [default: 8000; 8777 for OpenVLA-OFT]
    #[arg(long)]
    pub port: Option<u16>,
    /// File with the token that clients must show: `Authorization: Bearer …`, or `Api-Key …`; it may do everything
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// File with a line for each client, NAME SCOPES TOKEN; scopes are act, watch and admin, as in act,watch. SIGHUP
    /// reads it again
    #[arg(long, value_name = "FILE")]
    pub client_tokens: Option<PathBuf>,
    /// Listen on any address without a token
    #[arg(long)]
    pub insecure: bool,
    /// Data set of requests that name none; needed if the model knows several
    #[arg(long, value_name = "KEY")]
    pub unnorm_key: Option<String>,
    /// How long a request may take, unless it says so itself
    #[arg(long, value_name = "MS", default_value_t = 60_000)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=crate::observation::MAX_DEADLINE_MS))]
    pub deadline_ms: u64,
    /// Motions that a client may ask for each second, at most so many at once: by its token's name, its own, else its
    /// address [default: any number]
    #[arg(long, value_name = "HZ", value_parser = between(0.01, 10_000.0))]
    pub rate: Option<f64>,
    /// How old an observation's timestamp may be when it comes [default: any age]
    #[arg(long, value_name = "MS")]
    pub max_age_ms: Option<u64>,
    /// Observations that may wait
    #[arg(long, value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub queue: u16,
    /// Robots whose observations may be served in one step, if they wait together and none is late for it
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=OpenVla::MAX_BATCH as i64))]
    pub batch: u8,
    /// For how long a silent client is remembered
    #[arg(long, value_name = "S", default_value_t = 60)]
    pub session_s: u32,
    /// Keep every dimension within its data set's range
    #[arg(long)]
    pub clamp: bool,
    /// How far a dimension may be from the client's last motion: one number, or one for each
    #[arg(long, value_name = "X[,X…]", value_delimiter = ',', value_parser = delta)]
    pub max_delta: Option<Vec<f64>>,
    /// Show no page at / and keep no pictures for it
    #[arg(long)]
    pub no_page: bool,
    /// Append a line of JSON for each motion, or why there is none, to a file
    #[arg(long, value_name = "FILE", value_parser = output_file())]
    pub audit_log: Option<PathBuf>,
    /// Size at which that file becomes FILE.1, of which four are kept
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 20)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub audit_log_size: u64,
    /// Folder whose model files POST /v1/reload may name; without it, that reads the served file again
    #[arg(long, value_name = "FOLDER")]
    pub models: Option<PathBuf>,
    /// Answer errors of /act and the websocket as the reference does: "error" with status 200
    #[arg(long)]
    pub compat_errors: bool,
    /// Connections that may be open
    #[arg(long, value_name = "N", default_value_t = 256)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_connections: u32,
    /// Largest body or websocket message, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    pub max_body: usize,
    /// Most pixels of an image
    #[arg(long, value_name = "N", default_value_t = 1 << 24)]
    pub max_pixels: usize,
    /// Seconds for a request's headers, for its body, and for a client to take an answer
    #[arg(long, value_name = "S", default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub read_s: u64,
    /// After a panic of the model or a failure of its device
    #[arg(long, value_enum, default_value = "restart")]
    pub on_failure: OnFailure,
    /// Seconds after which a step counts as stuck: /readyz turns red; after twice as many, exit
    #[arg(long, value_name = "S", default_value_t = 300)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub stall_s: u64,
    /// Seconds to finish what was accepted when asked to stop
    #[arg(long, value_name = "S", default_value_t = 30)]
    pub drain_s: u64,
}

fn host(text: &str) -> Result<IpAddr, String> {
    if text.eq_ignore_ascii_case("localhost") {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    let wanted =
        "an IP address is wanted: 127.0.0.1 is this machine alone, 0.0.0.0 all its networks";
    text.parse().map_err(|_| wanted.to_owned())
}

fn delta(text: &str) -> Result<f64, String> {
    let number = text.trim().parse::<f64>().ok().filter(|x| *x >= 0.0);
    number.ok_or_else(|| "a number of the data set's units is wanted, or inf".to_owned())
}

impl Settings {
    /// What clients must show, if anything.
    ///
    /// # Errors
    /// If a file is not what it must be, or others could reach the server without a token.
    pub fn tokens(&self) -> Result<Arc<Tokens>> {
        let tokens = Tokens::read(self.token_file.as_deref(), self.client_tokens.as_deref())?;
        ensure!(
            !tokens.is_empty() || self.insecure || self.host.is_loopback(),
            "{} is open to other machines: name a --token-file or --client-tokens, or say --insecure",
            self.host
        );
        Ok(Arc::new(tokens))
    }

    /// The audit log, if one is wanted; `dropped` counts what is lost.
    ///
    /// # Errors
    /// As [`Audit::open`].
    pub fn audit(&self, dropped: Counter) -> Result<Option<Arc<Audit>>> {
        let open = |path: &PathBuf| Audit::open(path, self.audit_log_size, dropped);
        Ok(self.audit_log.as_ref().map(open).transpose()?.map(Arc::new))
    }

    /// The queue's part.
    pub fn limits(&self) -> Limits {
        Limits {
            waiting: self.queue.into(),
            max_age: self.max_age_ms.map(Duration::from_millis),
            memory: self.memory(),
        }
    }

    /// The worker's part.
    pub fn rules(&self) -> Rules {
        Rules {
            safety: Safety { clamp: self.clamp, max_delta: self.max_delta.clone() },
            unnorm_key: self.unnorm_key.clone(),
            memory: self.memory(),
            page: !self.no_page,
            batch: self.batch.into(),
            stall: self.stall(),
            on_failure: self.on_failure,
        }
    }

    /// How long a request may take that does not say so.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }

    /// How long a client may take to send or to read.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.read_s)
    }

    /// How long a step may take.
    pub fn stall(&self) -> Duration {
        Duration::from_secs(self.stall_s)
    }

    /// For how long a silent client is remembered.
    pub fn memory(&self) -> Duration {
        Duration::from_secs(self.session_s.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Settings, clap::Error> {
        Options::try_parse_from([&["openvla-serve"], args].concat()).map(|o| o.settings)
    }

    #[test]
    fn other_machines_need_a_token() {
        let tokens = |args: &[&str]| parse(args).unwrap().tokens();
        assert!(tokens(&[]).unwrap().is_empty());
        assert!(tokens(&["--host", "::1"]).unwrap().is_empty());
        let error = tokens(&["--host", "0.0.0.0"]).unwrap_err().to_string();
        assert!(error.contains("--token-file") && error.contains("--insecure"), "{error}");
        assert!(tokens(&["--host", "0.0.0.0", "--insecure"]).unwrap().is_empty());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "0123456789abcdef\n").unwrap();
        let named = ["--host", "0.0.0.0", "--token-file", file.to_str().unwrap()];
        assert!(!tokens(&named).unwrap().is_empty());
        std::fs::write(&file, "arm act 0123456789abcdef\n").unwrap();
        let named = ["--host", "0.0.0.0", "--client-tokens", file.to_str().unwrap()];
        assert!(!tokens(&named).unwrap().is_empty());
    }

    #[test]
    fn a_host_is_an_address_or_this_machine() {
        let host = |text: &str| parse(&["--host", text]).map(|settings| settings.host);
        assert_eq!(host("localhost").unwrap(), Ipv4Addr::LOCALHOST);
        assert!(host("::1").unwrap().is_loopback());
        for wrong in ["robot.example", "*", "", "127.0.0.1:8000"] {
            let error = host(wrong).unwrap_err().to_string();
            assert!(error.contains("127.0.0.1 is this machine alone"), "{error}");
        }
    }

    #[test]
    fn deltas_are_numbers_for_each_dimension() {
        let deltas = parse(&["--max-delta", "0.1,0.2,inf"]).unwrap().max_delta;
        assert_eq!(deltas, Some(vec![0.1, 0.2, f64::INFINITY]));
        for wrong in ["-1", "NaN", "x", "1,,2"] {
            assert!(parse(&[&format!("--max-delta={wrong}")]).is_err(), "{wrong}");
        }
    }
}
