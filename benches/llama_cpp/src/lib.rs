//! llama.cpp on the Llama of a model file: what the test and the bench share.

use std::path::Path;
use std::sync::LazyLock;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use openvla::Config;
use openvla_convert::export::Export;
use openvla_kernels::Gguf;

/// Initialized before any of our own backends, because both set ggml's log callback.
static LLAMA_CPP: LazyLock<LlamaBackend> = LazyLock::new(|| {
    let mut backend = LlamaBackend::init().unwrap();
    backend.void_logs();
    backend
});

/// Writes the Llama of a model file to `out`, and opens it.
pub fn export(file: &Path, out: &Path) -> LlamaModel {
    Export::new(file).unwrap().write(out, &indicatif::ProgressBar::hidden()).unwrap();
    LlamaModel::load_from_file(&LLAMA_CPP, out, &LlamaModelParams::default()).unwrap()
}

/// An empty context with our caches, for a file of that type.
pub fn context<'a>(model: &'a LlamaModel, encoding: &str, n_threads: i32) -> LlamaContext<'a> {
    // llama.cpp's flash attention would round F32 to F16, so there it goes without.
    let (cache, flash) = match encoding {
        "F32" => (KvCacheType::F32, 0),
        _ => (KvCacheType::F16, 1),
    };
    let params = LlamaContextParams::default()
        .with_type_k(cache)
        .with_type_v(cache)
        .with_flash_attention_policy(flash)
        .with_n_threads(n_threads)
        .with_n_threads_batch(n_threads);
    model.new_context(&LLAMA_CPP, params).unwrap()
}

/// The logits after `ids`, whose positions go on from the last call's.
pub fn decode(context: &mut LlamaContext<'_>, ids: &[u32]) -> Vec<f32> {
    let ids: Vec<_> = ids.iter().map(|id| LlamaToken(*id as i32)).collect();
    context.decode(&mut LlamaBatch::get_one(&ids).unwrap()).unwrap();
    context.get_logits().to_vec() // of the last row
}

/// Tokens from all over the vocabulary, in place of the image.
pub fn image(config: &Config) -> Vec<u32> {
    let n_vocab = config.llama.n_vocab as u32;
    (0..config.n_patch() as u32).map(|i| (7919 * i + 300) % n_vocab).collect()
}

/// The rows of the token embedding, `[dim, n]`.
pub fn embeddings(file: &Gguf, ids: &[u32]) -> Vec<f32> {
    let table = file.tensor("token_embd.weight").unwrap();
    let bytes = &file.bytes()[table.range.clone()];
    let row = table.dtype.row_bytes(table.shape[0]).unwrap();
    ids.iter().flat_map(|id| table.dtype.decode(&bytes[*id as usize * row..][..row])).collect()
}
