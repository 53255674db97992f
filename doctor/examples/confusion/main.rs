//! How often the doctor finds the fault that was injected into an episode of the tabletop: a confusion matrix.
//!
//! ```sh
//! cargo run --release -p openvla-doctor --example confusion -- -n 100 --out doctor/results/tabletop
//! ```

mod fault;
mod matrix;
mod recording;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use indicatif::ProgressBar;
use openvla::cli;
use openvla_doctor::episode::Episode;
use openvla_doctor::examine::{Plan, examine};
use openvla_doctor::hypothesis::Cause;
use openvla_doctor::verdict::decide;
use openvla_tabletop::SceneRng;
use serde_json::{Value, json};

use fault::{FAULTS, bridge, inject};
use matrix::Matrix;
use recording::record;

/// Injects faults into episodes of the tabletop's expert, and counts what the doctor says.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Episodes of each fault
    #[arg(short = 'n', long, default_value_t = 100)]
    episodes: u64,
    /// Moments of an episode
    #[arg(long, default_value_t = 12)]
    frames: usize,
    /// The first scene's seed
    #[arg(long, default_value_t = 5_000_000)]
    seed: u64,
    /// Faults to inject; again for more [default: all]
    #[arg(long, value_name = "NAME")]
    fault: Vec<String>,
    /// Files for the matrix, PATH.json and PATH.svg
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// File for a line of JSON about each episode. Those that it has already are not repeated
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args: Args = cli::start();
    let mut policy = args.model.open()?;
    let scale = policy.config().statistics.select(None)?.1.action.clone();
    let (size, model) = (policy.config().preprocess.size, policy.config().general.name.clone());
    let known =
        args.log.as_ref().and_then(|log| std::fs::read_to_string(log).ok()).unwrap_or_default();
    let known: Vec<Value> =
        known.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let open = |log| File::options().append(true).create(true).open(log);
    let mut log = args.log.as_ref().map(open).transpose()?;
    let is_wanted = |fault: &Cause| args.fault.is_empty() || args.fault.contains(&fault.name());
    let faults: Vec<Cause> = FAULTS.into_iter().filter(is_wanted).collect();
    let bar = ProgressBar::new(faults.len() as u64 * args.episodes);
    let mut matrix = Matrix::default();
    for seed in args.seed..args.seed + args.episodes {
        let longer = record(seed, args.frames + 3, size);
        for fault in &faults {
            let is_it = |line: &&Value| line["seed"] == seed && line["fault"] == fault.name();
            if let Some(line) = known.iter().find(is_it) {
                let said = FAULTS.into_iter().find(|said| line["verdict"]["cause"] == said.name());
                let kind = line["kind"].as_str().unwrap_or_default();
                matrix.note(*fault, kind, said.unwrap_or(Cause::Unknown));
                bar.inc(1);
                continue;
            }
            let mut rng = SceneRng::new(seed ^ ((*fault as u64 + 1) << 32));
            let (kind, recording) = inject(*fault, &longer, args.frames, &scale, &mut rng)?;
            let folder = tempfile::tempdir()?;
            recording.write(folder.path())?;
            let plan = Plan { statistics: vec![bridge()], ..Plan::default() };
            let episode = Episode::open(folder.path())?;
            let evidence = examine(&mut policy, &episode, &plan, &ProgressBar::hidden())?;
            let (level, findings, verdict) = decide(&evidence);
            matrix.note(*fault, &kind, verdict.cause);
            if let Some(log) = &mut log {
                let line = json!({
                    "seed": seed, "fault": fault, "kind": kind, "verdict": verdict, "level": level,
                    "hypotheses": findings,
                });
                writeln!(log, "{line}")?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    if let Some(path) = &args.out {
        let command: Vec<String> = std::env::args().skip(1).collect();
        let result = json!({
            "command": format!("confusion {}", command.join(" ")), "model": model, "first_seed": args.seed,
            "episodes_of_each": args.episodes, "frames": args.frames, "faults": matrix.json(),
        });
        cli::write(&path.with_extension("json"), serde_json::to_string_pretty(&result)? + "\n")?;
        cli::write(&path.with_extension("svg"), matrix.svg())?;
    }
    Ok(std::io::stdout().lock().write_all(matrix.text().as_bytes())?)
}
