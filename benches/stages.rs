//! How long a control step takes, stage by stage and whole.
//!
//! ```sh
//! cargo bench --bench hz                                 # the built-in example
//! OPENVLA_MODEL=openvla-7b.gguf cargo bench --bench hz   # another one
//! ```
//!
//! Decode steps read every weight of the Llama and its cache once each, so their throughput is theirs.
//! `step` is the whole: image in, motion out; its `elem/s` are Hz. Of an OpenVLA-OFT, a motion is a chunk of actions,
//! and one forward pass takes the place of prefill and decode steps. What was measured, and what changed it, is in
//! `SPEED.md`.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use openvla::Options;
use openvla_bench::subject::Subject;
use openvla_bench::workload::{INSTRUCTION, ModelFile, Workload};
use openvla_convert::inspect::{Inspection, inspect};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let model = ModelFile::find(None).unwrap();
    let mut subject = Subject::open(&model.path, &Options::default(), INSTRUCTION).unwrap();
    stages(&mut subject, &inspect(&model.path).unwrap(), &mut criterion);
    if let Subject::OpenVla(workload) = &mut subject {
        draft(workload, &mut criterion);
    }
    step(&mut subject, &mut criterion);
    criterion.final_summary();
}

/// Each stage by itself, on what the one before left; its bytes are those of the weights that it reads.
fn stages(subject: &mut Subject, file: &Inspection, criterion: &mut Criterion) {
    let parts = subject.stages(file);
    let mut group = criterion.benchmark_group("stage");
    let each = subject.each_stage(|name, run| {
        let part = parts.iter().find(|part| part.name == name).expect("a stage of this step");
        group.throughput(Throughput::Bytes(part.work.bytes));
        group.bench_function(name, |b| b.iter(|| run().unwrap()));
        Ok(())
    });
    each.unwrap();
}

/// All tokens after the first, drafted and checked at once.
fn draft(workload: &mut Workload, criterion: &mut Criterion) {
    let n_step = workload.n_step();
    let Workload { policy, image, ids, .. } = workload;
    let config = policy.config().clone();
    let tokens = vec![config.actions.ids().start; n_step];
    let network = policy.network();
    let features = network.encode(&config.preprocess.planes(image).unwrap()).unwrap();
    let soft = network.project(&features).unwrap();
    let mut sequence = network.prefill(ids, &soft).unwrap();
    criterion.bench_function(&format!("stage/decode, drafted: {n_step}"), |b| {
        b.iter(|| {
            sequence.step_drafted(&tokens).unwrap();
            sequence.forget(n_step);
        });
    });
}

/// The whole. What the model gives must be the same every time.
fn step(subject: &mut Subject, criterion: &mut Criterion) {
    let mut act = || subject.act().unwrap().given;
    let wanted = act();
    let mut group = criterion.benchmark_group("step");
    group.throughput(Throughput::Elements(1));
    group.bench_function("image to motion", |b| b.iter(|| assert_eq!(act(), wanted)));
}
