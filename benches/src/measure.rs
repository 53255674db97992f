//! The measurement: a model is opened twice, cold and warm, then repeats one control step.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use openvla::{Options, Session};
use openvla_convert::inspect::{Inspection, inspect};
use rustix::fs::Advice;

use crate::machine::{self, Origin, disk_bytes};
use crate::results::{Load, Memory, Model, Results, Stage, Summary, VERSION};
use crate::subject::{Part, Sample, Subject};
use crate::work::Work;
use crate::workload::Workload;

/// Measures `n` control steps of a model file.
///
/// # Errors
/// What is wrong with the file, or if a step gives other numbers than the one before it.
pub fn measure(model: &Path, options: &Options, instruction: &str, n: usize) -> Result<Results> {
    let gpus = options.devices.gpus()?;
    let free: Vec<usize> = gpus.iter().map(|gpu| gpu.memory().0).collect();
    let origin = Origin::now("openvla-bench", options)?;
    let file = inspect(model)?;
    // Two first steps, one to draft from, and the limits.
    let style = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len}, {eta} left")?;
    let progress = ProgressBar::new(2 * n as u64 + 4).with_style(style).with_message("steps");
    progress.tick();
    forget(model)?;
    let (load_cold, subject, wanted) = load(model, options, instruction)?;
    drop(subject);
    progress.inc(1);
    let (load_warm, mut subject, first) = load(model, options, instruction)?;
    progress.inc(1);
    check(&first, &wanted, "opened again")?;
    let mut samples = Vec::with_capacity(n);
    for i in 0..n {
        let sample = subject.act()?;
        check(&sample, &wanted, &format!("in repetition {}", i + 1))?;
        samples.push(sample);
        progress.inc(1);
    }
    let mut stages = stages(&subject, &file, &samples);
    let drafted = match &mut subject {
        Subject::OpenVla(workload) => Some(drafted(workload, n, &progress)?),
        Subject::Oft(_) => None, // nothing is decoded step by step
    };
    let peak_bytes = machine::peak_bytes();
    let mut memory = memory(&subject, &file);
    for (gpu, free) in gpus.iter().zip(free) {
        let component = format!("{}: taken, as its driver says", gpu.name);
        memory.push(Memory { component, bytes: free.saturating_sub(gpu.memory().0) as u64 });
    }
    let (drafted_step, drafted_passes) = drafted.unzip();
    stages.extend(drafted_step);
    let chunks = subject.chunks();
    drop(subject); // gives its memory back
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
            chunks,
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
fn load(model: &Path, options: &Options, instruction: &str) -> Result<(Load, Subject, Sample)> {
    let (start, before) = (Instant::now(), disk_bytes());
    let mut subject = Subject::open(model, options, instruction)?;
    let open_ms = milliseconds(start);
    let start = Instant::now();
    let sample = subject.act()?;
    let first_step_ms = milliseconds(start);
    let disk_bytes = disk_bytes().zip(before).map(|(after, before)| after - before);
    Ok((Load { open_ms, first_step_ms, disk_bytes }, subject, sample))
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// The same input gives the same numbers, or a time says nothing.
fn check(sample: &Sample, wanted: &Sample, when: &str) -> Result<()> {
    ensure!(
        sample.given == wanted.given,
        "the model gave {:?} at first and {:?} {when}; do tests pass on this machine?",
        wanted.given,
        sample.given
    );
    Ok(())
}

fn stages(subject: &Subject, file: &Inspection, samples: &[Sample]) -> Vec<Stage> {
    let stage = |(i, Part { name, rows, work }): (usize, Part)| {
        let ms: Vec<f64> = samples.iter().map(|sample| sample.ms[i]).collect();
        Stage { name: name.to_owned(), rows, ms: Summary::new(&ms), work }
    };
    subject.stages(file).into_iter().enumerate().map(stage).collect()
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

fn memory(subject: &Subject, file: &Inspection) -> Vec<Memory> {
    let weights = |of: &dyn Fn(&str) -> bool| {
        file.tensors.iter().filter(|group| of(&group.component)).map(|group| group.bytes).sum()
    };
    let towers: Vec<_> = subject.config().towers.iter().map(|t| t.name.clone()).collect();
    let is_tower = |name: &str| towers.iter().any(|tower| tower == name);
    let is_oft = |name: &str| ["oft_head", "state_projector"].contains(&name);
    let is_llama = |name: &str| !is_tower(name) && name != "projector" && !is_oft(name);
    let of_file = [
        ("weights: vision", weights(&is_tower)),
        ("weights: projector", weights(&|name| name == "projector")),
        ("weights: Llama", weights(&is_llama)),
        ("weights: OpenVLA-OFT's head, state", weights(&is_oft)),
    ];
    let mut memory: Vec<_> =
        of_file.map(|(component, bytes)| Memory { component: component.to_owned(), bytes }).into();
    memory.retain(|part| part.bytes > 0);
    for usage in subject.usage() {
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
