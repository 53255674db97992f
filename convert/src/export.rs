//! Exports the Llama of a model file as a GGUF file that llama.cpp loads.
//!
//! in   an `openvla` file, whose Llama has llama.cpp's names, types and row order already
//! out  a `llama` file: the same tensors byte for byte, with the metadata keys that llama.cpp reads
//!
//! llama.cpp refuses a file with missing or additional tensors, so exactly its own are written.
//!
//! ref: llama.cpp `src/llama-arch.cpp` and `src/models/llama.cpp`, as llama-cpp-sys-2 0.1.161 has them

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use openvla::{Config, LlamaConfig};
use openvla_kernels::{Gguf, Header, Mapped, TensorInfo, shape};

use crate::atomic_file::AtomicFile;
use crate::interrupt;

/// A checked Llama, and the header of its file.
pub struct Export {
    model: PathBuf,
    header: Header,
    tensors: Vec<TensorInfo>,
}

impl Export {
    /// Reads the header of a model file.
    ///
    /// # Errors
    /// If it is not an OpenVLA, or names a tensor of its Llama that is missing or of another shape.
    pub fn new(model: &Path) -> Result<Self> {
        let cannot = || format!("{} cannot be exported", model.display());
        let file = Gguf::open(model)?;
        let config = Config::read(&file).with_context(cannot)?;
        let tensors = tensors(&file, &config.llama).with_context(cannot)?;
        let mut header = metadata(&file, &config.llama)?;
        for tensor in &tensors {
            header.tensor(&tensor.name, tensor.dtype, tensor.shape);
        }
        Ok(Self { model: model.to_owned(), header, tensors })
    }

    /// The number of tensors to be written.
    pub fn n_tensor(&self) -> usize {
        self.tensors.len()
    }

    /// The bytes of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.range.len() as u64).sum()
    }

    /// Writes the file, one tensor in memory at a time.
    ///
    /// # Errors
    /// Names what cannot be read or written. An existing file is then left unchanged.
    pub fn write(&self, out: &Path, progress: &ProgressBar) -> Result<()> {
        let model = self.model.display();
        let canonical = |path: &Path| path.canonicalize().ok();
        let itself = canonical(out).is_some_and(|out| canonical(&self.model) == Some(out));
        ensure!(!itself, "{model} would be replaced by its own Llama; name another file with -o");
        let read = || format!("cannot read {model}");
        let from = File::open(&self.model).with_context(read)?;
        let header = self.header.encode();
        let mut file = AtomicFile::create(out, (header.len() + self.header.data_bytes()) as u64)?;
        file.append(&header)?;
        for TensorInfo { range, .. } in &self.tensors {
            interrupt::check()?;
            let bytes = Mapped::read(&from, range.start as u64, range.len()).with_context(read)?;
            file.append(&bytes)?;
            progress.inc(bytes.len() as u64);
        }
        file.finish()
    }
}

/// Keys that are copied, because they mean the same to llama.cpp. Merges are left out: llama.cpp merges
/// by scores.
const COPIED_KEYS: [&str; 15] = [
    "general.name",
    "general.basename",
    "general.size_label",
    "general.finetune",
    "general.version",
    "general.license",
    "general.file_type",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
];

/// The scheme of [`openvla::tokenizer`], by llama.cpp's keys.
const TOKENIZER_SCHEME: [(&str, bool); 3] = [
    ("tokenizer.ggml.add_bos_token", true),
    ("tokenizer.ggml.add_eos_token", false),
    ("tokenizer.ggml.add_space_prefix", true),
];

const QUANTIZATION_VERSION: &str = "general.quantization_version";

fn metadata(file: &Gguf, l: &LlamaConfig) -> Result<Header> {
    let mut to = Header::default();
    to.set("general.architecture", "llama".to_owned());
    to.set(QUANTIZATION_VERSION, file.get::<u32>(QUANTIZATION_VERSION)?);
    for (key, size) in [
        ("llama.vocab_size", l.n_vocab),
        ("llama.context_length", l.n_ctx),
        ("llama.embedding_length", l.dim),
        ("llama.block_count", l.n_layer),
        ("llama.feed_forward_length", l.n_ff),
        ("llama.attention.head_count", l.n_head),
        ("llama.attention.head_count_kv", l.n_head_kv),
        ("llama.rope.dimension_count", l.head_dim()),
    ] {
        to.set(key, size as u32);
    }
    to.set("llama.rope.freq_base", l.rope_base);
    to.set("llama.attention.layer_norm_rms_epsilon", l.eps);
    for (key, value) in COPIED_KEYS.iter().filter_map(|key| file.metadata().get_key_value(*key)) {
        to.set(key, value.clone());
    }
    TOKENIZER_SCHEME.iter().for_each(|(key, value)| to.set(key, *value));
    Ok(to)
}

/// The tensors of llama.cpp's Llama, in its order.
fn tensors(file: &Gguf, l: &LlamaConfig) -> Result<Vec<TensorInfo>> {
    let (dim, kv, ff) = (l.dim, l.n_head_kv * l.head_dim(), l.n_ff);
    let layer: [(&str, &[usize]); 9] = [
        ("attn_norm", &[dim]),
        ("attn_q", &[dim, dim]),
        ("attn_k", &[dim, kv]),
        ("attn_v", &[dim, kv]),
        ("attn_output", &[dim, dim]),
        ("ffn_norm", &[dim]),
        ("ffn_gate", &[dim, ff]),
        ("ffn_down", &[ff, dim]),
        ("ffn_up", &[dim, ff]),
    ];
    let layers = (0..l.n_layer)
        .flat_map(|i| layer.map(|(part, shape)| (format!("blk.{i}.{part}.weight"), shape)));
    let table: [usize; 2] = [dim, l.n_vocab];
    let head = [("token_embd", &table[..]), ("output_norm", &table[..1]), ("output", &table)]
        .map(|(part, shape)| (format!("{part}.weight"), shape));
    let find = |(name, wanted): (String, &[usize])| {
        let found = file.tensor(&name).with_context(|| format!("tensor `{name}` is missing"))?;
        let wanted = shape(wanted);
        ensure!(
            found.shape == wanted,
            "tensor `{name}` has shape {:?}; {wanted:?} is needed",
            found.shape
        );
        Ok(found.clone())
    };
    head.into_iter().chain(layers).map(find).collect()
}
