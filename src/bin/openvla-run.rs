//! `openvla-run`: images and one instruction to one motion each.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use openvla::cli::{self, Model};
use openvla::image::RgbImage;
use openvla::{Action, Dataset, Session, Usage};

/// Computes the motion that an OpenVLA model makes of an image and an instruction. Several images
/// are one robot's, step after step.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// PNG, JPEG, WebP or BMP of any size; "-" reads one from stdin
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// What the robot is asked to do: "put eggplant into pot"
    instruction: String,
    #[command(flatten)]
    model: Model,
    /// Data set whose units the motion is in; needed if the model knows several
    #[arg(long, value_name = "KEY")]
    unnorm_key: Option<String>,
    /// Print one JSON object for each image, on a line of its own
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args: Args = cli::start();
    if args.images.iter().filter(|path| path.as_os_str() == STDIN).count() > 1 {
        let why = "\"-\" can be given once: stdin holds one image";
        Args::command().error(ErrorKind::ArgumentConflict, why).exit();
    }
    cli::end(run(&args))
}

fn run(args: &Args) -> Result<()> {
    if args.model.path().is_none() {
        cli::say(cli::BUILT_IN);
    }
    let warn = |doubt: &str| cli::say(format_args!("warning: {doubt}"));
    // Before the model is opened, since a mistake in the order of arguments may be why it cannot be.
    let misplaced = cli::doubt(&args.instruction).inspect(|doubt| warn(doubt));
    let mut policy = args.model.open()?;
    if misplaced.is_none() {
        policy.config().prompt.doubt(&args.instruction).inspect(|doubt| warn(doubt));
    }
    let mut session = Session::default();
    let mut out = std::io::stdout().lock();
    for path in &args.images {
        let (image, key) = (read(path)?, args.unnorm_key.as_deref());
        let action = policy
            .act_in(&mut session, &image, &args.instruction, key)
            .with_context(|| format!("no motion for {}", path.display()))?;
        if args.json {
            writeln!(out, "{}", serde_json::to_string(&action)?)?;
            continue;
        }
        if !action.unconstrained.all_actions {
            cli::say(
                "warning: among all tokens the model would have chosen one that is no motion; \
                 is this what it was trained for?",
            );
        }
        let (_, dataset) = policy.config().statistics.select(Some(&action.unnorm_key))?;
        out.write_all(table(&action, dataset).as_bytes())?;
    }
    policy.usage().iter().filter(|usage| usage.weights > 0).for_each(report);
    Ok(())
}

/// What a device had to hold.
fn report(Usage { device, weights, states, graphs, .. }: &Usage) {
    let [weights, states, graphs] = [weights, states, graphs].map(|bytes| *bytes as f64 / 1e6);
    cli::say(format_args!(
        "{device}: {:.1} MB (weights {weights:.1}, cache and states {states:.1}, between operations \
         {graphs:.1})",
        weights + states + graphs
    ));
}

/// What stands for standard input in place of a path.
const STDIN: &str = "-";

/// More than any camera's picture.
const MAX_IMAGE_BYTES: u64 = 1 << 28;

fn read(path: &Path) -> Result<RgbImage> {
    let name = || format!("cannot read the image {}", path.display());
    let mut bytes = Vec::new();
    let read = if path == Path::new(STDIN) {
        let stdin = std::io::stdin().lock();
        anyhow::ensure!(!stdin.is_terminal(), "\"-\" reads an image from stdin: pipe one in");
        stdin.take(MAX_IMAGE_BYTES + 1).read_to_end(&mut bytes)
    } else {
        let file = std::fs::File::open(path).with_context(name)?;
        file.take(MAX_IMAGE_BYTES + 1).read_to_end(&mut bytes)
    };
    let n = read.with_context(name)? as u64;
    anyhow::ensure!(n <= MAX_IMAGE_BYTES, "{}: more than {MAX_IMAGE_BYTES} bytes", name());
    openvla::decode(&bytes).with_context(name)
}

/// Names of the seven numbers that a motion of one arm has.
const ARM: [&str; 7] = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"];

fn table(action: &Action, dataset: &Dataset) -> String {
    let n = action.action.len();
    let name = |i: usize| match n {
        7 => ARM[i].to_owned(),
        _ => format!("action[{i}]"),
    };
    let ranges = dataset.action.ranges();
    let line = |i: usize| {
        let [low, high] = ranges[i];
        format!("{:<10} {:>12.6}   of {low:.6} … {high:.6}\n", name(i), action.action[i])
    };
    let rows: String = (0..n).map(line).collect();
    format!("{rows}in units of {}, {:.0} ms\n", action.unnorm_key, action.timing_ms.total)
}
