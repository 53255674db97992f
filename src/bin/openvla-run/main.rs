//! `openvla-run`: images and one instruction to one motion each, or to a chunk of actions.

mod draw;

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use openvla::cli::{self, ModelArgs};
use openvla::image::RgbImage;
use openvla::oft::{Chunk, Observation, OpenVlaOft};
use openvla::{Action, OpenVla, Policy, Scale, Session, Usage, dimension_name};

/// Computes the motion that an OpenVLA model makes of an image and an instruction, or the actions that an OpenVLA-OFT
/// model makes of the pictures of its cameras and the arm's state. Several images are one robot's, step after step.
#[derive(Parser)]
#[command(name = "openvla-run", version)]
struct Args {
    /// Images: PNG, JPEG, WebP or BMP of any size; "-" reads one from stdin. Then what the robot is asked to do: "put
    /// eggplant into pot"
    // One list, since clap does not take the instruction of two after an option.
    #[arg(required = true, value_name = "IMAGE... INSTRUCTION")]
    inputs: Vec<OsString>,
    #[command(flatten)]
    model: ModelArgs,
    /// Data set whose units the motion is in; needed if the model knows several
    #[arg(long, value_name = "KEY")]
    unnorm_key: Option<String>,
    /// OpenVLA-OFT: a wrist camera's picture, in the order that the model was trained with (left, right)
    #[arg(long, value_name = "IMAGE")]
    wrist: Vec<PathBuf>,
    /// OpenVLA-OFT: the arm's state in the data set's units, a JSON list or a file with one
    #[arg(long, value_name = "LIST|FILE", allow_hyphen_values = true)]
    state: Option<String>,
    /// Draw what the model looked at for each number of the motion, and how likely each value was: a PNG file
    #[arg(long, value_name = "FILE", value_parser = cli::output_file())]
    explain: Option<PathBuf>,
    /// Print one JSON object for each image, on a line of its own
    #[arg(long)]
    json: bool,
}

impl Args {
    /// All inputs but the last.
    fn images(&self) -> impl Iterator<Item = &Path> {
        self.inputs[..self.inputs.len() - 1].iter().map(Path::new)
    }

    /// Those, and the wrist cameras' pictures.
    fn pictures(&self) -> impl Iterator<Item = &Path> {
        self.images().chain(self.wrist.iter().map(PathBuf::as_path))
    }

    /// The last input.
    fn instruction(&self) -> Option<&str> {
        self.inputs.last()?.to_str()
    }
}

fn main() -> ExitCode {
    let args: Args = cli::start();
    let usage = |kind, why: &str| -> ! { Args::command().error(kind, why).exit() };
    if args.inputs.len() < 2 {
        usage(
            ErrorKind::MissingRequiredArgument,
            "an image and an instruction are needed: IMAGE INSTRUCTION",
        );
    }
    let Some(instruction) = args.instruction() else {
        usage(ErrorKind::InvalidUtf8, "the instruction is not UTF-8");
    };
    if args.pictures().filter(|path| path.as_os_str() == STDIN).count() > 1 {
        usage(ErrorKind::ArgumentConflict, "\"-\" can be given once: stdin holds one image");
    }
    cli::end(run(&args, instruction))
}

fn run(args: &Args, instruction: &str) -> Result<()> {
    if args.model.path().is_none() {
        cli::say(cli::BUILT_IN);
    }
    let warn = |doubt: &str| cli::say(format_args!("warning: {doubt}"));
    // Before the model is opened, since a mistake in the order of arguments may be why it cannot be.
    let misplaced = cli::doubt(instruction).inspect(|doubt| warn(doubt));
    let mut policy = args.model.open()?;
    if misplaced.is_none() {
        policy.config().prompt.doubt(instruction).inspect(|doubt| warn(doubt));
    }
    match &mut policy {
        Policy::OpenVla(policy) => act(args, instruction, policy)?,
        Policy::Oft(policy) => act_in_chunks(args, instruction, policy)?,
    }
    policy.usage().iter().filter(|usage| usage.weights > 0).for_each(report);
    Ok(())
}

/// One motion for each image.
fn act(args: &Args, instruction: &str, policy: &mut OpenVla) -> Result<()> {
    anyhow::ensure!(
        args.wrist.is_empty() && args.state.is_none(),
        "--wrist and --state are for OpenVLA-OFT models; this is an OpenVLA, which sees one camera and reads no state"
    );
    if let Some(file) = &args.explain {
        explain(args, instruction, policy, file)?;
    }
    let mut session = Session::default();
    let mut out = std::io::stdout().lock();
    for path in args.images() {
        let (image, key) = (read(path)?, args.unnorm_key.as_deref());
        let action = policy
            .act_in(&mut session, &image, instruction, key)
            .with_context(|| format!("no motion for {}", path.display()))?;
        if args.json {
            writeln!(out, "{}", serde_json::to_string(&action)?)?;
            continue;
        }
        if !action.unconstrained.all_actions {
            cli::say(
                "warning: among all tokens the model would have chosen one that is not a motion; \
                 is this what it was trained for?",
            );
        }
        let (_, dataset) = policy.config().statistics.select(Some(&action.unnorm_key))?;
        out.write_all(table(&action, &dataset.action).as_bytes())?;
    }
    Ok(())
}

/// Draws what the model made of the only image.
fn explain(args: &Args, instruction: &str, policy: &mut OpenVla, file: &Path) -> Result<()> {
    let images: Vec<&Path> = args.images().collect();
    anyhow::ensure!(
        images.len() == 1 && images[0] != Path::new(STDIN),
        "--explain draws one image, which is a file"
    );
    let explanation = policy.explain(&read(images[0])?, instruction, args.unnorm_key.as_deref())?;
    cli::write(file, draw::png(&explanation, policy.config().actions, instruction)?)
}

/// A chunk of actions for the pictures of all cameras.
fn act_in_chunks(args: &Args, instruction: &str, policy: &mut OpenVlaOft) -> Result<()> {
    anyhow::ensure!(
        args.explain.is_none(),
        "--explain is for OpenVLA models, whose numbers are tokens; this is an OpenVLA-OFT"
    );
    let cameras = &policy.oft().cameras;
    anyhow::ensure!(
        args.images().count() == 1,
        "an OpenVLA-OFT model takes one picture of its third-person camera, and those of wrist cameras with --wrist; there \
         are {} without it",
        args.images().count()
    );
    if cameras.len() == 1 && !args.wrist.is_empty() {
        cli::say("warning: the model sees one camera; --wrist is left out, as the reference does");
    }
    if policy.oft().n_state == 0 && args.state.is_some() {
        cli::say("warning: the model reads no state; --state is left out, as the reference does");
    }
    let images = args.pictures().map(read).collect::<Result<Vec<_>>>()?;
    let images: Vec<_> = images.iter().collect();
    let state = args.state.as_deref().map(read_state).transpose()?;
    let observation = Observation { images: &images, state: state.as_deref() };
    let chunk = policy.act(&observation, instruction, args.unnorm_key.as_deref())?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&chunk)?)?;
    } else {
        out.write_all(chunk_table(&chunk).as_bytes())?;
    }
    Ok(())
}

/// A JSON list, or that of a file.
fn read_state(text: &str) -> Result<Vec<f64>> {
    let is_list = text.trim_start().starts_with('[');
    let json = if is_list {
        text.to_owned()
    } else {
        std::fs::read_to_string(text).with_context(|| format!("cannot read the state {text}"))?
    };
    let wanted = "a JSON list of numbers is needed for --state, such as [0.1, -0.2]";
    serde_json::from_str(&json).with_context(|| wanted.to_owned())
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

/// The path that means standard input.
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

/// A row for each action of the chunk.
fn chunk_table(chunk: &Chunk) -> String {
    let n = chunk.actions.first().map_or(0, Vec::len);
    let names: String = (0..n).map(|i| format!(" {:>12}", dimension_name(i, n))).collect();
    let row = |(step, action): (usize, &Vec<f64>)| {
        let numbers: String = action.iter().map(|x| format!(" {x:>12.6}")).collect();
        format!("{step:>4}{numbers}\n")
    };
    let rows: String = chunk.actions.iter().enumerate().map(row).collect();
    let (key, ms) = (&chunk.unnorm_key, chunk.timing_ms.total);
    format!("step{names}\n{rows}in units of {key}, {ms:.0} ms\n")
}

fn table(action: &Action, scale: &Scale) -> String {
    let n = action.action.len();
    let ranges = scale.ranges();
    let line = |i: usize| {
        let [low, high] = ranges[i];
        format!(
            "{:<10} {:>12.6}   of {low:.6} … {high:.6}\n",
            dimension_name(i, n),
            action.action[i]
        )
    };
    let rows: String = (0..n).map(line).collect();
    format!("{rows}in units of {}, {:.0} ms\n", action.unnorm_key, action.timing_ms.total)
}
