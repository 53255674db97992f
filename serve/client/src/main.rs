//! `openvla-client`: a control loop to copy, which never waits for an answer to take the next picture; and a soak of the
//! server, in files of its own.

mod record;
mod soak;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use openvla::cli::{self, PICTURES, is_picture};
use openvla_client::{Client, Refusal, Reply, Server};
use serde_json::{Value, json};

use crate::record::Recorder;
use crate::soak::Soak;

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
    /// Many clients for a while, most of which do not behave: does the server keep its promises?
    Soak(Soak),
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
    /// Picture of a wrist camera, sent with each of the others; again for the next one, in the model's order
    #[arg(long, value_name = "FILE")]
    wrist: Vec<PathBuf>,
    /// File with the arm's state, a JSON list
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Pictures a second
    #[arg(long, default_value_t = 5.0, value_parser = cli::between(0.01, 1000.0))]
    hz: f64,
    /// How many pictures
    #[arg(short = 'n', long, default_value_t = 50)]
    steps: u64,
    /// Record what was acted on in a new folder: frames, motions, times. openvla-doctor reads it
    #[arg(long, value_name = "FOLDER")]
    record: Option<PathBuf>,
    /// Print one JSON object for each picture, and one at the end
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let Cli { command } = cli::start();
    cli::end(match command {
        Command::Camera(args) => camera(&args),
        Command::Soak(args) => soak::soak(&args),
    })
}

/// What became of a picture.
struct Frame {
    seq: u64,
    picture: Arc<[u8]>,
    taken: Instant,
    at: SystemTime,
    reply: Reply,
}

/// Requests that may be under way: one that is computed, one that waits, one that supersedes it.
const MOST: usize = 3;

fn camera(args: &Camera) -> Result<()> {
    if let Some(doubt) = cli::doubt(&args.instruction) {
        cli::say(format_args!("warning: {doubt}"));
    }
    let pictures = pictures(&args.pictures)?;
    let (wrists, state) = (wrists(args)?, state(args)?);
    let client = Client::new(args.server.clone())?.with_arm(&wrists, state.as_deref());
    let recorder = args.record.as_ref().map(|folder| Recorder::new(folder, wrists, state));
    let (send, frames) = channel();
    let period = Duration::from_secs_f64(1.0 / args.hz);
    let begun = Instant::now();
    let (mut seq, mut pending) = (0, 0);
    let mut tally = Tally { recorder: recorder.transpose()?, ..Tally::default() };
    while seq < args.steps || pending > 0 {
        // The camera's clock goes on whatever the network does.
        let next = begun + period.mul_f64(seq as f64);
        let wait = if seq < args.steps {
            next.saturating_duration_since(Instant::now())
        } else {
            Duration::from_secs(3600) // the agent's time limit comes first
        };
        match frames.recv_timeout(wait) {
            Ok(frame) => {
                pending -= 1;
                tally.note(frame, args)?;
            }
            Err(RecvTimeoutError::Timeout) if pending < MOST => {
                let picture = pictures[seq as usize % pictures.len()].clone();
                look(&client, seq, picture, &args.instruction, send.clone());
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

/// The bytes of the wrist cameras' pictures.
fn wrists(args: &Camera) -> Result<Vec<Vec<u8>>> {
    let read = |file: &PathBuf| {
        std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
    };
    args.wrist.iter().map(read).collect()
}

fn state(args: &Camera) -> Result<Option<Vec<f64>>> {
    let read = |file: &PathBuf| {
        let name = || format!("cannot read a JSON list of numbers in {}", file.display());
        serde_json::from_slice(&std::fs::read(file).with_context(name)?).with_context(name)
    };
    args.state.as_ref().map(read).transpose()
}

/// Takes a picture and sends it, in a thread of its own.
fn look(client: &Client, seq: u64, picture: Arc<[u8]>, instruction: &str, done: Sender<Frame>) {
    let (client, instruction) = (client.clone(), instruction.to_owned());
    std::thread::spawn(move || {
        let (taken, at) = (Instant::now(), SystemTime::now());
        let reply = client.act(seq, at, &picture, &instruction);
        let _ = done.send(Frame { seq, picture, taken, at, reply }); // the loop may have ended
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
    recorder: Option<Recorder>,
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
        let Frame { seq, picture, taken, at, reply } = frame;
        let ms = taken.elapsed().as_secs_f64() * 1e3;
        let (outcome, detail) = match &reply {
            // A robot acts on the newest picture's motion, never on an older one's after that.
            Ok(_) if self.newest.is_some_and(|newest| newest > seq) => ("late", Value::Null),
            Ok(answer) => {
                self.newest = Some(seq);
                self.milliseconds.push(ms);
                self.warn(answer);
                if let Some(recorder) = &mut self.recorder {
                    recorder.add(&picture, at, &args.instruction, answer)?;
                }
                ("acted", answer["action"].clone()) // robot.move_by(action)
            }
            Err(Refusal { code, why }) => (code.as_str(), json!(why)),
        };
        self.count(outcome);
        let mut out = std::io::stdout().lock();
        if args.json {
            let line = json!({ "seq": seq, "ms": ms, "outcome": outcome, "detail": detail });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out, "{seq:>5} {ms:>7.1} ms  {outcome:<10} {detail}")?
        }
        Ok(())
    }

    fn report(mut self, args: &Camera, took: Duration) -> Result<()> {
        self.milliseconds.sort_by(f64::total_cmp);
        let n = self.milliseconds.len();
        let quantile = |q: f64| self.milliseconds.get(((n as f64 - 1.0) * q).round() as usize);
        let quantiles = [0.5, 0.9, 0.99, 0.999, 1.0].map(|q| quantile(q).copied());
        let asked = args.steps as f64 / args.hz; // the last picture's time counts, too
        let rate = n as f64 / took.as_secs_f64().max(asked);
        let mut out = std::io::stdout().lock();
        if args.json {
            let line = json!({ "pictures": args.steps, "outcomes": self.outcomes, "hz": rate,
                               "ms_p50_p90_p99_p999_max": quantiles });
            writeln!(out, "{line}")?;
        } else {
            let outcomes: Vec<String> =
                self.outcomes.iter().map(|(outcome, n)| format!("{n} {outcome}")).collect();
            let times = match quantiles {
                [Some(p50), Some(p90), Some(p99), Some(p999), Some(max)] => format!(
                    "; {rate:.2} motions a second; half within {p50:.1} ms, 90 % {p90:.1}, 99 % \
                     {p99:.1}, 99.9 % {p999:.1}, all {max:.1}"
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

/// The bytes of every picture file named, or in a folder named.
fn pictures(paths: &[PathBuf]) -> Result<Vec<Arc<[u8]>>> {
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
    files.retain(|file| is_picture(file));
    files.sort();
    ensure!(!files.is_empty(), "there are no pictures; {} are known", PICTURES.join(", "));
    let read = |file: &PathBuf| {
        let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
        bytes.map(Arc::from)
    };
    files.iter().map(read).collect()
}
