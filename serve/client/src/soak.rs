//! `openvla-client soak`: drives a server for a while with many clients, most of which do not behave, and holds what it
//! answers and takes against what it promises.
//!
//! | file | what it is |
//! |---|---|
//! | `scene` | pictures that the model answers differently |
//! | `wire`, `forms` | bytes; the server's protocols |
//! | `target` | what is known of the server, and the promises |
//! | `robots`, `hostile` | clients that behave, and those that do not |
//! | `server` | a server as a process of its own |
//! | `report` | what was found |

mod forms;
mod hostile;
mod report;
mod robots;
mod scene;
mod server;
mod target;
mod wire;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use openvla::cli;
use openvla_client::{Client, Server};
use rustix::process::Signal;

use crate::soak::forms::Form;
use crate::soak::report::Report;
use crate::soak::server::{Process, Sample, Spawn};
use crate::soak::target::Target;

/// What to drive, and how.
#[derive(Debug, clap::Args)]
pub struct Soak {
    /// A server that runs already, without drafts: --draft off
    #[arg(required_unless_present = "spawn", conflicts_with = "spawn")]
    url: Option<String>,
    /// File with its token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Start this openvla-serve instead, measure it, end it and start it again
    #[arg(long, value_name = "PROGRAM")]
    spawn: Option<PathBuf>,
    /// For how long
    #[arg(long, default_value_t = 1.0, value_parser = cli::between(0.01, 100_000.0))]
    minutes: f64,
    /// How many clients; one of four is a robot that behaves
    #[arg(long, value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u16).range(8..=512))]
    clients: u16,
    /// Pictures a second of each robot
    #[arg(long, default_value_t = 1.0, value_parser = cli::between(0.2, 100.0))]
    hz: f64,
    /// Seed of the clients' choices
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    /// Arguments of the program that is started, after --
    #[arg(last = true, requires = "spawn")]
    args: Vec<String>,
}

/// How long each server before the last is driven, at most.
const SHORT: Duration = Duration::from_secs(20);

/// How long a server may take to give back what clients had who left: longer than its threads wait for work.
const SETTLES: Duration = Duration::from_secs(40);

/// Drives the server.
///
/// # Errors
/// If it cannot be driven, or breaks a promise.
pub fn soak(soak: &Soak) -> Result<()> {
    let spawn = soak.spawn.as_ref().map(|program| Spawn::new(program, &soak.args)).transpose()?;
    let url = match &spawn {
        Some(spawn) => format!("http://{}", spawn.address),
        None => soak.url.clone().unwrap_or_default(),
    };
    let address = url.strip_prefix("http://").context("an URL with http:// is wanted")?;
    let address = address.trim_end_matches('/').to_owned();
    let mut process = spawn.as_ref().map(Spawn::start).transpose()?;
    let client = Client::new(Server {
        url: url.clone(),
        token_file: soak.token_file.clone(),
        unnorm_key: None,
        client_id: "soak".to_owned(),
        deadline_ms: 60_000,
    })?;
    let model = client.model().map_err(|refusal| anyhow::anyhow!(refusal.why))?;
    ensure!(model.cameras.is_none(), "{url} serves an OpenVLA-OFT; an OpenVLA is wanted");
    let mut target = Target::new(address, client.authorization().cloned(), scene::scenes()?);
    target.learn()?;

    let began = robots::unix() as u64;
    let time = Duration::from_secs_f64(60.0 * soak.minutes);
    let mut ends = Vec::new();
    if let (Some(spawn), Some(process)) = (&spawn, &mut process) {
        drive(soak, &target, || {
            for signal in [Signal::TERM, Signal::KILL, Signal::TERM] {
                std::thread::sleep(SHORT.min(time / 8));
                ends.push(restart(&target, spawn, process, signal)?);
            }
            std::thread::sleep(Duration::from_secs(1));
            Ok(())
        })?;
    }
    let begun = Instant::now();
    let sample = |process: &Option<Process>| process.as_ref().map(|p| p.sample(begun)).transpose();
    let before = settled(&process, begun, None)?;
    let mut samples = Vec::new();
    drive(soak, &target, || {
        let every = (time / 360).clamp(Duration::from_millis(200), Duration::from_secs(10));
        while begun.elapsed() < time {
            std::thread::sleep(every);
            samples.extend(sample(&process)?);
        }
        Ok(())
    })?;
    let after = settled(&process, begun, before)?;
    if let Some(process) = &mut process {
        ends.push(end(&target, process, Signal::TERM)?);
    }
    let mut report = Report {
        command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        version: env!("CARGO_PKG_VERSION"),
        began,
        cpu: cli::processor(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        minutes: soak.minutes,
        clients: soak.clients.into(),
        outcomes: target.outcomes(),
        ends,
        before,
        samples,
        after,
        broken: target.broken(),
    };
    report.check_growth(&target);
    report.broken = target.broken();
    report.end(soak.json)
}

/// Lets all clients loose until `work` is done.
fn drive(soak: &Soak, target: &Target, work: impl FnOnce() -> Result<()>) -> Result<()> {
    target.over.store(false, Ordering::Relaxed);
    let began = robots::unix() as u64; // a server remembers names for a while
    let done = std::thread::scope(|scope| {
        scope.spawn(|| robots::watcher(target));
        for i in 0..usize::from(soak.clients) {
            let mut rng = fastrand::Rng::with_seed(soak.seed.wrapping_add(i as u64));
            let name = format!("soak-{began}-{i}");
            scope.spawn(move || {
                if i % 4 == 0 {
                    let form = Form::ALL[i / 4 % Form::ALL.len()];
                    robots::robot(target, &name, form, soak.hz, &mut rng);
                } else {
                    hostile::play(target, &name, &mut rng);
                }
            });
        }
        let done = work();
        target.over.store(true, Ordering::Relaxed);
        done
    });
    target.over.store(false, Ordering::Relaxed);
    done
}

/// Ends a server under load and starts the next.
fn restart(
    target: &Target,
    spawn: &Spawn,
    process: &mut Process,
    signal: Signal,
) -> Result<String> {
    let ended = end(target, process, signal)?;
    *process = spawn.start()?;
    target.ready();
    Ok(ended)
}

/// SIGTERM asks for an end, and what was accepted is answered first. SIGKILL is what a crash or a power cut looks like.
fn end(target: &Target, process: &mut Process, signal: Signal) -> Result<String> {
    let (begun, is_asked) = (Instant::now(), signal == Signal::TERM);
    target.ending(is_asked);
    let status = process.end(signal)?;
    if is_asked && !status.success() {
        target.broke("SIGTERM ends the server in peace", status.to_string());
    }
    let name = if is_asked { "SIGTERM" } else { "SIGKILL" };
    Ok(format!("{name}: {status} after {:.1?}", begun.elapsed()))
}

/// What the server takes without clients, once that has fallen to `before`.
fn settled(
    process: &Option<Process>,
    begun: Instant,
    before: Option<Sample>,
) -> Result<Option<Sample>> {
    let Some(process) = process else { return Ok(None) };
    let since = Instant::now();
    std::thread::sleep(Duration::from_secs(1));
    loop {
        let now = process.sample(begun)?;
        let is_back = before.is_none_or(|before| {
            now.descriptors <= before.descriptors && now.threads <= before.threads
        });
        if is_back || since.elapsed() > SETTLES {
            return Ok(Some(now));
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}
