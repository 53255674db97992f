//! Our Llama beside llama.cpp's own `llama_decode`: the same file, rows and threads, in turns.
//!
//! ```sh
//! cargo bench -p openvla-llama-cpp                                     # the built-in example
//! OPENVLA_MODEL=openvla-7b.gguf cargo bench -p openvla-llama-cpp -- 5   # another one, five turns
//! ```
//!
//! Both are open at once, and the Llama's export is on the disk beside the model until it is
//! opened. The logits of both are compared first: on one thread no bit differs, as
//! the test holds; on more, the example's differ by 2e-2, with caches of other lengths.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use llama_cpp_2::context::LlamaContext;
use openvla::{Network, Options, SoftTokens};
use openvla_bench::results::Summary;
use openvla_bench::workload::{ModelFile, Workload};
use openvla_convert::inspect::inspect;
use openvla_kernels::Gguf;
use openvla_llama_cpp as llama;

/// What both are given.
struct Rows {
    /// The prompt's ids, between the first of which and the others the image is.
    prompt: Vec<u32>,
    /// Replaces the image: tokens for llama.cpp, their embeddings for us.
    image: Vec<u32>,
    tokens: Vec<u32>,
}

/// Milliseconds of a prefill and of all decode steps, and the last logits.
struct Turn {
    ms: [f64; 2],
    logits: Vec<f32>,
}

fn main() {
    // cargo adds `--bench`.
    let n = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(10_usize).max(1);
    let model = ModelFile::find(None).unwrap();
    let report = inspect(&model.path).unwrap();
    let encoding = report.r#type.unwrap_or_default();
    // Beside the model, where there is room for it.
    let folder = model.path.parent().filter(|f| *f != Path::new("")).unwrap_or(Path::new("."));
    let folder = tempfile::tempdir_in(folder).unwrap();
    let theirs = llama::export(&model.path, &folder.path().join("llama.gguf"));
    drop(folder); // stays mapped
    let options = Options::default();
    let mut context = llama::context(&theirs, encoding, options.n_threads as i32);

    let mut workload = Workload::open(&model.path, &options).unwrap();
    let config = workload.policy.config().clone();
    let tokens = config.actions.ids().step_by(41).take(workload.n_step()).collect();
    let rows = Rows { prompt: workload.ids.clone(), image: llama::image(&config), tokens };
    let soft = llama::embeddings(&Gguf::open(&model.path).unwrap(), &rows.image);
    let network = workload.policy.network();
    let soft = network.set_soft_tokens(&soft);

    let (a, b) = (ours(network, &soft, &rows), their_turn(&mut context, &rows));
    let error = relative_error(&a.logits, &b.logits, config.actions.rows());
    // Rounding to 8 bits turns last-bit differences into 0.11 in random weights (SPEED.md).
    assert!(error < 0.3, "the logits differ by {error:.1e}: these are not the same models");
    let mut samples = [const { [const { Vec::new() }; 2] }; 2];
    for _ in 0..n {
        let turns =
            [second(|| ours(network, &soft, &rows)), second(|| their_turn(&mut context, &rows))];
        for (samples, turn) in samples.iter_mut().zip(turns) {
            samples.iter_mut().zip(turn.ms).for_each(|(samples, ms)| samples.push(ms));
        }
    }
    let mut out = std::io::stdout().lock();
    let (n_row, n_step) = (rows.prompt.len() + rows.image.len(), rows.tokens.len());
    let (name, n_threads) = (report.general.name, options.n_threads);
    writeln!(
        out,
        "{name} {encoding}; threads: {n_threads}; turns: {n}; logits differ by {error:.1e}\n"
    )
    .unwrap();
    writeln!(out, "| | prefill, {n_row} rows: least, median | {n_step} decode steps |").unwrap();
    writeln!(out, "|---|---:|---:|").unwrap();
    for (name, samples) in ["openvla", "llama.cpp"].iter().zip(&samples) {
        let [prefill, decode] = samples.each_ref().map(|samples| {
            let Summary { min, p50, .. } = Summary::new(samples);
            format!("{min:.2}, {p50:.2} ms")
        });
        writeln!(out, "| {name} | {prefill} | {decode} |").unwrap();
    }
}

/// A run after one that does not count, which brings the weights back where memory does not hold both.
fn second(mut run: impl FnMut() -> Turn) -> Turn {
    run();
    run()
}

fn ours(network: &mut Network, soft: &SoftTokens, rows: &Rows) -> Turn {
    let start = Instant::now();
    let mut sequence = network.prefill(&rows.prompt, soft).unwrap();
    let prefill = milliseconds(start);
    let start = Instant::now();
    for token in &rows.tokens {
        sequence.step(*token).unwrap();
    }
    let ms = [prefill, milliseconds(start)];
    Turn { ms, logits: sequence.logits().to_vec() }
}

fn their_turn(context: &mut LlamaContext<'_>, rows: &Rows) -> Turn {
    let ids = [&rows.prompt[..1], &rows.image, &rows.prompt[1..]].concat();
    context.clear_kv_cache();
    let start = Instant::now();
    let mut logits = llama::decode(context, &ids);
    let prefill = milliseconds(start);
    let start = Instant::now();
    for token in &rows.tokens {
        logits = llama::decode(context, &[*token]);
    }
    Turn { ms: [prefill, milliseconds(start)], logits }
}

/// Of all logits but the actions', whose rows of the head our files have in a better type.
fn relative_error(got: &[f32], want: &[f32], actions: std::ops::Range<usize>) -> f64 {
    let others = || (0..want.len()).filter(|i| !actions.contains(i));
    let square = |x: f32| f64::from(x).powi(2);
    let wrong: f64 = others().map(|i| square(got[i] - want[i])).sum();
    (wrong / others().map(|i| square(want[i])).sum::<f64>()).sqrt()
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
