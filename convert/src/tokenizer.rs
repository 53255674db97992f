//! Reads a checkpoint's tokenizer.
//!
//! in   `tokenizer.json`, or `tokenizer.model` alone; and the names of the special pieces
//! out  a [`Vocabulary`] with one piece for each row of the embedding
//!
//! The runtime supports Llama-2's scheme only. Anything else is refused here, because the model would
//! read other tokens than it was trained on and move without any sign of an error.
//!
//! ref: transformers 4.40.1, `convert_slow_tokenizer.py` `LlamaConverter`

use std::collections::{BTreeMap, HashMap};
use std::iter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use openvla::tokenizer::{TokenType, Tokenizer, Vocabulary};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::files::{checkpoint_error, exists, read_json_optional};

mod sentencepiece;

use sentencepiece::{SENTENCEPIECE, SentencePieceModel};

const TOKENIZER: &str = "tokenizer.json";
const ADDED: &str = "added_tokens.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
/// The files that are read if they exist; one of the first two is required.
pub const FILES: [&str; 5] = [TOKENIZER, SENTENCEPIECE, ADDED, CONFIG, SPECIAL];

/// Scores where `tokenizer.model` has none; llama.cpp's converter writes the same.
///
/// ref: llama.cpp `convert_hf_to_gguf.py` `_create_vocab_sentencepiece`
const ADDED_SCORE: f32 = -1000.0;
const UNUSED_SCORE: f32 = -10_000.0;

/// Reads the tokenizer of the checkpoint in `dir`, whose embedding has `rows` rows.
///
/// Pieces and merges come from `tokenizer.json`, else from `tokenizer.model` and
/// `added_tokens.json`. Scores come from `tokenizer.model`, else from the merges' order. Rows
/// without a piece become [`Unused`](TokenType::Unused) ones named `[PAD32001]`.
///
/// # Errors
///
/// If a file is missing or damaged, the two files disagree, a piece has no row, a special piece
/// does not exist, or the tokenizer is not of Llama-2's scheme.
pub fn read(dir: &Path, rows: usize) -> Result<Vocabulary> {
    read_files(dir, rows).with_context(|| format!("cannot use the tokenizer in {}", dir.display()))
}

/// The files of [`FILES`] that [`read`] reads in a folder.
///
/// # Errors
/// As [`exists`].
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let has_json = exists(&dir.join(TOKENIZER))?;
    for name in FILES.iter().filter(|name| !(has_json && **name == ADDED)) {
        let path = dir.join(name);
        if exists(&path)? {
            found.push(path);
        }
    }
    Ok(found)
}

fn read_files(dir: &Path, rows: usize) -> Result<Vocabulary> {
    let roles = SpecialPieces::read(dir)?;
    let mut vocabulary = unused(rows);
    match (read_json_optional(&dir.join(TOKENIZER))?, SentencePieceModel::read(dir)?) {
        (Some(json), model) => {
            fill_from_json(&mut vocabulary, json, model.as_ref(), &roles).context(TOKENIZER)?;
        }
        (None, Some(model)) => {
            fill_from_model(&mut vocabulary, &model, &roles).context(SENTENCEPIECE)?;
            fill_from_added(&mut vocabulary, dir, &roles)?;
        }
        (None, None) => bail!("looked for {TOKENIZER} and {SENTENCEPIECE}, found neither"),
    }
    roles.assign(&mut vocabulary)?;
    Tokenizer::new(&vocabulary).map_err(checkpoint_error)?; // the runtime accepts it
    Ok(vocabulary)
}

/// A vocabulary of `rows` unused rows.
fn unused(rows: usize) -> Vocabulary {
    Vocabulary {
        tokens: (0..rows).map(|row| format!("[PAD{row}]")).collect(),
        scores: vec![UNUSED_SCORE; rows],
        types: vec![TokenType::Unused; rows],
        ..Vocabulary::default()
    }
}

/// Sets the piece of a row.
fn set_piece(v: &mut Vocabulary, id: u32, text: &str, kind: TokenType, score: f32) -> Result<()> {
    let (row, rows) = (id as usize, v.tokens.len());
    ensure!(row < rows, "piece `{text}` has id {id}, but the embedding has {rows} rows");
    ensure!(v.types[row] == TokenType::Unused, "id {id} is both `{}` and `{text}`", v.tokens[row]);
    v.tokens[row] = text.to_owned();
    v.types[row] = kind;
    v.scores[row] = score;
    Ok(())
}

/// Sets the piece of a row to an added token, or only the type if the model has that piece already.
fn set_added_token(v: &mut Vocabulary, id: u32, text: &str, kind: TokenType) -> Result<()> {
    let row = id as usize;
    if v.tokens.get(row).is_some_and(|known| known == text) {
        v.types[row] = kind;
        return Ok(());
    }
    set_piece(v, id, text, kind, ADDED_SCORE)
}

// ---- The names of the special pieces -----------------------------------------------------------

/// The pieces with a special role.
struct SpecialPieces {
    bos: String,
    eos: String,
    unknown: String,
    padding: String,
}

/// The keys of `tokenizer_config.json` and `special_tokens_map.json` that are read.
#[derive(Deserialize, Default)]
struct SpecialTokens {
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    unk_token: Option<TokenName>,
    pad_token: Option<TokenName>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    add_prefix_space: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Plain(String),
    Token { content: String },
}

impl SpecialPieces {
    fn read(dir: &Path) -> Result<Self> {
        let config: SpecialTokens = read_json_optional(&dir.join(CONFIG))?.unwrap_or_default();
        let map: SpecialTokens = read_json_optional(&dir.join(SPECIAL))?.unwrap_or_default();
        // These take precedence over `tokenizer.json`, and default to Llama-2's scheme.
        for (key, found, wanted) in [
            ("add_bos_token", config.add_bos_token, true),
            ("add_eos_token", config.add_eos_token, false),
            ("add_prefix_space", config.add_prefix_space, true),
        ] {
            ensure!(
                found.is_none_or(|found| found == wanted),
                "{CONFIG}: {key} is {}, Llama-2's scheme has {wanted}",
                !wanted
            );
        }
        let name =
            |key: &str, config: Option<TokenName>, map: Option<TokenName>| match config.or(map) {
                Some(TokenName::Plain(content) | TokenName::Token { content }) => Ok(content),
                None => bail!("looked for {key} in {CONFIG} and {SPECIAL}, found it in neither"),
            };
        Ok(Self {
            bos: name("bos_token", config.bos_token, map.bos_token)?,
            eos: name("eos_token", config.eos_token, map.eos_token)?,
            unknown: name("unk_token", config.unk_token, map.unk_token)?,
            padding: name("pad_token", config.pad_token, map.pad_token)?,
        })
    }

    fn include(&self, piece: &str) -> bool {
        [&self.bos, &self.eos, &self.unknown, &self.padding].into_iter().any(|name| name == piece)
    }

    /// Sets the four ids, and marks their pieces as special whatever their file said.
    fn assign(&self, v: &mut Vocabulary) -> Result<()> {
        let mut claim = |key: &str, piece: &String, kind: TokenType| {
            let row = iter::zip(&v.tokens, &v.types)
                .position(|(text, kind)| text == piece && *kind != TokenType::Unused)
                .with_context(|| format!("{key} is `{piece}`, which is not in the vocabulary"))?;
            v.types[row] = kind;
            u32::try_from(row).context("more rows than ids")
        };
        let bos = claim("bos_token", &self.bos, TokenType::Control)?;
        let eos = claim("eos_token", &self.eos, TokenType::Control)?;
        let padding = claim("pad_token", &self.padding, TokenType::Control)?;
        // Last, because fine-tunes pad with `<unk>`.
        let unknown = claim("unk_token", &self.unknown, TokenType::Unknown)?;
        (v.bos, v.eos, v.padding, v.unknown) = (bos, eos, padding, unknown);
        Ok(())
    }
}

// ---- tokenizer.json ----------------------------------------------------------------------------

#[derive(Deserialize)]
struct TokenizerJson {
    added_tokens: Vec<AddedToken>,
    model: BpeJson,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    special: bool,
    normalized: bool,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
}

#[derive(Deserialize)]
struct BpeJson {
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
}

/// tokenizers 0.20 and later write pairs, earlier ones `"a b"`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair(String, String),
}

fn fill_from_json(
    v: &mut Vocabulary,
    json: Value,
    model: Option<&SentencePieceModel>,
    roles: &SpecialPieces,
) -> Result<()> {
    check_scheme(&json, roles)?;
    let TokenizerJson { added_tokens, model: bpe } = serde_json::from_value(json)?;
    v.merges = bpe.merges.into_iter().map(Merge::into_line).collect();
    let scores = match model {
        Some(model) => model.scores_of(&bpe.vocab)?,
        None => scores_by_rank(&v.merges),
    };
    for (text, &id) in &bpe.vocab {
        // The score of a piece that no merge makes is never used.
        let score = scores.get(text).copied().unwrap_or(0.0);
        set_piece(v, id, text, type_of(text), score)?;
    }
    for token in added_tokens {
        let AddedToken { id, content, special, normalized, lstrip, rstrip, single_word } = token;
        ensure!(
            !(normalized || lstrip || rstrip || single_word),
            "added token `{content}` is normalized, lstrip, rstrip or single_word, \
             Llama-2's scheme has none of these"
        );
        let kind = if special { TokenType::Control } else { TokenType::UserDefined };
        set_added_token(v, id, &content, kind)?;
    }
    Ok(())
}

/// Refuses settings that would tokenize a text differently from Llama-2's scheme.
///
/// There are two ways to replace spaces by `▁`. Transformers 5 uses a pre-tokenizer, which differs only
/// where a text starts with a space, and prompts do not.
fn check_scheme(json: &Value, roles: &SpecialPieces) -> Result<()> {
    let same = |at: &str, wanted: &Value| value_or_default(json, at, wanted) == *wanted;
    let (normalizer, none) = (
        json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]}),
        Value::Null,
    );
    let metaspace = [
        ("/normalizer", none.clone()),
        ("/pre_tokenizer/type", json!("Metaspace")),
        ("/pre_tokenizer/replacement", json!("▁")),
        ("/pre_tokenizer/split", json!(false)),
    ];
    let prepends = ["first", "always"]
        .iter()
        .any(|scheme| same("/pre_tokenizer/prepend_scheme", &json!(scheme)));
    let spaces = if prepends && metaspace.iter().all(|(at, wanted)| same(at, wanted)) {
        Vec::from(metaspace)
    } else {
        vec![("/normalizer", normalizer), ("/pre_tokenizer", none.clone())]
    };
    // Without an unknown piece, every byte needs a piece.
    let bytes = (0..=255).all(|byte| !json["model"]["vocab"][format!("<0x{byte:02X}>")].is_null());
    let no_unknown = bytes && same("/model/unk_token", &none);
    let mut wanted = vec![
        ("/model/type", json!("BPE")),
        ("/model/byte_fallback", json!(true)),
        ("/model/fuse_unk", json!(true)),
        ("/model/ignore_merges", json!(false)),
        ("/model/unk_token", if no_unknown { none.clone() } else { json!(roles.unknown) }),
        ("/model/dropout", none.clone()),
        ("/model/continuing_subword_prefix", none.clone()),
        ("/model/end_of_word_suffix", none),
        ("/post_processor/type", json!("TemplateProcessing")),
        (
            "/post_processor/single",
            json!([
                {"SpecialToken": {"id": roles.bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ]),
        ),
    ];
    wanted.extend(spaces);
    for (at, wanted) in wanted {
        let found = value_or_default(json, at, &wanted);
        if found != wanted {
            let found: String = found.to_string().chars().take(200).collect();
            bail!(
                "{at} is {found}, Llama-2's scheme has {wanted}; take the tokenizer files of \
                 openvla/openvla-7b, unless the model was trained with others"
            );
        }
    }
    Ok(())
}

/// The value at a JSON pointer; an absent switch is off, as in the tokenizers library.
fn value_or_default(json: &Value, at: &str, wanted: &Value) -> Value {
    let absent = if wanted.is_boolean() { json!(false) } else { Value::Null };
    json.pointer(at).cloned().unwrap_or(absent)
}

impl Merge {
    fn into_line(self) -> String {
        match self {
            Self::Line(line) => line,
            Self::Pair(left, right) => format!("{left} {right}"),
        }
    }
}

/// `<0x0A>` is a byte; all others are text until a file says that they are special.
fn type_of(piece: &str) -> TokenType {
    let byte = piece
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok());
    if byte { TokenType::Byte } else { TokenType::Normal }
}

/// Scores by which llama.cpp, which merges the best-scored piece first, follows the merges' order.
fn scores_by_rank(merges: &[String]) -> HashMap<String, f32> {
    let mut scores = HashMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        scores.entry(merge.replacen(' ', "", 1)).or_insert(-(rank as f32));
    }
    scores
}

// ---- tokenizer.model ---------------------------------------------------------------------------

fn fill_from_model(
    v: &mut Vocabulary,
    model: &SentencePieceModel,
    roles: &SpecialPieces,
) -> Result<()> {
    for (id, piece) in (0..).zip(&model.pieces) {
        let kind = TokenType::try_from(piece.kind()).map_err(checkpoint_error)?;
        ensure!(
            matches!(kind, TokenType::Normal | TokenType::Byte) || roles.include(&piece.text),
            "piece `{}` is {kind:?}; Llama-2's scheme has only Normal, Byte, bos, eos, unk and pad",
            piece.text
        );
        set_piece(v, id, &piece.text, kind, piece.score)?;
    }
    v.merges = model.merges();
    Ok(())
}

/// Accepts special pieces only: the reference looks for other added tokens after it normalized the text,
/// and the runtime does not.
fn fill_from_added(v: &mut Vocabulary, dir: &Path, roles: &SpecialPieces) -> Result<()> {
    let added: BTreeMap<String, u32> = read_json_optional(&dir.join(ADDED))?.unwrap_or_default();
    for (piece, id) in added {
        ensure!(roles.include(&piece), "{ADDED}: `{piece}` is none of bos, eos, unk and pad");
        set_added_token(v, id, &piece, TokenType::Control).context(ADDED)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
