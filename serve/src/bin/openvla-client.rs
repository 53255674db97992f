//! `openvla-client`: a control loop to copy. It never waits for an answer to take the next picture.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Parser, Subcommand};
use openvla::cli::{self, PICTURES};
use openvla::image::ImageFormat;
use openvla_tabletop::{Action, Pace, Policy, STEPS, Scene, Suite, World, picture, run};
use serde_json::{Value, json};
use ureq::http::Uri;

/// Sends pictures to openvla-serve and shows what comes back, and when.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pictures at a fixed rate, as a camera takes them, whether answers have come or not
    Camera(Camera),
    /// Episodes on the simulated table, the policy being the server's
    Tabletop(Tabletop),
}

#[derive(Args, Clone)]
struct Server {
    /// Where openvla-serve listens
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// File with its token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The data set whose units are wanted
    #[arg(long, value_name = "KEY")]
    unnorm_key: Option<String>,
    /// This robot's name; a program that begins anew needs a new one
    #[arg(long, default_value_t = format!("client-{}", std::process::id()))]
    client_id: String,
    /// For how long an answer is worth something
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    deadline_ms: u64,
}

#[derive(Args)]
struct Camera {
    #[command(flatten)]
    server: Server,
    /// Pictures, or folders of pictures; taken in turn, over and over
    #[arg(required = true)]
    pictures: Vec<PathBuf>,
    /// What the robot is asked to do
    instruction: String,
    /// Pictures a second
    #[arg(long, default_value_t = 5.0, value_parser = hz)]
    hz: f64,
    /// How many pictures
    #[arg(short = 'n', long, default_value_t = 50)]
    steps: u64,
    /// Print one JSON object for each picture, and one at the end
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Tabletop {
    #[command(flatten)]
    server: Server,
    /// Which scenes
    #[arg(long, default_value = "base")]
    suite: Suite,
    /// Episodes
    #[arg(short = 'n', long, default_value_t = 10)]
    episodes: u64,
    /// Seed of the first
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sides of the pictures, in pixels
    #[arg(long, default_value_t = 224)]
    size: u32,
    /// The world goes on while the policy thinks, so many steps a second [default: it waits]
    #[arg(long, value_parser = hz)]
    hz: Option<f64>,
}

fn hz(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|x| (0.01..=1000.0).contains(x));
    number.ok_or_else(|| "a number from 0.01 to 1000 is needed".to_owned())
}

fn main() -> ExitCode {
    let Cli { command } = cli::start();
    cli::end(match command {
        Command::Camera(args) => camera(&args),
        Command::Tabletop(args) => tabletop(&args),
    })
}

/// The server's plain form, over connections that are kept.
#[derive(Clone)]
struct Link {
    server: Server,
    url: String,
    token: Option<String>,
    agent: ureq::Agent,
}

/// An answer's object, or the code and sentence of why there is none.
type Reply = Result<Value, (String, String)>;

impl Link {
    fn new(server: &Server) -> Result<Self> {
        let token = server.token_file.as_ref().map(|path| {
            let text = std::fs::read_to_string(path);
            text.with_context(|| format!("cannot read {}", path.display()))
        });
        let token = token.transpose()?.map(|text| format!("Bearer {}", text.trim()));
        let url = format!("{}/v1/act", server.url.trim_end_matches('/'));
        let proxy = ureq::Proxy::try_from_env().filter(|_| !is_loopback(&url));
        let agent = ureq::Agent::config_builder()
            .proxy(proxy)
            .http_status_as_error(false)
            // The server answers in time; this is for a network that does not.
            .timeout_global(Some(Duration::from_millis(server.deadline_ms + 2000)))
            .build();
        Ok(Self { server: server.clone(), url, token, agent: agent.into() })
    }

    fn step(&self, seq: u64, taken: SystemTime, picture: &str, instruction: &str) -> Reply {
        let since = taken.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let key = &self.server.unnorm_key;
        let body = json!({ "image": picture, "instruction": instruction, "unnorm_key": key });
        let mut request = self
            .agent
            .post(&self.url)
            .content_type("application/json")
            .header("X-Client-Id", &self.server.client_id)
            .header("X-Seq", seq.to_string())
            .header("X-Timestamp", since.as_secs_f64().to_string())
            .header("X-Deadline-Ms", self.server.deadline_ms.to_string());
        if let Some(token) = &self.token {
            request = request.header("Authorization", token);
        }
        let lost = |error| ("no_answer".to_owned(), self.lost(&error));
        let mut response = request.send(body.to_string()).map_err(lost)?;
        let bytes = response.body_mut().read_to_vec().map_err(lost)?;
        let answer: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if response.status().is_success() {
            return Ok(answer);
        }
        let text = |key: &str| answer[key].as_str().unwrap_or("no reason given").to_owned();
        Err((text("code"), [text("message"), text("hint")].join("; ")))
    }

    /// Why there is no answer, who was asked, and through whom. A proxy's password is not shown.
    fn lost(&self, error: &ureq::Error) -> String {
        let uri = self.url.parse().unwrap_or_default();
        let proxy = self.agent.config().proxy().filter(|proxy| !proxy.is_no_proxy(&uri));
        let through = proxy.map(|proxy| {
            let (host, port) = (proxy.host(), proxy.port());
            format!(" through the proxy {host}:{port} (no_proxy=HOST goes around it)")
        });
        format!("{}{}: {error}", self.url, through.unwrap_or_default())
    }
}

/// Whether a URL is this machine's, whose proxy cannot know it.
fn is_loopback(url: &str) -> bool {
    let uri = url.parse::<Uri>().unwrap_or_default();
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let address = host.parse::<IpAddr>().map(|address| address.to_canonical());
    address.map_or(host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}

/// What became of a picture.
struct Frame {
    seq: u64,
    taken: Instant,
    reply: Reply,
}

/// Requests that may be under way: one that is computed, one that waits, one that supersedes it.
const MOST: usize = 3;

fn camera(args: &Camera) -> Result<()> {
    if let Some(doubt) = cli::doubt(&args.instruction) {
        cli::say(format_args!("warning: {doubt}"));
    }
    let pictures = pictures(&args.pictures)?;
    let link = Link::new(&args.server)?;
    let (send, frames) = channel();
    let period = Duration::from_secs_f64(1.0 / args.hz);
    let begun = Instant::now();
    let (mut seq, mut pending, mut tally) = (0, 0, Tally::default());
    while seq < args.steps || pending > 0 {
        // The camera's clock goes on whatever the network does.
        let next = begun + period.mul_f64(seq as f64);
        let wait = match seq < args.steps {
            true => next.saturating_duration_since(Instant::now()),
            false => Duration::from_secs(3600), // the agent's time limit comes first
        };
        match frames.recv_timeout(wait) {
            Ok(frame) => {
                pending -= 1;
                tally.note(frame, args)?;
            }
            Err(RecvTimeoutError::Timeout) if pending < MOST => {
                let picture = pictures[seq as usize % pictures.len()].clone();
                look(&link, seq, picture, &args.instruction, send.clone());
                (seq, pending) = (seq + 1, pending + 1);
            }
            Err(RecvTimeoutError::Timeout) => {
                tally.count("not_sent");
                seq += 1;
            }
            Err(RecvTimeoutError::Disconnected) => unreachable!("`send` is still here"),
        }
    }
    tally.report(args, begun.elapsed())
}

/// Takes a picture and sends it, in a thread of its own.
fn look(link: &Link, seq: u64, picture: String, instruction: &str, done: Sender<Frame>) {
    let (link, instruction) = (link.clone(), instruction.to_owned());
    std::thread::spawn(move || {
        let (taken, at) = (Instant::now(), SystemTime::now());
        let reply = link.step(seq, at, &picture, &instruction);
        let _ = done.send(Frame { seq, taken, reply }); // the loop may have ended
    });
}

/// What became of all pictures.
#[derive(Default)]
struct Tally {
    outcomes: BTreeMap<String, u64>,
    /// Of motions that were acted on.
    milliseconds: Vec<f64>,
    newest: Option<u64>,
    /// The server's last warning, which is said once.
    warning: Option<String>,
}

impl Tally {
    fn count(&mut self, outcome: &str) {
        *self.outcomes.entry(outcome.to_owned()).or_default() += 1;
    }

    fn warn(&mut self, answer: &Value) {
        let warning = answer["warning"].as_str().map(str::to_owned);
        if warning != self.warning {
            warning.iter().for_each(|warning| cli::say(format_args!("warning: {warning}")));
            self.warning = warning;
        }
    }

    fn note(&mut self, frame: Frame, args: &Camera) -> Result<()> {
        let Frame { seq, taken, reply } = frame;
        let ms = taken.elapsed().as_secs_f64() * 1e3;
        let (outcome, detail) = match &reply {
            // A robot acts on the newest picture's motion, never on an older one's after that.
            Ok(_) if self.newest.is_some_and(|newest| newest > seq) => ("late", Value::Null),
            Ok(answer) => {
                self.newest = Some(seq);
                self.milliseconds.push(ms);
                self.warn(answer);
                ("acted", answer["action"].clone()) // robot.move_by(action)
            }
            Err((code, why)) => (code.as_str(), json!(why)),
        };
        self.count(outcome);
        let mut out = std::io::stdout().lock();
        match args.json {
            true => {
                let line = json!({ "seq": seq, "ms": ms, "outcome": outcome, "detail": detail });
                writeln!(out, "{line}")?;
            }
            false => writeln!(out, "{seq:>5} {ms:>7.1} ms  {outcome:<10} {detail}")?,
        }
        Ok(())
    }

    fn report(mut self, args: &Camera, took: Duration) -> Result<()> {
        self.milliseconds.sort_by(f64::total_cmp);
        let n = self.milliseconds.len();
        let quantile = |q: f64| self.milliseconds.get(((n as f64 - 1.0) * q).round() as usize);
        let quantiles = [0.5, 0.9, 0.99].map(|q| quantile(q).copied());
        let asked = args.steps as f64 / args.hz; // the last picture's time counts, too
        let rate = n as f64 / took.as_secs_f64().max(asked);
        let mut out = std::io::stdout().lock();
        if args.json {
            let line = json!({ "pictures": args.steps, "outcomes": self.outcomes, "hz": rate,
                               "ms_p50_p90_p99": quantiles });
            writeln!(out, "{line}")?;
        } else {
            let outcomes: Vec<String> =
                self.outcomes.iter().map(|(outcome, n)| format!("{n} {outcome}")).collect();
            let times = match quantiles {
                [Some(p50), Some(p90), Some(p99)] => format!(
                    "; {rate:.2} motions a second; half within {p50:.1} ms, 90 % {p90:.1}, 99 % \
                     {p99:.1}"
                ),
                _ => String::new(),
            };
            let (steps, hz, outcomes) = (args.steps, args.hz, outcomes.join(", "));
            writeln!(out, "{steps} pictures at {hz} Hz: {outcomes}{times}")?;
        }
        ensure!(n > 0, "no motion came");
        Ok(())
    }
}

/// Every picture file named, or in a folder named, in base64.
fn pictures(paths: &[PathBuf]) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for path in paths {
        let name = || format!("cannot read {}", path.display());
        if path.is_dir() {
            let inside = std::fs::read_dir(path).with_context(name)?;
            let inside = inside.map(|entry| Ok(entry?.path()));
            files.extend(inside.collect::<std::io::Result<Vec<_>>>().with_context(name)?);
        } else {
            files.push(path.clone());
        }
    }
    let kind = |file: &Path| file.extension().map(|kind| kind.to_string_lossy().to_lowercase());
    files.retain(|file| kind(file).is_some_and(|kind| PICTURES.contains(&kind.as_str())));
    files.sort();
    ensure!(!files.is_empty(), "there are no pictures; {} are known", PICTURES.join(", "));
    let read = |file: &PathBuf| {
        let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
        bytes.map(|bytes| STANDARD.encode(bytes))
    };
    files.iter().map(read).collect()
}

/// The server's policy, for worlds of this process.
struct Remote {
    link: Link,
    size: u32,
    seq: u64,
}

impl Policy for Remote {
    fn act(&mut self, world: &World) -> Result<Action> {
        let mut file = std::io::Cursor::new(Vec::new());
        picture(world, self.size).write_to(&mut file, ImageFormat::Png)?;
        let (picture, instruction) = (STANDARD.encode(file.into_inner()), &world.scene.instruction);
        let seq = self.seq;
        self.seq += 1;
        let answer = match self.link.step(seq, SystemTime::now(), &picture, instruction) {
            Ok(answer) => answer,
            Err((code, why)) => bail!("{code}: {why}"),
        };
        let numbers: Vec<f64> = serde_json::from_value(answer["action"].clone())?;
        let n = numbers.len();
        numbers.try_into().map_err(|_| anyhow!("a motion of {n} numbers; seven move this gripper"))
    }
}

fn tabletop(args: &Tabletop) -> Result<()> {
    let mut policy = Remote { link: Link::new(&args.server)?, size: args.size, seq: 0 };
    let pace = match args.hz {
        Some(hz) => Pace::Running { hz, latency_ms: None },
        None => Pace::Blocking,
    };
    let (mut done, begun) = (0, Instant::now());
    for i in 0..args.episodes {
        let world = World::new(Scene::new(args.suite, args.seed.wrapping_add(i)));
        done += u64::from(run(world, &mut policy, pace, STEPS, &mut |_| {})?.done);
    }
    let rate = policy.seq as f64 / begun.elapsed().as_secs_f64();
    let mut out = std::io::stdout().lock();
    let (n, steps) = (args.episodes, policy.seq);
    writeln!(out, "{done} of {n} episodes, {steps} steps, {rate:.2} steps a second")?;
    Ok(())
}
