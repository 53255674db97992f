//! What a model file says about itself: every GGUF key, read and written side by side.
//!
//! `read` is the only way to a [`Config`] of a file, and checks what graphs and arithmetic rely on,
//! so nothing after it has to. `MODEL.md` documents the keys.

mod cards;
mod check;
mod general;
mod oft;
mod proof;
mod source_files;

use std::collections::BTreeMap;

use openvla_kernels::{Gguf, Header, Value};

use crate::action::ActionSpace;
use crate::preprocess::{Normalize, Preprocess, Resize};
use crate::profile::Profile;
use crate::prompt::Prompt;
use crate::statistics::Statistics;
use crate::tokenizer::{TokenType, Vocabulary};
use crate::{Error, Result};

pub use cards::{ActionCard, Dimension, Gripper};
pub use general::{BaseModel, General, Source};
pub use oft::{OftConfig, OftHead};
pub use proof::{Expected, Proof, ProofCase, checksum};
pub use source_files::SourceFile;

/// Everything about a model except its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `general.*`: what people and tools read.
    pub general: General,
    /// Image to planes.
    pub preprocess: Preprocess,
    /// Pixels along a patch: 14.
    pub patch_size: usize,
    /// The vision towers, in the order of their channels; their number is that of `preprocess.towers`.
    pub towers: Vec<TowerConfig>,
    /// Widths of the projector from the joined towers to the Llama: 2176, 8704, 4096, 4096.
    pub projector: Vec<usize>,
    /// The language model.
    pub llama: LlamaConfig,
    /// Instruction to prompt.
    pub prompt: Prompt,
    /// Prompt to ids.
    pub vocabulary: Vocabulary,
    /// Ids to bins.
    pub actions: ActionSpace,
    /// Bins to motions.
    pub statistics: Statistics,
    /// What motions are, by data set. Empty if the file does not say.
    pub cards: BTreeMap<String, ActionCard>,
    /// What makes it an OpenVLA-OFT, if it is one.
    pub oft: Option<OftConfig>,
}

/// One vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct TowerConfig {
    /// "dinov2" or "siglip": prefix of its keys and tensors.
    pub name: String,
    /// Channels: 1024 and 1152.
    pub dim: usize,
    /// Blocks that run: 23 of DINOv2's 24, 26 of SigLIP's 27.
    pub n_layer: usize,
    /// Attention heads: 16.
    pub n_head: usize,
    /// Width of the MLP, zero-padded to whole blocks of 32: 4096, and 4320 for SigLIP's 4304.
    pub n_ff: usize,
    /// Of LayerNorm: 1e-6.
    pub eps: f32,
    /// Class and register tokens before the patches: 5 and 0.
    pub n_prefix: usize,
    /// Whether each branch has a learnt scale.
    pub layer_scale: bool,
}

/// The Llama-2 decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Channels: 4096.
    pub dim: usize,
    /// Layers: 32.
    pub n_layer: usize,
    /// Heads of queries: 32.
    pub n_head: usize,
    /// Heads of keys and values: 32.
    pub n_head_kv: usize,
    /// Width of the MLP: 11008.
    pub n_ff: usize,
    /// Rows of embedding and head: 32064.
    pub n_vocab: usize,
    /// Rows it was made for: 2048.
    pub n_ctx: usize,
    /// Of RMSNorm: 1e-6, unlike Llama-2's own 1e-5.
    pub eps: f32,
    /// Of the rotary positions: 10000.
    pub rope_base: f32,
}

impl LlamaConfig {
    /// Channels per head: 128.
    pub fn head_dim(&self) -> usize {
        self.dim / self.n_head
    }

    /// Checks that this many rows of image, prompt and motion fit.
    ///
    /// # Errors
    /// [`Error::InstructionTooLong`].
    pub fn check_rows(&self, rows: usize) -> Result<()> {
        let limit = self.n_ctx;
        if rows > limit { Err(Error::InstructionTooLong { rows, limit }) } else { Ok(()) }
    }
}

impl Config {
    /// The first version of the format that says all of it.
    fn format(&self) -> u32 {
        let Preprocess { profile, center_crop, .. } = self.preprocess;
        let is_new = self.oft.is_some() || profile != Profile::Raw || center_crop;
        FORMATS[usize::from(is_new)]
    }

    /// Patches of an image: 256.
    pub fn n_patch(&self) -> usize {
        (self.preprocess.size as usize / self.patch_size).pow(2)
    }

    /// Reads and checks a file's metadata.
    ///
    /// # Errors
    /// [`Error::Model`] if it is of another model or format version, or its sizes do not fit
    /// together; [`Error::Kernels`] names a key that is missing or of another kind.
    pub fn read(file: &Gguf) -> Result<Self> {
        let oft = OftConfig::read(file)?;
        check_format(file)?;
        let bounds = oft.as_ref().map(|oft| oft.bounds).unwrap_or_default();
        let has_state = oft.as_ref().is_some_and(|oft| oft.n_state > 0);
        let towers: Vec<String> = file.get(key::TOWERS)?;
        let normalize =
            towers.iter().map(|name| read_normalize(file, name)).collect::<Result<_>>()?;
        let config = Self {
            general: General::read(file)?,
            preprocess: Preprocess {
                profile: read_profile(file)?,
                center_crop: general::optional(file, key::CENTER_CROP)?.unwrap_or(false),
                size: file.get(key::IMAGE_SIZE)?,
                resize: read_resize(file)?,
                towers: normalize,
            },
            patch_size: size(file, key::PATCH_SIZE)?,
            towers: towers
                .iter()
                .map(|name| TowerConfig::read(file, name))
                .collect::<Result<_>>()?,
            projector: read_projector(file)?,
            llama: LlamaConfig::read(file)?,
            prompt: Prompt::new(file.get(key::TEMPLATE)?, file.get(key::SUFFIX)?)?,
            vocabulary: read_vocabulary(file)?,
            actions: ActionSpace {
                end: file.get(key::ACTION_END)?,
                n_bin: file.get(key::ACTION_BINS)?,
            },
            statistics: Statistics::parse_with(file.get(key::STATISTICS)?, bounds, has_state)?,
            cards: cards::read(file)?,
            oft,
        };
        config.check()?;
        Ok(config)
    }

    /// Adds all keys to the header of a file to be written.
    pub fn write(&self, to: &mut Header) {
        to.set(key::ARCHITECTURE, ARCHITECTURE.to_owned());
        self.general.write(to);
        to.set(key::FORMAT, self.format());
        to.set(key::IMAGE_SIZE, self.preprocess.size);
        write_resize(self.preprocess.resize, to);
        if self.preprocess.profile != Profile::Raw {
            to.set(key::PROFILE, self.preprocess.profile.name().to_owned());
        }
        if self.preprocess.center_crop {
            to.set(key::CENTER_CROP, true);
        }
        to.set(key::PATCH_SIZE, self.patch_size as u32);
        to.set(key::TOWERS, self.towers.iter().map(|t| t.name.clone()).collect::<Vec<_>>());
        for (tower, normalize) in self.towers.iter().zip(&self.preprocess.towers) {
            tower.write(to);
            to.set(&tower.key("image_mean"), normalize.mean.to_vec());
            to.set(&tower.key("image_std"), normalize.std.to_vec());
        }
        to.set(key::PROJECTOR, self.projector.iter().map(|n| *n as i32).collect::<Vec<_>>());
        self.llama.write(to);
        to.set(key::TEMPLATE, self.prompt.template.clone());
        to.set(key::SUFFIX, self.prompt.suffix);
        write_vocabulary(&self.vocabulary, to);
        to.set(key::ACTION_END, self.actions.end);
        to.set(key::ACTION_BINS, self.actions.n_bin);
        to.set(key::STATISTICS, self.statistics.json().to_owned());
        cards::write(&self.cards, to);
        if let Some(oft) = &self.oft {
            oft.write(to);
        }
    }
}

/// The keys that belong neither to a tower nor to `general.*`.
mod key {
    pub const ARCHITECTURE: &str = "general.architecture";
    pub const FORMAT: &str = "openvla.format_version";
    pub const IMAGE_SIZE: &str = "openvla.image.size";
    pub const RESIZE: &str = "openvla.image.resize";
    pub const LETTERBOX_FILL: &str = "openvla.image.letterbox_fill";
    pub const PROFILE: &str = "openvla.image.profile";
    pub const CENTER_CROP: &str = "openvla.image.center_crop";
    pub const TOWERS: &str = "openvla.vision.towers";
    pub const PATCH_SIZE: &str = "openvla.vision.patch_size";
    pub const PROJECTOR: &str = "openvla.projector.widths";
    pub const DIM: &str = "openvla.embedding_length";
    pub const N_LAYER: &str = "openvla.block_count";
    pub const N_HEAD: &str = "openvla.attention.head_count";
    pub const N_HEAD_KV: &str = "openvla.attention.head_count_kv";
    pub const N_FF: &str = "openvla.feed_forward_length";
    pub const N_VOCAB: &str = "openvla.vocab_size";
    pub const N_CTX: &str = "openvla.context_length";
    pub const EPS: &str = "openvla.attention.layer_norm_rms_epsilon";
    pub const ROPE_BASE: &str = "openvla.rope.freq_base";
    pub const TEMPLATE: &str = "openvla.prompt.template";
    pub const SUFFIX: &str = "openvla.prompt.suffix_token_id";
    pub const ACTION_END: &str = "openvla.action.token_end";
    pub const ACTION_BINS: &str = "openvla.action.token_count";
    pub const STATISTICS: &str = "openvla.statistics";
    pub const ACTION_CARDS: &str = "openvla.action_cards";
    pub const TOKENIZER: &str = "tokenizer.ggml.model";
    pub const TOKENS: &str = "tokenizer.ggml.tokens";
    pub const SCORES: &str = "tokenizer.ggml.scores";
    pub const TYPES: &str = "tokenizer.ggml.token_type";
    pub const MERGES: &str = "tokenizer.ggml.merges";
    pub const BOS: &str = "tokenizer.ggml.bos_token_id";
    pub const EOS: &str = "tokenizer.ggml.eos_token_id";
    pub const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
    pub const PADDING: &str = "tokenizer.ggml.padding_token_id";
}

/// `general.architecture` of our files.
pub const ARCHITECTURE: &str = "openvla";
/// Versions of the format that are read. 2 has OpenVLA-OFT and pictures that are prepared, which a reader of version 1
/// alone would misread.
const FORMATS: [u32; 2] = [1, 2];

/// llama.cpp's name for SentencePiece BPE.
const TOKENIZER: &str = "llama";

fn check_format(file: &Gguf) -> Result<()> {
    let found: String = file.get(key::ARCHITECTURE)?;
    if found != ARCHITECTURE {
        let why = format!("it is a `{found}` model, not `{ARCHITECTURE}`");
        return Err(Error::Model { why });
    }
    let found: u32 = file.get(key::FORMAT)?;
    if !FORMATS.contains(&found) {
        let [first, last] = FORMATS;
        let why = format!("`{}` is {found}; this version reads {first} and {last}", key::FORMAT);
        return Err(Error::Model { why });
    }
    Ok(())
}

fn read_profile(file: &Gguf) -> Result<Profile> {
    let name: Option<String> = general::optional(file, key::PROFILE)?;
    let parse = |name: String| {
        let why =
            |wanted| Error::Model { why: format!("`{}` is `{name}`; {wanted}", key::PROFILE) };
        name.parse().map_err(why)
    };
    name.map_or(Ok(Profile::Raw), parse)
}

/// A count or width, which [`Config::check`] holds against its bounds.
fn size(file: &Gguf, key: &str) -> Result<usize> {
    Ok(file.get::<u32>(key)? as usize)
}

impl TowerConfig {
    /// One of its own keys.
    fn key(&self, part: &str) -> String {
        format!("openvla.{}.{part}", self.name)
    }

    fn read(file: &Gguf, name: &str) -> Result<Self> {
        let key = |part: &str| format!("openvla.{name}.{part}");
        Ok(Self {
            name: name.to_owned(),
            dim: size(file, &key("embedding_length"))?,
            n_layer: size(file, &key("block_count"))?,
            n_head: size(file, &key("attention.head_count"))?,
            n_ff: size(file, &key("feed_forward_length"))?,
            eps: file.get(&key("attention.layer_norm_epsilon"))?,
            n_prefix: size(file, &key("prefix_length"))?,
            layer_scale: file.get(&key("layer_scale"))?,
        })
    }

    fn write(&self, to: &mut Header) {
        to.set(&self.key("embedding_length"), self.dim as u32);
        to.set(&self.key("block_count"), self.n_layer as u32);
        to.set(&self.key("attention.head_count"), self.n_head as u32);
        to.set(&self.key("feed_forward_length"), self.n_ff as u32);
        to.set(&self.key("attention.layer_norm_epsilon"), self.eps);
        to.set(&self.key("prefix_length"), self.n_prefix as u32);
        to.set(&self.key("layer_scale"), self.layer_scale);
    }
}

impl LlamaConfig {
    fn read(file: &Gguf) -> Result<Self> {
        Ok(Self {
            dim: size(file, key::DIM)?,
            n_layer: size(file, key::N_LAYER)?,
            n_head: size(file, key::N_HEAD)?,
            n_head_kv: size(file, key::N_HEAD_KV)?,
            n_ff: size(file, key::N_FF)?,
            n_vocab: size(file, key::N_VOCAB)?,
            n_ctx: size(file, key::N_CTX)?,
            eps: file.get(key::EPS)?,
            rope_base: file.get(key::ROPE_BASE)?,
        })
    }

    fn write(&self, to: &mut Header) {
        to.set(key::DIM, self.dim as u32);
        to.set(key::N_LAYER, self.n_layer as u32);
        to.set(key::N_HEAD, self.n_head as u32);
        to.set(key::N_HEAD_KV, self.n_head_kv as u32);
        to.set(key::N_FF, self.n_ff as u32);
        to.set(key::N_VOCAB, self.n_vocab as u32);
        to.set(key::N_CTX, self.n_ctx as u32);
        to.set(key::EPS, self.eps);
        to.set(key::ROPE_BASE, self.rope_base);
    }
}

fn read_resize(file: &Gguf) -> Result<Resize> {
    match file.get::<String>(key::RESIZE)?.as_str() {
        "resize-naive" => Ok(Resize::Naive),
        "resize-crop" => Ok(Resize::Crop),
        "letterbox" => {
            let fill: Vec<i32> = file.get(key::LETTERBOX_FILL)?;
            let bytes: Vec<u8> = fill.iter().filter_map(|v| u8::try_from(*v).ok()).collect();
            let fill = <[u8; 3]>::try_from(bytes).map_err(|_| Error::Model {
                why: format!("`{}` is {fill:?}; three bytes are needed", key::LETTERBOX_FILL),
            })?;
            Ok(Resize::Letterbox { fill })
        }
        other => Err(Error::Model { why: format!("its images are resized by `{other}`, unknown") }),
    }
}

fn write_resize(resize: Resize, to: &mut Header) {
    if let Resize::Letterbox { fill } = resize {
        to.set(key::LETTERBOX_FILL, fill.map(i32::from).to_vec());
    }
    to.set(key::RESIZE, resize.name().to_owned());
}

impl Resize {
    /// What a file calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Naive => "resize-naive",
            Self::Crop => "resize-crop",
            Self::Letterbox { .. } => "letterbox",
        }
    }
}

fn read_normalize(file: &Gguf, tower: &str) -> Result<Normalize> {
    let read = |part: &str| {
        let key = format!("openvla.{tower}.{part}");
        let values: Vec<f32> = file.get(&key)?;
        let three = <[f32; 3]>::try_from(values.as_slice());
        three.map_err(|_| Error::Model { why: format!("`{key}` is {} numbers", values.len()) })
    };
    Ok(Normalize { mean: read("image_mean")?, std: read("image_std")? })
}

fn read_projector(file: &Gguf) -> Result<Vec<usize>> {
    let widths: Vec<i32> = file.get(key::PROJECTOR)?;
    Ok(widths.iter().map(|n| usize::try_from(*n).unwrap_or(0)).collect())
}

fn read_vocabulary(file: &Gguf) -> Result<Vocabulary> {
    let model: String = file.get(key::TOKENIZER)?;
    if model != TOKENIZER {
        let why = format!("its tokenizer is `{model}`; `{TOKENIZER}` is needed");
        return Err(Error::Model { why });
    }
    let types: Vec<i32> = file.get(key::TYPES)?;
    Ok(Vocabulary {
        tokens: file.get(key::TOKENS)?,
        scores: file.get(key::SCORES)?,
        types: types.into_iter().map(TokenType::try_from).collect::<Result<_>>()?,
        merges: file.get(key::MERGES)?,
        bos: file.get(key::BOS)?,
        eos: file.get(key::EOS)?,
        unknown: file.get(key::UNKNOWN)?,
        padding: file.get(key::PADDING)?,
    })
}

fn write_vocabulary(vocabulary: &Vocabulary, to: &mut Header) {
    to.set(key::TOKENIZER, TOKENIZER.to_owned());
    to.set(key::TOKENS, vocabulary.tokens.clone());
    to.set(key::SCORES, vocabulary.scores.clone());
    let types: Vec<i32> = vocabulary.types.iter().map(|kind| *kind as i32).collect();
    to.set(key::TYPES, Value::from(types));
    to.set(key::MERGES, vocabulary.merges.clone());
    to.set(key::BOS, vocabulary.bos);
    to.set(key::EOS, vocabulary.eos);
    to.set(key::UNKNOWN, vocabulary.unknown);
    to.set(key::PADDING, vocabulary.padding);
}
