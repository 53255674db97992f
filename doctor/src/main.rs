//! `openvla-doctor`: why does the robot move wrongly?

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use openvla::cli::{self, ModelArgs};
use openvla::image::RgbImage;
use openvla::{Config, Proof, Scale, Statistics};
use openvla_doctor::episode::{Episode, read_picture};
use openvla_doctor::examine::{Evidence, Plan, examine};
use openvla_doctor::html::{Figure, page};
use openvla_doctor::hypothesis::Change;
use openvla_doctor::report::{Diagnosis, Report};
use openvla_doctor::{file, input, machine};

/// Finds why a robot moves wrongly: looks at the machine, the model's file and the input. Of a recorded episode, it asks
/// the model how likely the demonstrated actions are under each of many hypotheses about what is wrong.
#[derive(Parser)]
#[command(name = "openvla-doctor", version)]
struct Args {
    /// A folder of frames and actions, or images; then what the robot is asked to do, unless the folder says. Without
    /// any, the machine and the file are looked at
    #[arg(value_name = "EPISODE|IMAGE... [INSTRUCTION]")]
    inputs: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Data set whose units the actions are in; needed if the model knows several
    #[arg(long, value_name = "KEY")]
    unnorm_key: Option<String>,
    /// Another data set's dataset_statistics.json, whose units the actions may be in
    #[arg(long, value_name = "FILE")]
    statistics: Vec<PathBuf>,
    /// Frames of the episode that are judged, evenly spaced
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    frames: u32,
    /// Judge six frames, under the likeliest hypotheses
    #[arg(long, conflicts_with = "frames")]
    quick: bool,
    /// Keep what was judged in a file, frame by frame, and go on from there if it is interrupted
    #[arg(long, value_name = "FILE", value_parser = cli::output_file())]
    resume: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write the report with pictures to an HTML file
    #[arg(long, value_name = "FILE", value_parser = cli::output_file())]
    html: Option<PathBuf>,
}

/// Moments that `--quick` judges.
const QUICK: usize = 6;

fn main() -> ExitCode {
    let args: Args = cli::start();
    cli::end(run(&args))
}

/// What was given.
enum Given<'a> {
    Nothing,
    Images(Vec<&'a Path>, &'a str),
    Episode(Box<Episode>, Option<&'a str>),
}

fn given(args: &Args) -> Result<Given<'_>> {
    let Some((first, rest)) = args.inputs.split_first() else { return Ok(Given::Nothing) };
    if Path::new(first).is_dir() {
        ensure!(
            rest.len() < 2,
            "one episode and one instruction are looked at; {} arguments follow",
            rest.len()
        );
        return Ok(Given::Episode(
            Box::new(Episode::open(Path::new(first))?),
            rest.first().map(String::as_str),
        ));
    }
    let Some((instruction, images)) =
        args.inputs.split_last().filter(|(_, images)| !images.is_empty())
    else {
        bail!("{first} is not an episode's folder; an image needs an instruction after it");
    };
    cli::doubt(instruction).iter().for_each(|doubt| cli::say(format_args!("warning: {doubt}")));
    Ok(Given::Images(images.iter().map(Path::new).collect(), instruction))
}

fn run(args: &Args) -> Result<()> {
    // Before the model is opened, which takes longer.
    let given = given(args)?;
    let statistics = other_statistics(&args.statistics)?;
    if args.model.path().is_none() {
        cli::say(cli::BUILT_IN);
    }
    let model = args.model.file()?;
    let config = Config::read(&model)?;
    let name = args
        .model
        .path()
        .map_or("the built-in example".to_owned(), |path| path.display().to_string());
    let key = args.unnorm_key.as_deref();
    let machine = machine::examine(&model, &config, &args.model.options())?;
    let file = file::examine(&name, &model, &config, key)?;
    let checksums = Proof::read(&model, &config)?.checksums;
    drop(model); // frees its pages before the model is loaded
    let mut report = Report { machine, file, input: None, diagnosis: None };
    let mut figures = Vec::new();
    match given {
        Given::Nothing => {}
        Given::Images(paths, instruction) => {
            let files: Vec<(&Path, RgbImage)> =
                paths.iter().map(|path| Ok((*path, read_picture(path)?))).collect::<Result<_>>()?;
            let mut policy = args.model.open()?;
            report.input = Some(input::examine(&mut policy, &files, instruction, key)?);
            figures.push(shown("as the model sees it", &config, &files[0].1)?);
        }
        Given::Episode(episode, instruction) => {
            let plan = Plan {
                unnorm_key: args.unnorm_key.clone(),
                statistics,
                instruction: instruction.map(str::to_owned),
                max_moments: if args.quick { QUICK } else { args.frames as usize },
                quick: args.quick,
                judgments: args.resume.clone(),
                model: format!("{checksums:?} {:?}", args.model.options()),
            };
            let mut policy = args.model.open()?;
            let bar = bar();
            let evidence = examine(&mut policy, &episode, &plan, &bar)?;
            bar.finish_and_clear();
            let seen = episode.seen(0)?;
            let files = [(episode.frames[0][0].as_path(), seen.images[0].clone())];
            report.input = Some(input::examine(&mut policy, &files, &evidence.instruction, key)?);
            let diagnosis = Diagnosis::new(&evidence);
            figures = episode_figures(&config, &evidence, &diagnosis, &seen.images[0])?;
            report.diagnosis = Some(diagnosis);
        }
    }
    if let Some(path) = &args.html {
        cli::write(path, page(&report, &figures)?)?;
    }
    let text = if args.json { serde_json::to_string(&report)? + "\n" } else { report.text() };
    std::io::stdout().lock().write_all(text.as_bytes()).context("cannot write to stdout")
}

/// Data sets' action statistics, by name.
fn other_statistics(files: &[PathBuf]) -> Result<Vec<(String, Scale)>> {
    let mut all = Vec::new();
    for file in files {
        let cannot = || format!("cannot use {}", file.display());
        let statistics = Statistics::parse(std::fs::read_to_string(file).with_context(cannot)?);
        let datasets = statistics.with_context(cannot)?.datasets().clone();
        all.extend(datasets.into_iter().map(|(name, dataset)| (name, dataset.action)));
    }
    Ok(all)
}

/// A bar where somebody watches.
fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{bar:30} {pos}/{len} pictures judged, {eta} left";
    ProgressBar::new(0).with_style(ProgressStyle::with_template(style).expect("a sound template"))
}

fn shown(caption: &str, config: &Config, image: &RgbImage) -> Result<Figure> {
    Ok(Figure { caption: caption.to_owned(), image: config.preprocess.shown(image)? })
}

/// The first picture as it was recorded, as the model sees it, and as it would with the verdict's fix.
fn episode_figures(
    config: &Config,
    evidence: &Evidence,
    diagnosis: &Diagnosis,
    image: &RgbImage,
) -> Result<Vec<Figure>> {
    let mut figures = vec![
        Figure { caption: "the first frame".to_owned(), image: image.clone() },
        shown("as the model sees it", config, image)?,
    ];
    let best = diagnosis.hypotheses.first().filter(|best| best.cause == diagnosis.verdict.cause);
    let trial = evidence.trials.iter().map(|trial| &trial.hypothesis);
    let trial = trial
        .into_iter()
        .find(|h| best.is_some_and(|best| best.name == h.name && best.cause == h.cause));
    if let Some(Change::Picture(change)) = trial.map(|hypothesis| &hypothesis.change) {
        figures.push(shown("as it would see it with the fix", config, &change.apply(image))?);
    }
    Ok(figures)
}
