//! How long a control step takes, stage by stage and whole, on the CPU.
//!
//! ```sh
//! cargo bench --bench hz                                 # the example model, at --q4
//! OPENVLA_MODEL=openvla-7b.gguf cargo bench --bench hz   # another one
//! ```
//!
//! A decode step reads every weight of the Llama once, so its throughput is that of the weights.
//! `step` is the whole: image in, motion out; its `elem/s` are Hz. What was measured, and what
//! changed it, is in `SPEED.md`.

use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use openvla::image::RgbImage;
use openvla::image::imageops::{FilterType, resize};
use openvla::{OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, table_image};
use openvla_kernels::Gguf;

const INSTRUCTION: &str = "put eggplant into pot";

/// A model and what it is given.
struct Bench {
    policy: OpenVla,
    image: RgbImage,
    key: String,
    /// Weights that a decode step reads, in bytes.
    step_bytes: u64,
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let mut bench = match std::env::var("OPENVLA_MODEL") {
        Ok(path) => Bench::open(Path::new(&path)),
        Err(_) => example(),
    };
    bench.stages(&mut criterion);
    bench.step(&mut criterion);
    criterion.final_summary();
}

/// The example checkpoint, in the type of `--q4`.
fn example() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let (folder, path) = (dir.path().join("openvla-example"), dir.path().join("example.gguf"));
    openvla_example::write(&folder, &COMMITTED).unwrap();
    let conversion = Conversion::new(&folder, &Encoding::default().into()).unwrap();
    conversion.write(&path, &indicatif::ProgressBar::hidden()).unwrap();
    Bench::open(&path) // stays mapped after the folder is gone
}

impl Bench {
    fn open(path: &Path) -> Self {
        let policy = OpenVla::open(path, &Options::default()).unwrap();
        let key = policy.config().statistics.datasets().keys().next().unwrap().clone();
        let file = Gguf::open(path).unwrap();
        // Of the embeddings it reads one row.
        let read = |name: &str| name.starts_with("blk.") || name.starts_with("output");
        let weights = file.tensors().iter().filter(|info| read(&info.name));
        let step_bytes = weights.map(|info| info.range.len() as u64).sum();
        eprintln!("{}, {} bytes a decode step", policy.config().general.name, step_bytes);
        let image = resize(&table_image(), 640, 480, FilterType::Triangle);
        Self { policy, image, key, step_bytes }
    }

    /// Each stage by itself, on what the one before left.
    fn stages(&mut self, criterion: &mut Criterion) {
        let preprocess = self.policy.config().preprocess.clone();
        let ids = self.policy.prompt_ids(INSTRUCTION).unwrap();
        let token = self.policy.config().actions.ids().start;
        let n_step = self.policy.config().statistics.datasets()[&self.key].q01.len() - 1;
        let planes = preprocess.planes(&self.image).unwrap();
        let n_row = self.policy.config().n_patch() + ids.len();
        let network = self.policy.network();
        let mut group = criterion.benchmark_group("stage");
        group.bench_function("preprocess 640x480", |b| {
            b.iter(|| preprocess.planes(&self.image).unwrap());
        });
        group.bench_function("vision", |b| b.iter(|| network.see(&planes).unwrap()));
        group.bench_function("projector", |b| b.iter(|| network.project().unwrap()));
        group.bench_function(format!("prefill {n_row} rows"), |b| {
            b.iter(|| network.prefill(&ids).unwrap());
        });
        group.throughput(Throughput::Bytes(self.step_bytes));
        network.prefill(&ids).unwrap();
        for n in [1, n_step] {
            let tokens = vec![token; n];
            group.bench_function(format!("decode, rows at once: {n}"), |b| {
                b.iter(|| {
                    network.step_drafted(&tokens).unwrap();
                    network.forget(n);
                });
            });
        }
    }

    /// The whole. Every motion must be the first one again.
    fn step(mut self, criterion: &mut Criterion) {
        let mut act = || self.policy.act(&self.image, INSTRUCTION, Some(&self.key)).unwrap();
        let wanted = act().tokens;
        let mut group = criterion.benchmark_group("step");
        group.throughput(Throughput::Elements(1));
        group.bench_function("image to motion", |b| b.iter(|| assert_eq!(act().tokens, wanted)));
    }
}
