//! `tabletop`: a small table on which an OpenVLA acts.

use std::io::{BufWriter, Cursor, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use openvla::cli::{self, Threads, write};
use openvla::image::{ImageFormat, RgbImage};
use openvla::{Draft, Options};
#[cfg(feature = "remote")]
use openvla_tabletop::Remote;
use openvla_tabletop::{
    DataSet, Expert, Learner, OftModel, OpenVlaModel, Pace, Plan, Policy, Report, STEPS, Scene,
    Steps, Suite, World, evaluate, film, gym, picture, progress, record, wrist_picture,
};

/// A small table on which an OpenVLA acts.
#[derive(Parser)]
#[command(name = "tabletop", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// How often a model, or the expert, does what it is asked
    Eval(Eval),
    /// One episode as a GIF
    Play(Play),
    /// A data set of the expert's steps
    Record(Record),
    /// An endless stream of the expert's steps on stdout, for training
    Stream(Stream),
    /// Worlds for a policy in another program, on stdout and stdin
    Gym(Gym),
}

#[derive(Args)]
struct Who {
    /// Model file [default: the expert, which knows where everything is]
    #[arg(short, long, value_name = "MODEL.gguf", group = "policy")]
    model: Option<PathBuf>,
    /// The model of this openvla-serve instead, such as http://127.0.0.1:8000
    #[cfg(feature = "remote")]
    #[arg(long, group = "policy")]
    url: Option<String>,
    /// File with the server's token
    #[cfg(feature = "remote")]
    #[arg(long, value_name = "FILE", requires = "url")]
    token_file: Option<PathBuf>,
    /// The model's data set whose units are meters and radians a step; needed if it knows several
    #[arg(long, value_name = "KEY", requires = "policy")]
    unnorm_key: Option<String>,
    /// Whether the motion before is tried as the next one's tokens
    #[arg(long, default_value = "off", value_name = "off|auto")]
    #[arg(requires = "model")]
    draft: Draft,
    /// Actions of a chunk that are made before it looks again [default: all; the expert: 1]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(1..=1000))]
    execute: Option<u16>,
}

#[derive(Args)]
struct Eval {
    #[command(flatten)]
    who: Who,
    /// Episodes of each suite
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    episodes: u32,
    /// Seed of the first scene
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Which scenes [default: all suites]
    #[arg(long)]
    suite: Option<Suite>,
    /// Steps after which an episode has failed
    #[arg(long, default_value_t = STEPS as u32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: u32,
    /// The world waits for the policy (the default)
    #[arg(long, conflicts_with = "hz")]
    blocking: bool,
    /// The world goes on while the policy thinks, this many steps a second
    #[arg(long, value_parser = cli::between(0.01, 1000.0))]
    hz: Option<f64>,
    /// How long the policy thinks [default: as long as it does, which differs from run to run]
    #[arg(long, value_name = "MS", requires = "hz", value_parser = cli::between(0.0, 60_000.0))]
    latency_ms: Option<f64>,
    /// Episodes that run side by side [default: one for each core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,
    /// Print one JSON object for each suite
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Play {
    #[command(flatten)]
    who: Who,
    /// Which scene's suite
    #[arg(long, default_value = "base")]
    suite: Suite,
    /// Which scene
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Pixels of the film's sides
    #[arg(long, default_value_t = 320, value_parser = clap::value_parser!(u32).range(16..=1024))]
    size: u32,
    /// Also writes what the front camera sees first
    #[arg(long, value_name = "FILE.png", value_parser = cli::output_file())]
    picture: Option<PathBuf>,
    /// Also writes what the wrist camera sees first
    #[arg(long, value_name = "FILE.png", value_parser = cli::output_file())]
    wrist_picture: Option<PathBuf>,
    /// Also writes the arm's first state, a JSON list
    #[arg(long, value_name = "FILE.json", value_parser = cli::output_file())]
    state: Option<PathBuf>,
    /// Where the film goes
    #[arg(short, long, default_value = "episode.gif", value_name = "FILE.gif")]
    #[arg(value_parser = cli::output_file())]
    out: PathBuf,
}

#[derive(Args)]
struct Trainee {
    /// For an OpenVLA-OFT: the wrist camera's picture, the arm's state and chunks of actions, too
    #[arg(long)]
    oft: bool,
}

impl Trainee {
    fn learner(&self) -> Learner {
        if self.oft { Learner::Oft } else { Learner::OpenVla }
    }
}

#[derive(Args)]
struct Record {
    #[command(flatten)]
    trainee: Trainee,
    /// A folder that is new or empty
    #[arg(short, long, value_name = "FOLDER", value_parser = cli::output_file())]
    out: PathBuf,
    /// How many episodes
    #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    episodes: u32,
    /// Chooses them
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Pixels of the pictures' sides
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(u32).range(14..=1024))]
    size: u32,
    /// No pictures: statistics, tokenizer and actions alone
    #[arg(long)]
    no_images: bool,
}

#[derive(Args)]
struct Stream {
    #[command(flatten)]
    trainee: Trainee,
    /// Chooses the steps
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Pixels of the pictures' sides
    #[arg(long, default_value_t = 84, value_parser = clap::value_parser!(u32).range(14..=1024))]
    size: u32,
    /// Worlds that take turns
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    worlds: u32,
}

#[derive(Args)]
struct Gym {
    #[command(flatten)]
    trainee: Trainee,
    /// Which scenes
    #[arg(long, default_value = "base")]
    suite: Suite,
    /// Seed of the first scene
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many worlds
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    worlds: u32,
    /// Pixels of the pictures' sides
    #[arg(long, default_value_t = 84, value_parser = clap::value_parser!(u32).range(14..=1024))]
    size: u32,
}

fn main() -> ExitCode {
    let Cli { command } = cli::start();
    let done = match command {
        Command::Eval(args) => eval(&args),
        Command::Play(args) => play(&args),
        Command::Record(args) => write_data(&args),
        Command::Stream(args) => stream(&args),
        Command::Gym(args) => {
            let (input, out) = (std::io::stdin().lock(), BufWriter::new(std::io::stdout().lock()));
            gym(
                args.trainee.learner(),
                args.suite,
                args.seed,
                args.worlds as usize,
                args.size,
                input,
                out,
            )
        }
    };
    // Whoever reads a stream ends it by not reading on.
    let is_end = |error: &std::io::Error| error.kind() == ErrorKind::BrokenPipe;
    match done {
        Err(error) if error.downcast_ref().is_some_and(is_end) => ExitCode::SUCCESS,
        done => cli::end(done),
    }
}

fn cores() -> usize {
    Threads::default().count()
}

/// The server's policy, the model, or else the expert.
fn open(who: &Who, n_threads: usize) -> Result<Box<dyn Policy + Send>> {
    let execute = who.execute.map(usize::from);
    #[cfg(feature = "remote")]
    if let Some(url) = &who.url {
        let (token_file, unnorm_key) = (who.token_file.clone(), who.unnorm_key.clone());
        return Ok(Box::new(Remote::new(url.clone(), token_file, unnorm_key, execute)?));
    }
    let Some(path) = &who.model else {
        return Ok(Box::new(Expert { ahead: execute.unwrap_or(1) }));
    };
    let mut options = Options::default();
    options.n_threads = n_threads;
    options.draft = who.draft;
    let unnorm_key = who.unnorm_key.clone();
    Ok(match openvla::Policy::open(path, &options)? {
        openvla::Policy::OpenVla(vla) => {
            let one = matches!(execute, None | Some(1));
            ensure!(
                one,
                "--execute is for OpenVLA-OFT models; an OpenVLA makes one motion at a time"
            );
            Box::new(OpenVlaModel::new(vla, unnorm_key)?)
        }
        openvla::Policy::Oft(vla) => Box::new(OftModel::new(vla, unnorm_key, execute)?),
    })
}

fn eval(args: &Eval) -> Result<()> {
    let n_thread = args.threads.map_or_else(cores, usize::from).min(args.episodes as usize);
    let pace = match args.hz {
        Some(hz) => Pace::Running { hz, latency_ms: args.latency_ms },
        None => Pace::Blocking,
    };
    // A policy that is timed has the machine for itself.
    let (n_policy, n_thread) = if pace.is_timed() { (1, n_thread) } else { (n_thread, 1) };
    let mut policies =
        (0..n_policy).map(|_| open(&args.who, n_thread)).collect::<Result<Vec<_>>>()?;
    let plan = Plan {
        episodes: args.episodes as usize,
        seed: args.seed,
        pace,
        steps: args.steps as usize,
    };
    let suites = args.suite.as_ref().map_or(Suite::value_variants(), std::slice::from_ref);
    let bar = progress(suites.len() as u64 * u64::from(args.episodes), "episodes");
    for suite in suites {
        let report = evaluate(*suite, &plan, &mut policies, &bar)?;
        bar.suspend(|| print(&report, args.json))?;
    }
    bar.finish_and_clear();
    Ok(())
}

fn print(report: &Report, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string(report)?)?);
    }
    let name = report.suite.to_possible_value().expect("no suite is hidden");
    let [low, high] = report.interval.map(|x| 100.0 * x);
    let steps = report.steps.map_or("      ".into(), |steps| format!("{steps:6.1}"));
    let calls = report.calls.filter(|calls| Some(*calls) != report.steps);
    let calls = calls.map_or(String::new(), |calls| format!(" in {calls:.1} calls"));
    let latency = report.latency_ms.map_or(String::new(), |ms| format!(", {ms:.1} ms a call"));
    let error = &report.error;
    let drafts = report.accepted.filter(|accepted| *accepted > 0.0);
    let drafts = drafts.map_or(String::new(), |n| format!(", {n:.2} tokens of a motion drafted"));
    writeln!(
        out,
        "{:<9} {:5.1} %  ({low:.1} … {high:.1}), {} of {}  steps {steps}{calls}  off by {:.1} mm, {:.1}°, \
         gripper {:.1} %{drafts}{latency}",
        name.get_name(),
        100.0 * report.rate,
        report.successes,
        report.episodes,
        1e3 * error.metres,
        error.radians.to_degrees(),
        100.0 * error.gripper,
    )?;
    Ok(())
}

fn play(args: &Play) -> Result<()> {
    let mut policy = open(&args.who, cores())?;
    let world = World::new(Scene::new(args.suite, args.seed));
    if let Some(path) = &args.picture {
        write_png(path, &picture(&world, args.size))?;
    }
    if let Some(path) = &args.wrist_picture {
        write_png(path, &wrist_picture(&world, args.size))?;
    }
    if let Some(path) = &args.state {
        write(path, serde_json::to_string(&world.gripper.state())? + "\n")?;
    }
    let instruction = world.scene.instruction.clone();
    let outcome = film(&args.out, world, policy.as_mut(), STEPS, args.size)?;
    let done = if outcome.done { "done" } else { "not done" };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{instruction}: {done} in {} steps, {}", outcome.steps, args.out.display())?;
    Ok(())
}

fn write_png(path: &Path, picture: &RgbImage) -> Result<()> {
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png)?;
    write(path, png.into_inner())
}

fn write_data(args: &Record) -> Result<()> {
    let bar = progress(args.episodes.into(), "episodes");
    let size = (!args.no_images).then_some(args.size);
    let learner = args.trainee.learner();
    let data = DataSet { seed: args.seed, episodes: args.episodes as usize, size, learner };
    record(&args.out, &data, &bar)?;
    bar.finish_and_clear();
    Ok(())
}

fn stream(args: &Stream) -> Result<()> {
    let learner = args.trainee.learner();
    let mut steps = Steps::new(args.seed, args.worlds as usize);
    let mut out = BufWriter::with_capacity(1 << 20, std::io::stdout().lock());
    loop {
        out.write_all(&steps.next(|step| learner.bytes(step.world, args.size)))?;
    }
}
