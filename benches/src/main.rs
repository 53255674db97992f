//! `openvla-bench`: what a control step costs here, and what results say side by side.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use openvla::cli::{self, DeviceArgs, write};
use openvla::{Config, Draft};
use openvla_bench::compare::compare;
use openvla_bench::measure::measure;
use openvla_bench::results::Results;
use openvla_bench::types::Comparison;
use openvla_bench::workload::{INSTRUCTION, ModelFile, Workload};
use openvla_bench::{cores, jitter, plot, project, report, robots, types};
use openvla_kernels::Gguf;
use openvla_tabletop::{Pace, Plan, STEPS, progress};

/// Measures an OpenVLA or OpenVLA-OFT model stage by stage, against what this machine reaches at best.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    measure: Measure,
}

#[derive(clap::Args)]
struct Measure {
    /// Model file [default: $OPENVLA_MODEL, else the built-in example]
    #[arg(short, long, value_name = "MODEL.gguf")]
    model: Option<PathBuf>,
    /// Control steps to measure, after two that do not count
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// What the robot is asked to do: its words are rows of the Llama's pass
    #[arg(long, value_name = "TEXT", default_value = INSTRUCTION)]
    instruction: String,
    #[command(flatten)]
    device: DeviceArgs,
    /// How to print the result: for people, or in full
    #[arg(short, long, value_enum, default_value_t = Format::Md)]
    output: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
}

#[derive(Subcommand)]
enum Command {
    /// Draws steps per second by machine and type, as Figure 6 of the OpenVLA paper
    Plot {
        /// Results that `-o json` printed
        results: Vec<PathBuf>,
        /// File to write
        #[arg(short, long, value_name = "FILE.svg", value_parser = cli::output_file())]
        output: PathBuf,
    },
    /// Prints results side by side: the README's table
    Table {
        /// Results that `-o json` printed
        results: Vec<PathBuf>,
    },
    /// Prints how far a device's numbers are from a CPU's, stage by stage, as JSON
    Compare {
        /// Model file
        #[arg(short, long, value_name = "MODEL.gguf")]
        model: PathBuf,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Prints what steps of 1, 2, 4 and 8 robots cost that are served together
    Robots {
        /// Model file [default: $OPENVLA_MODEL, else the built-in example]
        #[arg(short, long, value_name = "MODEL.gguf")]
        model: Option<PathBuf>,
        /// Steps of each, of which the fastest counts, after one that does not
        #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
        repetitions: u16,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Prints how a step scales with threads, and projects it to more cores
    Cores {
        /// Model file [default: $OPENVLA_MODEL, else the built-in example]
        #[arg(short, long, value_name = "MODEL.gguf")]
        model: Option<PathBuf>,
        /// Runs of each stage, of which the fastest counts, after one that does not
        #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
        repetitions: u16,
        /// Of the memory to project for, in GB/s [default: what a copy reaches here]
        #[arg(long, value_name = "GB/S", value_parser = clap::value_parser!(u32).range(1..))]
        bandwidth: Option<u32>,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Prints how evenly many steps take their time, and what held the slowest up
    Jitter {
        /// Model file [default: $OPENVLA_MODEL, else the built-in example]
        #[arg(short, long, value_name = "MODEL.gguf")]
        model: Option<PathBuf>,
        /// Steps that count
        #[arg(short, long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
        repetitions: u32,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Prints what cards that were not measured might reach with the same file
    Project {
        /// A result that `-o json` printed
        result: PathBuf,
        /// "RTX 4090"; may be given several times [default: all that are known]
        #[arg(long = "card", value_name = "NAME")]
        cards: Vec<String>,
    },
    /// One checkpoint at every type, on the simulated table: success, tokens, size, speed
    Types {
        /// Folder of the checkpoint
        checkpoint: PathBuf,
        /// Episodes of each suite
        #[arg(short = 'n', long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        episodes: u32,
        /// Seed of the first scene
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Also writes STEM.json and STEM.svg
        #[arg(short, long, value_name = "STEM", value_parser = cli::output_file())]
        output: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    cli::end(run(cli::start()))
}

fn run(args: Args) -> Result<()> {
    let text = match args.command {
        Some(Command::Plot { results, output }) => {
            write(&output, &plot::svg(&Results::read_all(&results)?)?)?;
            cli::say(format_args!("wrote {}", output.display()));
            return Ok(());
        }
        Some(Command::Table { results }) => report::table(&Results::read_all(&results)?)?,
        Some(Command::Project { result, cards }) => {
            project::table(&Results::read(&result)?, &cards)?
        }
        Some(Command::Types { checkpoint, episodes, seed, output }) => {
            types(&checkpoint, episodes, seed, output)?
        }
        Some(Command::Compare { model, device }) => {
            serde_json::to_string_pretty(&compare(&model, &device.options())?)? + "\n"
        }
        Some(Command::Robots { model, repetitions, device }) => {
            let model = ModelFile::find(model)?;
            robots::table(&mut Workload::open(&model.path, &device.options())?, repetitions.into())?
        }
        Some(Command::Cores { model, repetitions, bandwidth, device }) => {
            let model = ModelFile::find(model)?;
            let (n, bandwidth) = (repetitions.into(), bandwidth.map(|gb| f64::from(gb) * 1e9));
            let progress = progress(0, "numbers of threads");
            let tables = cores::tables(&model.path, &device.options(), n, bandwidth, &progress)?;
            progress.finish_and_clear();
            tables
        }
        Some(Command::Jitter { model, repetitions, device }) => {
            let model = ModelFile::find(model)?;
            let mut workload = Workload::open(&model.path, &device.options())?;
            let progress = progress(0, "steps");
            let table = jitter::table(&mut workload, repetitions as usize, &progress)?;
            progress.finish_and_clear();
            table
        }
        None => args.measure.run()?,
    };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

fn types(checkpoint: &Path, episodes: u32, seed: u64, output: Option<PathBuf>) -> Result<String> {
    let plan = Plan { episodes: episodes as usize, seed, pace: Pace::Blocking, steps: STEPS };
    let progress = progress(0, "episodes");
    let comparison = Comparison::of(checkpoint, &plan, &progress)?;
    progress.finish_and_clear();
    if let Some(stem) = output {
        let text = serde_json::to_string_pretty(&comparison)? + "\n";
        write(&stem.with_extension("json"), text)?;
        write(&stem.with_extension("svg"), types::svg(&comparison)?)?;
    }
    Ok(types::table(&comparison))
}

impl Measure {
    fn run(self) -> Result<String> {
        let model = ModelFile::find(self.model)?;
        let mut options = self.device.options();
        let is_oft = Config::read(&Gguf::open(&model.path)?)?.oft.is_some();
        options.draft = if is_oft { Draft::Off } else { Draft::Auto };
        let results = measure(&model.path, &options, &self.instruction, self.repetitions.into())?;
        Ok(match self.output {
            Format::Md => report::markdown(&results),
            Format::Csv => report::csv(&results),
            Format::Json => serde_json::to_string_pretty(&results)? + "\n",
            Format::Jsonl => serde_json::to_string(&results)? + "\n",
        })
    }
}
