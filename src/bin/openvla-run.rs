//! `openvla-run`: one image and one instruction to one motion.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use openvla::{Action, Dataset, Decoding, Devices, OpenVla, Options, Usage};

/// The example checkpoint of this repository at 4 bits. Swap the file to change the default model.
static EXAMPLE: &[u8] = include_bytes!("../../example/example.gguf");

/// Computes the motion that an OpenVLA model makes of an image and an instruction.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// PNG, JPEG, WebP or BMP of any size; "-" reads it from stdin
    image: PathBuf,
    /// What the robot is asked to do: "put eggplant into pot"
    instruction: String,
    /// Model file [default: $OPENVLA_MODEL, else the built-in example]
    #[arg(short, long, value_name = "MODEL.gguf")]
    model: Option<PathBuf>,
    /// Data set whose units the motion is in; needed if the model knows several
    #[arg(long, value_name = "KEY")]
    unnorm_key: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Choose among all tokens as the reference does, even those that are no motion
    #[arg(long)]
    reference_decoding: bool,
    /// Where to compute: auto takes the GPUs there are, else the CPU; cuda, cuda:N
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: Devices,
    /// Layers of the Llama to keep on GPUs, the rest on the CPU [default: all]; also -ngl N
    #[arg(long, value_name = "N")]
    n_gpu_layers: Option<usize>,
    /// CPU threads [default: one for each core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,
}

fn main() -> ExitCode {
    // As llama.cpp's programs spell it; clap knows no short names of three letters.
    let spelled = |arg| if arg == "-ngl" { "--n-gpu-layers".into() } else { arg };
    match run(&Args::parse_from(std::env::args_os().map(spelled))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = error.downcast_ref::<openvla::Error>().and_then(|e| e.hint()) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let mut policy = open(args)?;
    let image = openvla::decode(&read(&args.image)?)?;
    let action = policy.act(&image, &args.instruction, args.unnorm_key.as_deref())?;
    if !action.unconstrained.all_actions && !args.json {
        eprintln!(
            "warning: among all tokens the model would have chosen one that is no motion; \
             is this what it was trained for?"
        );
    }
    policy.usage().iter().filter(|usage| usage.weights > 0).for_each(report);
    let mut out = std::io::stdout().lock();
    if args.json {
        return Ok(writeln!(out, "{}", serde_json::to_string(&action)?)?);
    }
    let (_, dataset) = policy.config().statistics.select(Some(&action.unnorm_key))?;
    out.write_all(table(&action, dataset).as_bytes())?;
    Ok(())
}

fn open(args: &Args) -> Result<OpenVla> {
    let mut options = Options::default();
    options.devices = args.device.clone();
    options.n_gpu_layers = args.n_gpu_layers;
    if let Some(n) = args.threads {
        options.n_threads = usize::from(n);
    }
    if args.reference_decoding {
        options.decoding = Decoding::Reference;
    }
    let named = args.model.clone().or_else(|| std::env::var_os("OPENVLA_MODEL").map(Into::into));
    match named {
        Some(path) => Ok(OpenVla::open(path, &options)?),
        None => {
            eprintln!(
                "no model named: using the built-in example, whose weights are random; \
                 -m MODEL.gguf names yours"
            );
            Ok(OpenVla::built_in("the built-in example", EXAMPLE, &options)?)
        }
    }
}

/// What a device had to hold.
fn report(Usage { device, weights, states, graphs, .. }: &Usage) {
    let [weights, states, graphs] = [weights, states, graphs].map(|bytes| *bytes as f64 / 1e6);
    eprintln!(
        "{device}: {:.1} MB (weights {weights:.1}, cache and states {states:.1}, between operations \
         {graphs:.1})",
        weights + states + graphs
    );
}

/// More than any camera's picture.
const MAX_IMAGE_BYTES: u64 = 1 << 28;

fn read(path: &Path) -> Result<Vec<u8>> {
    let name = || format!("cannot read the image {}", path.display());
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        let stdin = std::io::stdin().lock();
        anyhow::ensure!(!stdin.is_terminal(), "\"-\" reads an image from stdin: pipe one in");
        stdin.take(MAX_IMAGE_BYTES + 1).read_to_end(&mut bytes)
    } else {
        let file = std::fs::File::open(path).with_context(name)?;
        file.take(MAX_IMAGE_BYTES + 1).read_to_end(&mut bytes)
    };
    let n = read.with_context(name)? as u64;
    anyhow::ensure!(n <= MAX_IMAGE_BYTES, "{}: more than {MAX_IMAGE_BYTES} bytes", name());
    Ok(bytes)
}

/// Names of the seven numbers that a motion of one arm has.
const ARM: [&str; 7] = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"];

fn table(action: &Action, dataset: &Dataset) -> String {
    let n = action.action.len();
    let name = |i: usize| match n {
        7 => ARM[i].to_owned(),
        _ => format!("action[{i}]"),
    };
    let line = |i: usize| {
        let (low, high) = match dataset.mask[i] {
            true => (dataset.q01[i], dataset.q99[i]),
            false => (-1.0, 1.0),
        };
        format!("{:<10} {:>12.6}   of {low:.6} … {high:.6}\n", name(i), action.action[i])
    };
    let rows: String = (0..n).map(line).collect();
    format!("{rows}in units of {}, {:.0} ms\n", action.unnorm_key, action.timing_ms.total)
}
