//! Our Llama against llama.cpp's own: an exported file, the same rows, the same logits.
//!
//! llama.cpp is built on the same ggml, so what is compared is everything above it: the graph, the
//! order of q's and k's rows, rope, masks, the cache, and every number that the exported file states.

#[path = "../../../tests/common/mod.rs"]
mod common;

use std::iter;
use std::ops::Range;
use std::path::Path;

use llama_cpp_2::model::LlamaModel;
use openvla::{Kernels, OpenVla, Options};
use openvla_example::{COMMITTED, Size, Spec};
use openvla_kernels::Gguf;
use openvla_llama_cpp as llama;

/// How far llama.cpp's logits may be from ours, by the file's type: the root mean square of the
/// difference over that of llama.cpp's, worst step.
///
/// Measured on x86-64: 1.2e-5 at F32, where llama.cpp's attention is another than ours, 1.8e-7 at
/// Q6_K, and not a bit at every other type: both engines interleave the same matrices.
const TOLERANCE: [(&str, f64); 11] = [
    ("F32", 5e-5),
    ("F16", 1e-6),
    ("BF16", 1e-6),
    ("Q8_0", 1e-6),
    ("Q6_K", 1e-6),
    ("Q5_K_M", 1e-6),
    ("Q4_K_M", 1e-6),
    ("Q4_K_S", 1e-6),
    ("Q4_0", 1e-6),
    ("IQ4_NL", 1e-6),
    ("IQ4_XS", 1e-6),
];

const INSTRUCTION: &str = "put eggplant into pot";

/// llama.cpp's logits after all of `ids`, then after each of `tokens`.
fn theirs(model: &LlamaModel, encoding: &str, ids: &[u32], tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut context = llama::context(model, encoding, 1);
    let first = llama::decode(&mut context, ids);
    let others = tokens.iter().map(|token| llama::decode(&mut context, &[*token]));
    iter::once(first).chain(others).collect()
}

/// Our own, with `soft` between the first of `prompt` and the others.
fn ours(policy: &mut OpenVla, soft: &[f32], prompt: &[u32], tokens: &[u32]) -> Vec<Vec<f32>> {
    let network = policy.network();
    let soft = network.set_soft_tokens(soft);
    let mut sequence = network.prefill(prompt, &soft).unwrap();
    let mut all = vec![sequence.logits().to_vec()];
    all.extend(tokens.iter().map(|token| sequence.step(*token).unwrap().to_vec()));
    all
}

/// Without the action ids, whose rows of the head our files have in a better type once more.
fn relative_error(got: &[f32], want: &[f32], actions: &Range<u32>) -> f64 {
    assert_eq!(got.len(), want.len(), "logits");
    let others = |x: &[f32]| [&x[..actions.start as usize], &x[actions.end as usize..]].concat();
    let (got, want) = (others(got), others(want));
    let square = |x: f32| f64::from(x).powi(2);
    let wrong: f64 = got.iter().zip(&want).map(|(got, want)| square(got - want)).sum();
    (wrong / want.iter().map(|want| square(*want)).sum::<f64>()).sqrt()
}

/// A converted checkpoint, opened by us, and its Llama, opened by llama.cpp.
fn both(checkpoint: &Path, encoding: &str) -> (Gguf, OpenVla, LlamaModel) {
    let dir = tempfile::tempdir().unwrap(); // both stay mapped after it is gone
    let (file, llama) = (dir.path().join("openvla.gguf"), dir.path().join("llama.gguf"));
    common::convert(checkpoint, encoding, &file);
    let model = llama::export(&file, &llama);
    let mut options = Options::default();
    // Our own products sum in another order. Rounding activations to 8 bits, layer after layer, makes
    // that as large as rounding itself, so they are held to ggml's one by one (kernels/tests/panels.rs).
    (options.n_threads, options.kernels) = (1, Kernels::Ggml);
    (Gguf::open(&file).unwrap(), OpenVla::open(&file, &options).unwrap(), model)
}

/// Holds every type of a checkpoint to the table.
fn agree(checkpoint: &Path) {
    for (encoding, limit) in TOLERANCE {
        let (file, mut policy, model) = both(checkpoint, encoding);
        let config = policy.config().clone();
        let prompt = policy.prompt_ids(INSTRUCTION).unwrap();
        let image = llama::image(&config);
        let tokens: Vec<u32> = config.actions.ids().step_by(41).take(6).collect();

        let got = ours(&mut policy, &llama::embeddings(&file, &image), &prompt, &tokens);
        let ids = [&prompt[..1], &image, &prompt[1..]].concat();
        let want = theirs(&model, encoding, &ids, &tokens);
        let actions = config.actions.ids();
        let errors = got.iter().zip(&want).map(|(got, want)| relative_error(got, want, &actions));
        let error = errors.fold(0.0, f64::max);
        eprintln!("{} {encoding:6} {error:.1e}", checkpoint.display());
        assert!(error <= limit, "{encoding}: error {error:.2e} > {limit:.0e}");
    }
}

fn example() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../example/openvla-example"))
}

#[test]
fn llama_cpp_computes_the_same_logits_for_the_example() {
    agree(example());
}

/// Rows of 256, as blocks of K-quants are.
#[test]
fn llama_cpp_computes_the_same_logits_at_the_wide_size() {
    let dir = tempfile::tempdir().unwrap();
    openvla_example::write(dir.path(), &Spec { size: Size::Wide, ..COMMITTED }).unwrap();
    agree(dir.path());
}

/// Through the scores, where ours goes by the merges.
#[test]
fn llama_cpp_cuts_prompts_into_the_same_ids() {
    cut_alike(example());
}

fn cut_alike(checkpoint: &Path) {
    let (_, policy, model) = both(checkpoint, "Q8_0");
    let prompt = &policy.config().prompt;
    for instruction in [INSTRUCTION, "pick up the  2nd naïve cup, é忠!"] {
        let text = prompt.text(instruction);
        let ids = model.vocab().tokenize(text.as_bytes(), true, false);
        let ids = ids.iter().map(|id| id.0 as u32).chain([prompt.suffix]);
        assert_eq!(ids.collect::<Vec<_>>(), policy.prompt_ids(instruction).unwrap(), "{text}");
    }
}

mod shared {
    use super::*;

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn llama_cpp_computes_the_same_logits() {
        agree(&common::shared().join("public/ckpt"));
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn llama_cpp_cuts_prompts_into_the_same_ids() {
        cut_alike(&common::shared().join("public/ckpt"));
    }
}
