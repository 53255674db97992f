//! How long a control step takes, stage by stage and whole.
//!
//! ```sh
//! cargo bench --bench hz                                 # the built-in example
//! OPENVLA_MODEL=openvla-7b.gguf cargo bench --bench hz   # another one
//! ```
//!
//! A decode step reads every weight of the Llama and its cache once, so its throughput is theirs.
//! `step` is the whole: image in, motion out; its `elem/s` are Hz. Of an OpenVLA-OFT, a motion is a chunk of actions,
//! and one forward pass takes the place of prefill and decode steps. What was measured, and what changed it, is in
//! `SPEED.md`.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use openvla::Options;
use openvla_bench::subject::Subject;
use openvla_bench::work;
use openvla_bench::workload::{INSTRUCTION, ModelFile, OftWorkload, Workload};
use openvla_convert::inspect::{Inspection, inspect};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let model = ModelFile::find(None).unwrap();
    let mut subject = Subject::open(&model.path, &Options::default(), INSTRUCTION).unwrap();
    match &mut subject {
        Subject::OpenVla(workload) => {
            openvla(workload, &inspect(&model.path).unwrap(), &mut criterion);
        }
        Subject::Oft(workload) => oft(workload, &mut criterion),
    }
    step(&mut subject, &mut criterion);
    criterion.final_summary();
}

/// Each stage by itself, on what the one before left.
fn openvla(workload: &mut Workload, file: &Inspection, criterion: &mut Criterion) {
    let (n_row, n_step) = (workload.n_row(), workload.n_step());
    let Workload { policy, image, ids, .. } = workload;
    let config = policy.config().clone();
    let token = config.actions.ids().start;
    let planes = config.preprocess.planes(image).unwrap();
    let network = policy.network();
    let mut group = criterion.benchmark_group("stage");
    group.bench_function("preprocess 640x480", |b| {
        b.iter(|| config.preprocess.planes(image).unwrap());
    });
    group.bench_function("vision", |b| b.iter(|| network.encode(&planes).unwrap()));
    let features = network.encode(&planes).unwrap();
    group.bench_function("projector", |b| b.iter(|| network.project(&features).unwrap()));
    let soft = network.project(&features).unwrap();
    group.bench_function(format!("prefill {n_row} rows"), |b| {
        b.iter(|| drop(network.prefill(ids, &soft).unwrap()));
    });
    let step = work::decode_step(&config, file, n_row);
    group.throughput(Throughput::Bytes(step.bytes));
    let mut sequence = network.prefill(ids, &soft).unwrap();
    for n in [1, n_step] {
        let tokens = vec![token; n];
        group.bench_function(format!("decode, rows at once: {n}"), |b| {
            b.iter(|| {
                sequence.step_drafted(&tokens).unwrap();
                sequence.forget(n);
            });
        });
    }
}

/// The same of an OpenVLA-OFT, with the pictures of all of its cameras.
fn oft(workload: &mut OftWorkload, criterion: &mut Criterion) {
    let (n_camera, n_row) = (workload.images.len(), workload.n_row());
    let OftWorkload { policy, images, ids, .. } = workload;
    let config = policy.config().clone();
    let state = vec![0.0; policy.oft().n_state];
    let prepare = || images.iter().flat_map(|image| config.preprocess.planes(image).unwrap());
    let planes: Vec<f32> = prepare().collect();
    let network = policy.network();
    let mut group = criterion.benchmark_group(format!("stage, cameras: {n_camera}"));
    group.bench_function("preprocess 640x480", |b| b.iter(|| prepare().collect::<Vec<f32>>()));
    group.bench_function("vision", |b| b.iter(|| network.encode(&planes, ids).unwrap()));
    let features = network.encode(&planes, ids).unwrap();
    group.bench_function("projector", |b| b.iter(|| network.project(&features).unwrap()));
    let soft = network.project(&features).unwrap();
    group.bench_function(format!("forward {n_row} rows"), |b| {
        b.iter(|| network.forward(ids, &soft, &state).unwrap());
    });
    let hidden = network.forward(ids, &soft, &state).unwrap();
    group.bench_function("head", |b| b.iter(|| network.actions(&hidden).unwrap()));
}

/// The whole. What the model gives must be the same every time.
fn step(subject: &mut Subject, criterion: &mut Criterion) {
    let mut act = || subject.act().unwrap().given;
    let wanted = act();
    let mut group = criterion.benchmark_group("step");
    group.throughput(Throughput::Elements(1));
    group.bench_function("image to motion", |b| b.iter(|| assert_eq!(act(), wanted)));
}
