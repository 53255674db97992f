//! The measurement: a model is opened twice, cold and warm, then repeats one control step.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use openvla::{Action, Options, Session, Timing};
use openvla_convert::inspect::{Inspection, inspect};
use rustix::fs::Advice;

use crate::machine::{self, Origin, disk_bytes};
use crate::results::{Load, Memory, Model, Results, Stage, Summary, VERSION};
use crate::work::{self, Work};
use crate::workload::Workload;

/// Measures `n` control steps of a model file.
///
/// # Errors
/// What is wrong with the file, or if a step gives other tokens than the one before it.
pub fn measure(model: &Path, options: &Options, n: usize) -> Result<Results> {
    let gpus = options.devices.gpus()?;
    let free: Vec<usize> = gpus.iter().map(|gpu| gpu.memory().0).collect();
    let origin = Origin::now("openvla-bench", options)?;
    let file = inspect(model)?;
    // Two first steps, one to draft from, and the limits.
    let style = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len}, {eta} left")?;
    let progress = ProgressBar::new(2 * n as u64 + 4).with_style(style).with_message("steps");
    progress.tick();
    forget(model)?;
    let (load_cold, workload, wanted) = load(model, options)?;
    drop(workload);
    progress.inc(1);
    let (load_warm, mut workload, first) = load(model, options)?;
    progress.inc(1);
    check(&first, &wanted, "opened again")?;
    let mut timings = Vec::with_capacity(n);
    for i in 0..n {
        let action = workload.act()?;
        check(&action, &wanted, &format!("in repetition {}", i + 1))?;
        timings.push(action.timing_ms);
        progress.inc(1);
    }
    let (drafted_step, drafted_passes) = drafted(&mut workload, n, &progress)?;
    let peak_bytes = machine::peak_bytes();
    let (mut stages, mut memory) = (stages(&workload, &file, &timings), memory(&workload, &file));
    for (gpu, free) in gpus.iter().zip(free) {
        let component = format!("{}: taken, as its driver says", gpu.name);
        memory.push(Memory { component, bytes: free.saturating_sub(gpu.memory().0) as u64 });
    }
    stages.push(drafted_step);
    drop(workload); // gives its memory back
    let limits = machine::limits(options)?;
    progress.finish_and_clear();
    Ok(Results {
        version: VERSION,
        origin,
        model: Model {
            name: file.general.name.clone(),
            r#type: file.r#type.map(str::to_owned),
            bytes: file.file_bytes,
            parameters: parameters(&file),
        },
        load_cold,
        load_warm,
        repetitions: n,
        stages,
        drafted_passes,
        memory,
        peak_bytes,
        limits,
    })
}

/// Asks the system to drop the file's pages. It need not: [`Load::disk_bytes`] says what it read.
fn forget(model: &Path) -> Result<()> {
    let file = File::open(model).with_context(|| format!("cannot open {}", model.display()))?;
    let _ = file.sync_all(); // pages that are not on the disk yet stay
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    Ok(())
}

/// Opens a model and takes the first step.
fn load(model: &Path, options: &Options) -> Result<(Load, Workload, Action)> {
    let (start, before) = (Instant::now(), disk_bytes());
    let mut workload = Workload::open(model, options)?;
    let open_ms = start.elapsed().as_secs_f64() * 1e3;
    let action = workload.act()?;
    let disk_bytes = disk_bytes().zip(before).map(|(after, before)| after - before);
    Ok((Load { open_ms, first_step_ms: action.timing_ms.total, disk_bytes }, workload, action))
}

/// The same input gives the same tokens, or a time says nothing.
fn check(action: &Action, wanted: &Action, when: &str) -> Result<()> {
    ensure!(
        action.tokens == wanted.tokens,
        "the model gave {:?} at first and {:?} {when}; do tests pass on this machine?",
        wanted.tokens,
        action.tokens
    );
    Ok(())
}

fn stages(workload: &Workload, file: &Inspection, timings: &[Timing]) -> Vec<Stage> {
    let (n_row, n_step) = (workload.n_row(), workload.n_step());
    let config = workload.policy.config();
    let n_patch = config.n_patch();
    let token = work::decode_step(config, file, n_row);
    let stage = |name: &str, rows, work, ms: fn(&Timing) -> f64, parts: usize| {
        let samples: Vec<f64> = timings.iter().map(|t| ms(t) / parts as f64).collect();
        Stage { name: name.to_owned(), rows, ms: Summary::new(&samples), work }
    };
    let (vision, projector) = (work::vision(config, file), work::projector(config, file));
    let (prefill, decode) = (work::prefill(config, file, n_row), token * n_step);
    let all = [vision, projector, prefill, decode].into_iter().sum();
    vec![
        stage("preprocess", None, Work::default(), |t| t.preprocess, 1),
        stage("vision", Some(n_patch), vision, |t| t.vision, 1),
        stage("projector", Some(n_patch), projector, |t| t.projector, 1),
        stage("prefill", Some(n_row), prefill, |t| t.prefill, 1),
        stage("decode_token", Some(1), token, |t| t.decode, n_step.max(1)),
        stage("decode", Some(n_step), decode, |t| t.decode, 1),
        stage("step", None, all, |t| t.total, 1),
    ]
}

/// The best that drafts can do: the same picture again, whose tokens are guessed from the step
/// before. A pass of several rows may round otherwise, so tokens may differ here. Gives the passes too.
fn drafted(workload: &mut Workload, n: usize, progress: &ProgressBar) -> Result<(Stage, f64)> {
    let mut session = Session::default();
    workload.act_in(&mut session)?;
    progress.inc(1);
    let (mut samples, mut passes) = (Vec::with_capacity(n), 0);
    for _ in 0..n {
        let action = workload.act_in(&mut session)?;
        samples.push(action.timing_ms.total);
        passes += action.draft.passes;
        progress.inc(1);
    }
    let (name, ms) = ("drafted_step".to_owned(), Summary::new(&samples));
    Ok((Stage { name, rows: None, ms, work: Work::default() }, passes as f64 / n as f64))
}

/// Of the model: the head's action rows are in the file twice.
fn parameters(file: &Inspection) -> u64 {
    let own = file.tensors.iter().filter(|group| group.component != "action_head");
    own.map(|group| group.parameters).sum()
}

fn memory(workload: &Workload, file: &Inspection) -> Vec<Memory> {
    let weights = |of: &dyn Fn(&str) -> bool| {
        file.tensors.iter().filter(|group| of(&group.component)).map(|group| group.bytes).sum()
    };
    let towers: Vec<_> = workload.policy.config().towers.iter().map(|t| t.name.clone()).collect();
    let is_tower = |name: &str| towers.iter().any(|tower| tower == name);
    let of_file = [
        ("weights: vision", weights(&is_tower)),
        ("weights: projector", weights(&|name| name == "projector")),
        ("weights: Llama", weights(&|name| !is_tower(name) && name != "projector")),
    ];
    let mut memory: Vec<_> =
        of_file.map(|(component, bytes)| Memory { component: component.to_owned(), bytes }).into();
    for usage in workload.policy.usage() {
        for (what, bytes) in [
            ("weights", usage.weights),
            ("keys, values, states", usage.states),
            ("between operations", usage.graphs),
        ] {
            let component = format!("{}: {what}", usage.device);
            memory.push(Memory { component, bytes: bytes as u64 });
        }
    }
    memory
}
