//! Writes a checkpoint's tokenizer files from a list of pieces.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Result;
use prost::Message;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::json::{write_file, write_json};
use crate::learn::{Piece, SPACE};

/// Writes `tokenizer.model`, and the three small files that name the special tokens, into `dir`.
///
/// # Errors
/// Names the file that cannot be written.
pub fn write_tokenizer(dir: &Path, pieces: &[Piece]) -> Result<()> {
    write_file(dir, "tokenizer.model", &model(pieces).encode_to_vec())?;
    write_json(dir, "tokenizer_config.json", &tokenizer_config(pieces.len()))?;
    write_json(dir, "special_tokens_map.json", &special_tokens_map())?;
    write_json(dir, "added_tokens.json", &json!({ "<PAD>": pieces.len() }))
}

/// Writes `tokenizer.json`, which not every checkpoint has, into `dir`.
///
/// # Errors
/// Names the file if it cannot be written.
pub fn write_fast_tokenizer(dir: &Path, pieces: &[Piece]) -> Result<()> {
    write_json(dir, "tokenizer.json", &fast_tokenizer(pieces))
}

/// `tokenizer.model`. The messages have only those fields of `sentencepiece_model.proto` that differ
/// from the defaults.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(int32, optional, tag = "4")]
    vocab_size: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

/// `TrainerSpec.ModelType.BPE`.
const BPE: i32 = 2;

fn model(pieces: &[Piece]) -> ModelProto {
    ModelProto {
        pieces: pieces
            .iter()
            .map(|piece| PieceProto {
                piece: Some(piece.text.clone()),
                score: Some(piece.score),
                kind: Some(piece.kind as i32),
            })
            .collect(),
        trainer_spec: Some(TrainerSpec {
            model_type: Some(BPE),
            vocab_size: Some(pieces.len() as i32),
            byte_fallback: Some(true),
        }),
        normalizer_spec: Some(NormalizerSpec {
            name: Some("identity".into()),
            add_dummy_prefix: Some(true),
            remove_extra_whitespaces: Some(false),
        }),
    }
}

/// `tokenizer.json`, as transformers converts `tokenizer.model`.
#[derive(Serialize)]
struct FastTokenizer<'a> {
    version: &'a str,
    truncation: (),
    padding: (),
    added_tokens: [AddedToken; 4],
    normalizer: Value,
    pre_tokenizer: (),
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'a str,
    dropout: (),
    unk_token: &'a str,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "by_id")]
    vocab: &'a [Piece],
    merges: Vec<String>,
}

fn by_id<S: Serializer>(pieces: &&[Piece], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pieces.iter().enumerate().map(|(id, piece)| (&piece.text, id)))
}

fn fast_tokenizer(pieces: &[Piece]) -> FastTokenizer<'_> {
    FastTokenizer {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: special_tokens(pieces.len())
            .map(|(id, name)| AddedToken::new(name, Some(id), Some(true))),
        normalizer: json!({
            "normalizers": [
                { "prepend": SPACE, "type": "Prepend" },
                { "content": SPACE, "pattern": { "String": " " }, "type": "Replace" },
            ],
            "type": "Sequence",
        }),
        pre_tokenizer: (),
        post_processor: post_processor(),
        decoder: json!({
            "decoders": [
                { "content": " ", "pattern": { "String": SPACE }, "type": "Replace" },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "content": " ", "start": 1, "stop": 0, "type": "Strip" },
            ],
            "type": "Sequence",
        }),
        model: Bpe {
            r#type: "BPE",
            dropout: (),
            unk_token: "<unk>",
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: true,
            byte_fallback: true,
            ignore_merges: false,
            vocab: pieces,
            merges: merges(pieces),
        },
    }
}

/// `<s>`, then the text.
fn post_processor() -> Value {
    let bos = |segment| json!({ "SpecialToken": { "id": "<s>", "type_id": segment } });
    let text = |name, segment| json!({ "Sequence": { "id": name, "type_id": segment } });
    json!({
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "single": [bos(0), text("A", 0)],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
        "type": "TemplateProcessing",
    })
}

/// Every way to merge two pieces to one, sorted by the piece, the earliest merged first, and then by the
/// ids of its parts. Scores fall as ids rise, so the order of ids is the order of scores.
///
/// ref: transformers 4.40.1, `convert_slow_tokenizer.py`, `generate_merges`
fn merges(pieces: &[Piece]) -> Vec<String> {
    let ids: HashMap<&str, usize> =
        pieces.iter().enumerate().map(|(id, piece)| (piece.text.as_str(), id)).collect();
    let mut merges = Vec::new();
    for piece in pieces {
        let mut pairs: Vec<(usize, usize)> = piece
            .text
            .char_indices()
            .filter_map(|(at, _)| {
                let (left, right) = piece.text.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?))
            })
            .collect();
        pairs.sort_unstable();
        merges.extend(pairs.iter().map(|&(l, r)| format!("{} {}", pieces[l].text, pieces[r].text)));
    }
    merges
}

/// Ids and names of the special tokens. `<PAD>` comes after the pieces.
fn special_tokens(n_piece: usize) -> [(usize, &'static str); 4] {
    [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (n_piece, "<PAD>")]
}

/// A special token. Only `tokenizer.json` has the id; `special_tokens_map.json` has no `special` either.
#[derive(Serialize)]
struct AddedToken {
    content: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<usize>,
    lstrip: bool,
    normalized: bool,
    rstrip: bool,
    single_word: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    special: Option<bool>,
}

impl AddedToken {
    fn new(content: &'static str, id: Option<usize>, special: Option<bool>) -> Self {
        let (lstrip, normalized, rstrip, single_word) = (false, false, false, false);
        Self { content, id, lstrip, normalized, rstrip, single_word, special }
    }
}

fn tokenizer_config(n_piece: usize) -> Value {
    // As text, `704` and `32000` sort after `0`, `1`, `2`: the order of the ids.
    let token = |(id, name)| (id, AddedToken::new(name, None, Some(true)));
    let decoder: BTreeMap<usize, AddedToken> = special_tokens(n_piece).map(token).into();
    json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": false,
        "eos_token": "</s>",
        "legacy": false,
        "model_max_length": 2048,
        "pad_token": "<PAD>",
        "padding_side": "right",
        "processor_class": "PrismaticProcessor",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": false,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": false,
    })
}

fn special_tokens_map() -> Value {
    let token = |content| AddedToken::new(content, None, None);
    json!({
        "bos_token": token("<s>"),
        "eos_token": token("</s>"),
        "pad_token": token("<PAD>"),
        "unk_token": token("<unk>"),
    })
}
