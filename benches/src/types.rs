//! One checkpoint at several types on the simulated table: how often each succeeds, and what it costs.
//!
//! OpenVLA's Table 2 in miniature (arXiv 2406.09246): the same scenes for every type, with a world
//! that waits; and how success falls as a policy takes longer, with a world that does not.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use openvla::{OpenVla, Options};
use openvla_convert::{Conversion, plan::Encoding};
use openvla_tabletop::{
    Expert, OpenVlaModel, Pace, Plan, Policy, Report, Scene, Suite, World, evaluate, run,
};
use plotters::prelude::*;
use serde::Serialize;

use crate::machine::Origin;
use crate::plot::COLORS;

/// What is compared. The first is what tokens are held against.
const TYPES: [&str; 8] = ["F32", "BF16", "Q8_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS"];
/// Whose success is held against the time a policy takes, after the expert.
const RUNNING: [&str; 2] = ["BF16", "Q4_K_M"];
/// Those times: 833 ms are 1.2 Hz, which the paper measured for int8, and 333 ms are 3 Hz, its int4.
const LATENCIES: [f64; 6] = [0.0, 100.0, 200.0, 333.0, 500.0, 833.0];
/// Steps a second of a world that does not wait, as the paper's robot, and how many an episode has.
const HZ: f64 = 5.0;
const RUNNING_STEPS: usize = 60;
/// Episodes whose tokens are compared, at most.
const COMPARED: usize = 50;

/// All of it.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// With which program, when and where; each policy has one thread.
    #[serde(flatten)]
    pub origin: Origin,
    /// A line for each type.
    pub types: Vec<Type>,
    /// Success of the expert and of some types at each of several latencies.
    pub running: Vec<Running>,
}

/// One type in a world that waits.
#[derive(Debug, Serialize)]
pub struct Type {
    /// Its name.
    pub name: &'static str,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes that the device holds.
    pub memory: usize,
    /// Control steps a second on one core, camera not counted.
    pub hz: f64,
    /// The share of tokens that are F32's, in the steps of F32's own episodes of suite base.
    pub agreement: f64,
    /// Success by suite.
    pub suites: Vec<Report>,
}

/// One policy in a world that does not wait.
#[derive(Debug, Serialize)]
pub struct Running {
    /// The type, or `expert`.
    pub name: &'static str,
    /// How long it takes.
    pub latency_ms: f64,
    /// Success.
    pub report: Report,
}

impl Comparison {
    /// Converts a checkpoint to each type and lets it act on the same scenes.
    ///
    /// # Errors
    /// If the checkpoint cannot be converted, or those of the policy.
    pub fn of(checkpoint: &Path, plan: &Plan, progress: &ProgressBar) -> Result<Self> {
        let origin = Origin::now("openvla-bench", &one_core())?;
        let dir = tempfile::tempdir().context("cannot make a folder for temporary files")?;
        let waiting = [Suite::Base, Suite::Language];
        let n = TYPES.len() * waiting.len() + (1 + RUNNING.len()) * LATENCIES.len();
        progress.set_length(n as u64 * plan.episodes as u64);
        let (mut seen, mut types) = (Vec::new(), Vec::new());
        for name in TYPES {
            let path = dir.path().join(name);
            convert(checkpoint, name, &path)?;
            let mut model = open(&path)?;
            if seen.is_empty() {
                seen = steps(&mut model, plan)?;
            }
            let (agreement, hz) = agreement(&mut model, &seen)?;
            let memory = model.vla().usage().iter().map(|u| u.weights + u.states + u.graphs).sum();
            let mut policies: Vec<Box<dyn Policy + Send>> = vec![Box::new(model)];
            let suites = waiting.map(|suite| evaluate(suite, plan, &mut policies, progress));
            let suites = suites.into_iter().collect::<Result<_>>()?;
            let bytes = path.metadata()?.len();
            types.push(Type { name, bytes, memory, hz, agreement, suites });
        }
        let mut running = Vec::new();
        for name in std::iter::once("expert").chain(RUNNING) {
            let policy: Box<dyn Policy + Send> = match name {
                "expert" => Box::new(Expert { ahead: 1 }),
                name => Box::new(open(&dir.path().join(name))?),
            };
            let mut policies = vec![policy];
            for latency_ms in LATENCIES {
                let pace = Pace::Running { hz: HZ, latency_ms: Some(latency_ms) };
                let plan = Plan { pace, steps: RUNNING_STEPS, ..*plan };
                let report = evaluate(Suite::Base, &plan, &mut policies, progress)?;
                running.push(Running { name, latency_ms, report });
            }
        }
        Ok(Self { origin, types, running })
    }
}

fn one_core() -> Options {
    let mut options = Options::default();
    options.n_threads = 1;
    options
}

fn open(path: &Path) -> Result<OpenVlaModel> {
    OpenVlaModel::new(OpenVla::open(path, &one_core())?, None)
}

fn convert(checkpoint: &Path, name: &str, out: &Path) -> Result<()> {
    let encoding: Encoding = name.parse()?;
    Conversion::new(checkpoint, &encoding.into())?.write(out, &ProgressBar::hidden())
}

/// The worlds that a policy sees in its episodes, and its tokens there.
fn steps(model: &mut OpenVlaModel, plan: &Plan) -> Result<Vec<(World, Vec<u32>)>> {
    let mut worlds = Vec::new();
    for i in 0..plan.episodes.min(COMPARED) as u64 {
        let world = World::new(Scene::new(Suite::Base, plan.seed + i));
        let mut own = Vec::new();
        run(world, model, Pace::Blocking, plan.steps, &mut |world| own.push(world.clone()))?;
        own.pop(); // the end, where nothing was asked
        worlds.extend(own);
    }
    let answer = |world: World| {
        let tokens = model.answer(&model.render_view(&world), &world.scene.instruction)?.tokens;
        Ok((world, tokens))
    };
    worlds.into_iter().map(answer).collect()
}

/// A Markdown table.
pub fn table(comparison: &Comparison) -> String {
    let titles = "| type | file | memory | Hz | tokens as F32's | off by | base | language |\n\
                  |---|---:|---:|---:|---:|---:|---:|---:|\n";
    let line = |kind: &Type| {
        let rates = kind.suites.iter().map(|report| {
            let deviation = (report.rate * (1.0 - report.rate) / report.episodes as f64).sqrt();
            format!("{:.1} ± {:.1} %", 100.0 * report.rate, 100.0 * deviation)
        });
        format!(
            "| {} | {:.2} MB | {:.1} MB | {:.0} | {:.1} % | {:.1} mm | {} |\n",
            kind.name,
            kind.bytes as f64 / 1e6,
            kind.memory as f64 / 1e6,
            kind.hz,
            100.0 * kind.agreement,
            1e3 * kind.suites[0].error.metres,
            rates.collect::<Vec<_>>().join(" | "),
        )
    };
    titles.to_owned() + &comparison.types.iter().map(line).collect::<String>()
}

/// The expert in grey, then the types.
const LINES: [RGBColor; 3] = [RGBColor(120, 120, 120), COLORS[0], COLORS[1]];

/// An SVG of success against the time that a policy takes, with 95 % intervals.
///
/// # Errors
/// If it cannot be drawn.
pub fn svg(comparison: &Comparison) -> Result<String> {
    let mut out = String::new();
    let root = SVGBackend::with_string(&mut out, (640, 360)).into_drawing_area();
    let drawn = (|| {
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption("success when the world does not wait", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(52)
            .build_cartesian_2d(-20.0..860.0, 0.0..102.0)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("milliseconds that the policy takes").y_desc("%").light_line_style(WHITE);
        mesh.draw()?;
        let policies = comparison.running.chunk_by(|a, b| a.name == b.name);
        for ((i, policy), color) in policies.enumerate().zip(LINES) {
            // Beside each other, or their intervals would hide one another.
            let x = |run: &Running| run.latency_ms + 6.0 * (i as f64 - 1.0);
            let rates = policy.iter().map(|run| (x(run), 100.0 * run.report.rate));
            chart
                .draw_series(LineSeries::new(rates, color.stroke_width(2)))?
                .label(policy[0].name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color));
            let bars = policy.iter().map(|run| {
                let ends = run.report.interval.map(|end| (x(run), 100.0 * end));
                PathElement::new(ends, color)
            });
            chart.draw_series(bars)?;
        }
        chart.configure_series_labels().border_style(BLACK.mix(0.3)).draw()?;
        root.present()
    })();
    drawn.ok().context("the picture cannot be drawn")?;
    drop(root);
    Ok(out)
}

/// The share of the same tokens, and steps a second.
fn agreement(model: &mut OpenVlaModel, seen: &[(World, Vec<u32>)]) -> Result<(f64, f64)> {
    let (mut same, mut all, mut seconds) = (0, 0, 0.0);
    for (world, tokens) in seen {
        let picture = model.render_view(world);
        let start = Instant::now();
        let own = model.answer(&picture, &world.scene.instruction)?.tokens;
        seconds += start.elapsed().as_secs_f64();
        same += own.iter().zip(tokens).filter(|(a, b)| a == b).count();
        all += tokens.len();
    }
    Ok((same as f64 / all as f64, seen.len() as f64 / seconds))
}
