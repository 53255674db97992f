//! How long a control step takes, stage by stage and whole.
//!
//! ```sh
//! cargo bench --bench hz                                 # the built-in example
//! OPENVLA_MODEL=openvla-7b.gguf cargo bench --bench hz   # another one
//! ```
//!
//! A decode step reads every weight of the Llama and its cache once, so its throughput is theirs.
//! `step` is the whole: image in, motion out; its `elem/s` are Hz. What was measured, and what
//! changed it, is in `SPEED.md`.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use openvla::Options;
use openvla_bench::work;
use openvla_bench::workload::{ModelFile, Workload};
use openvla_convert::inspect::{Inspection, inspect};

/// A model, what it is given, and what is in its file.
struct Bench {
    workload: Workload,
    file: Inspection,
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let model = ModelFile::find(None).unwrap();
    let workload = Workload::open(&model.path, &Options::default()).unwrap();
    let mut bench = Bench { workload, file: inspect(&model.path).unwrap() };
    bench.stages(&mut criterion);
    bench.step(&mut criterion);
    criterion.final_summary();
}

impl Bench {
    /// Each stage by itself, on what the one before left.
    fn stages(&mut self, criterion: &mut Criterion) {
        let (n_row, n_step) = (self.workload.n_row(), self.workload.n_step());
        let Workload { policy, image, ids, .. } = &mut self.workload;
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
        let step = work::decode_step(&config, &self.file, n_row);
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

    /// The whole. Every motion must be the first one again.
    fn step(mut self, criterion: &mut Criterion) {
        let mut act = || self.workload.act().unwrap().tokens;
        let wanted = act();
        let mut group = criterion.benchmark_group("step");
        group.throughput(Throughput::Elements(1));
        group.bench_function("image to motion", |b| b.iter(|| assert_eq!(act(), wanted)));
    }
}
