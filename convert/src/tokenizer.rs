//! A checkpoint's tokenizer, as the GGUF will hold it.
//!
//! in   `tokenizer.json`, or `tokenizer.model` alone; and the names of the special pieces
//! out  a [`Vocabulary`] with one piece for each row of the embedding
//!
//! The runtime knows Llama-2's scheme only. Whatever asks for another one is refused here, because
//! the model would read other ids than it was trained on and move without any sign of an error.
//!
//! ref: transformers 4.40.1, `convert_slow_tokenizer.py` `LlamaConverter`

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::iter;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use openvla::tokenizer::{TokenType, Tokenizer, Vocabulary};
use prost::Message;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const TOKENIZER: &str = "tokenizer.json";
const SENTENCEPIECE: &str = "tokenizer.model";
const ADDED: &str = "added_tokens.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";

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

fn read_files(dir: &Path, rows: usize) -> Result<Vocabulary> {
    let roles = Roles::read(dir)?;
    let mut vocabulary = unused(rows);
    match (read_json(dir, TOKENIZER)?, SentencePieceModel::read(dir)?) {
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
    Tokenizer::new(&vocabulary)?; // What the converter writes, the runtime can read.
    Ok(vocabulary)
}

/// A vocabulary of `rows` rows that hold no piece yet.
fn unused(rows: usize) -> Vocabulary {
    Vocabulary {
        tokens: (0..rows).map(|row| format!("[PAD{row}]")).collect(),
        scores: vec![UNUSED_SCORE; rows],
        types: vec![TokenType::Unused; rows],
        ..Vocabulary::default()
    }
}

/// Gives a row its piece.
fn place(v: &mut Vocabulary, id: u32, text: &str, kind: TokenType, score: f32) -> Result<()> {
    let (row, rows) = (id as usize, v.tokens.len());
    ensure!(row < rows, "piece `{text}` has id {id}, but the embedding has {rows} rows");
    ensure!(v.types[row] == TokenType::Unused, "id {id} is both `{}` and `{text}`", v.tokens[row]);
    v.tokens[row] = text.to_owned();
    v.types[row] = kind;
    v.scores[row] = score;
    Ok(())
}

/// Gives a row a piece beside the model's own, or a type to one of those.
fn place_added(v: &mut Vocabulary, id: u32, text: &str, kind: TokenType) -> Result<()> {
    let row = id as usize;
    if v.tokens.get(row).is_some_and(|known| known == text) {
        v.types[row] = kind;
        return Ok(());
    }
    place(v, id, text, kind, ADDED_SCORE)
}

// ---- The names of the special pieces -----------------------------------------------------------

/// Which piece plays which part.
struct Roles {
    bos: String,
    eos: String,
    unknown: String,
    padding: String,
}

/// What `tokenizer_config.json` and `special_tokens_map.json` say that matters here.
#[derive(Deserialize, Default)]
struct SpecialTokens {
    bos_token: Option<Name>,
    eos_token: Option<Name>,
    unk_token: Option<Name>,
    pad_token: Option<Name>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    add_prefix_space: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Name {
    Plain(String),
    Token { content: String },
}

impl Roles {
    fn read(dir: &Path) -> Result<Self> {
        let config: SpecialTokens = read_json(dir, CONFIG)?.unwrap_or_default();
        let map: SpecialTokens = read_json(dir, SPECIAL)?.unwrap_or_default();
        // These override what `tokenizer.json` says, and default to Llama-2's scheme.
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
        let name = |key: &str, config: Option<Name>, map: Option<Name>| match config.or(map) {
            Some(Name::Plain(content) | Name::Token { content }) => Ok(content),
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

    /// Fills in the four ids, and makes their pieces special whatever their file said.
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
    roles: &Roles,
) -> Result<()> {
    check_scheme(&json, roles)?;
    let TokenizerJson { added_tokens, model: bpe } = serde_json::from_value(json)?;
    v.merges = bpe.merges.into_iter().map(Merge::into_line).collect();
    let scores = match model {
        Some(model) => model.scores_of(&bpe.vocab)?,
        None => scores_by_rank(&v.merges),
    };
    for (text, &id) in &bpe.vocab {
        // A piece that no merge makes is never asked for its score.
        let score = scores.get(text).copied().unwrap_or(0.0);
        place(v, id, text, type_of(text), score)?;
    }
    for token in added_tokens {
        let AddedToken { id, content, special, normalized, lstrip, rstrip, single_word } = token;
        ensure!(
            !(normalized || lstrip || rstrip || single_word),
            "added token `{content}` is normalized, lstrip, rstrip or single_word, \
             Llama-2's scheme has none of these"
        );
        let kind = if special { TokenType::Control } else { TokenType::UserDefined };
        place_added(v, id, &content, kind)?;
    }
    Ok(())
}

/// Refuses whatever would cut a text into other ids than Llama-2's scheme does.
fn check_scheme(json: &Value, roles: &Roles) -> Result<()> {
    let wanted = [
        ("/model/type", json!("BPE")),
        ("/model/byte_fallback", json!(true)),
        ("/model/fuse_unk", json!(true)),
        ("/model/ignore_merges", json!(false)),
        ("/model/unk_token", json!(roles.unknown)),
        ("/model/dropout", Value::Null),
        ("/model/continuing_subword_prefix", Value::Null),
        ("/model/end_of_word_suffix", Value::Null),
        (
            "/normalizer",
            json!({"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]}),
        ),
        ("/pre_tokenizer", Value::Null),
        ("/post_processor/type", json!("TemplateProcessing")),
        (
            "/post_processor/single",
            json!([
                {"SpecialToken": {"id": roles.bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ]),
        ),
    ];
    for (at, wanted) in wanted {
        // The library reads an absent switch as off.
        let absent = if wanted.is_boolean() { json!(false) } else { Value::Null };
        let found = json.pointer(at).unwrap_or(&absent);
        if *found != wanted {
            let found: String = found.to_string().chars().take(200).collect();
            bail!("{at} is {found}, Llama-2's scheme has {wanted}");
        }
    }
    Ok(())
}

impl Merge {
    fn into_line(self) -> String {
        match self {
            Self::Line(line) => line,
            Self::Pair(left, right) => format!("{left} {right}"),
        }
    }
}

/// `<0x0A>` stands for a byte; all else is text until a file says that it is special.
fn type_of(piece: &str) -> TokenType {
    let byte = piece
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok());
    if byte { TokenType::Byte } else { TokenType::Normal }
}

/// Scores that make llama.cpp, which merges the best-scored piece first, go by the merges' order.
fn scores_by_rank(merges: &[String]) -> HashMap<String, f32> {
    let mut scores = HashMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        scores.entry(merge.replacen(' ', "", 1)).or_insert(-(rank as f32));
    }
    scores
}

// ---- tokenizer.model ---------------------------------------------------------------------------

/// The part of SentencePiece's `ModelProto` that decides about ids.
///
/// ref: sentencepiece `src/sentencepiece_model.proto`
#[derive(Clone, PartialEq, Message)]
struct SentencePieceModel {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    /// A [`TokenType`]; the two lists of numbers are one.
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
}

impl SentencePieceModel {
    const BPE: i32 = 2;

    fn read(dir: &Path) -> Result<Option<Self>> {
        let Some(bytes) = read_file(dir, SENTENCEPIECE)? else { return Ok(None) };
        let model = Self::decode(bytes.as_slice()).context(SENTENCEPIECE)?;
        let model_type = model.trainer_spec.unwrap_or_default().model_type();
        ensure!(
            model_type == Self::BPE,
            "{SENTENCEPIECE}: model type {model_type}, wanted {} (BPE)",
            Self::BPE
        );
        if let Some(piece) = model.pieces.iter().find(|piece| !piece.score.is_finite()) {
            bail!("{SENTENCEPIECE}: the score of `{}` is {}", piece.text, piece.score);
        }
        Ok(Some(model))
    }

    /// The score of each piece, once sure that both files mean the same vocabulary.
    fn scores_of(&self, vocab: &BTreeMap<String, u32>) -> Result<HashMap<String, f32>> {
        let (here, there) = (vocab.len(), self.pieces.len());
        ensure!(here == there, "{here} pieces, but {SENTENCEPIECE} has {there}");
        for (id, piece) in (0..).zip(&self.pieces) {
            ensure!(
                vocab.get(&piece.text) == Some(&id),
                "{SENTENCEPIECE} has `{}` as piece {id}, but this file has not",
                piece.text
            );
        }
        Ok(self.pieces.iter().map(|piece| (piece.text.clone(), piece.score)).collect())
    }

    /// The merges that the scores imply, as `"a b"`: each way to cut a piece into two pieces, by
    /// the ids of the two, and then the best-scored pieces first.
    ///
    /// ref: `SentencePieceExtractor.extract`, whose sort is stable too
    fn merges(&self) -> Vec<String> {
        let ids: HashMap<&str, usize> =
            self.pieces.iter().enumerate().map(|(id, piece)| (piece.text.as_str(), id)).collect();
        let mut merges = Vec::new();
        for piece in &self.pieces {
            let cuts = piece.text.char_indices().skip(1).map(|(at, _)| piece.text.split_at(at));
            let mut halves: Vec<_> = cuts
                .filter_map(|(left, right)| Some((ids.get(left)?, ids.get(right)?, left, right)))
                .collect();
            halves.sort_unstable();
            merges.extend(halves.into_iter().map(|(.., left, right)| (piece.score, left, right)));
        }
        // Scores are finite, so they compare; 0 and -0 are equal here as they are in Python.
        merges.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal));
        merges.into_iter().map(|(_, left, right)| format!("{left} {right}")).collect()
    }
}

fn fill_from_model(v: &mut Vocabulary, model: &SentencePieceModel, roles: &Roles) -> Result<()> {
    for (id, piece) in (0..).zip(&model.pieces) {
        let kind = TokenType::try_from(piece.kind())?;
        ensure!(
            matches!(kind, TokenType::Normal | TokenType::Byte) || roles.include(&piece.text),
            "piece `{}` is {kind:?}; Llama-2's scheme has only Normal, Byte, bos, eos, unk and pad",
            piece.text
        );
        place(v, id, &piece.text, kind, piece.score)?;
    }
    v.merges = model.merges();
    Ok(())
}

/// Special pieces only: the reference looks for others after it normalised the text, and the
/// runtime does not.
fn fill_from_added(v: &mut Vocabulary, dir: &Path, roles: &Roles) -> Result<()> {
    let added: BTreeMap<String, u32> = read_json(dir, ADDED)?.unwrap_or_default();
    for (piece, id) in added {
        ensure!(roles.include(&piece), "{ADDED}: `{piece}` is none of bos, eos, unk and pad");
        place_added(v, id, &piece, TokenType::Control).context(ADDED)?;
    }
    Ok(())
}

// ---- Files -------------------------------------------------------------------------------------

/// None if there is no such file.
fn read_file(dir: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    match fs::read(dir.join(name)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(name.to_owned()),
    }
}

fn read_json<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>> {
    let bytes = read_file(dir, name)?;
    bytes.map(|bytes| serde_json::from_slice(&bytes).context(name.to_owned())).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECES: [(&str, f32, TokenType); 10] = [
        ("<unk>", 0.0, TokenType::Unknown),
        ("<s>", 0.0, TokenType::Control),
        ("</s>", 0.0, TokenType::Control),
        ("<0x41>", 0.0, TokenType::Byte),
        ("ab", -1.0, TokenType::Normal), // 4
        ("bc", -0.0, TokenType::Normal),
        ("abc", -2.0, TokenType::Normal), // 6
        ("a", -3.0, TokenType::Normal),
        ("b", -4.0, TokenType::Normal),
        ("c", -5.0, TokenType::Normal),
    ];
    /// By score; of the two ways to make `abc`, the one whose left half has the lower id.
    const MERGES: [&str; 4] = ["b c", "a b", "ab c", "a bc"];

    fn config() -> Value {
        json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>",
               "pad_token": "<PAD>", "add_bos_token": true})
    }

    fn model() -> SentencePieceModel {
        let piece = |(text, score, kind): (&str, f32, TokenType)| Piece {
            text: text.into(),
            score,
            kind: (kind != TokenType::Normal).then_some(kind as i32), // absent, as in real files
        };
        SentencePieceModel {
            pieces: PIECES.into_iter().map(piece).collect(),
            trainer_spec: Some(TrainerSpec { model_type: Some(2) }),
        }
    }

    fn tokenizer() -> Value {
        let added = |id: u32, content: &str| {
            json!({"id": id, "content": content, "special": true, "normalized": false,
                   "lstrip": false, "rstrip": false, "single_word": false})
        };
        let vocab: BTreeMap<&str, usize> =
            PIECES.iter().enumerate().map(|(id, piece)| (piece.0, id)).collect();
        json!({
            "added_tokens": [
                added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), added(10, "<PAD>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                      "vocab": vocab, "merges": MERGES},
        })
    }

    /// Writes the files into a folder and reads them with 12 rows.
    fn read_with(files: &[(&str, Vec<u8>)]) -> Result<Vocabulary> {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        read(dir.path(), 12)
    }

    fn from_model(model: &SentencePieceModel, added: Value) -> Result<Vocabulary> {
        let (config, added) = (config().to_string().into(), added.to_string().into());
        read_with(&[(CONFIG, config), (SENTENCEPIECE, model.encode_to_vec()), (ADDED, added)])
    }

    fn from_json(json: &Value) -> Result<Vocabulary> {
        read_with(&[(SPECIAL, config().to_string().into()), (TOKENIZER, json.to_string().into())])
    }

    #[track_caller]
    fn assert_refused(result: Result<Vocabulary>, wanted: &str) {
        let found = format!("{:#}", result.expect_err(wanted));
        assert!(found.contains(wanted), "`{found}` does not say `{wanted}`");
    }

    #[test]
    fn a_sentencepiece_model_becomes_pieces_merges_and_unused_rows() {
        let v = from_model(&model(), json!({"<PAD>": 10})).unwrap();
        assert_eq!(v.merges, MERGES);
        assert_eq!(v.tokens[9..], ["c", "<PAD>", "[PAD11]"]);
        assert_eq!(v.types[9..], [TokenType::Normal, TokenType::Control, TokenType::Unused]);
        assert_eq!((v.types[0], v.types[3]), (TokenType::Unknown, TokenType::Byte));
        assert_eq!(v.scores[8..], [-4.0, -5.0, -1000.0, -10_000.0]);
        assert_eq!((v.bos, v.eos, v.unknown, v.padding), (1, 2, 0, 10));
    }

    #[test]
    fn both_files_together_say_what_either_says() {
        let alone = from_model(&model(), json!({"<PAD>": 10})).unwrap();
        let both = |model: &SentencePieceModel| {
            let (config, json) = (config().to_string().into(), tokenizer().to_string().into());
            read_with(&[
                (CONFIG, config),
                (TOKENIZER, json),
                (SENTENCEPIECE, model.encode_to_vec()),
            ])
        };
        assert_eq!(both(&model()).unwrap(), alone);
        let mut other = model();
        other.pieces.swap(8, 9);
        assert_refused(both(&other), "tokenizer.model has `c` as piece 8");
        other.pieces.pop();
        assert_refused(both(&other), "10 pieces, but tokenizer.model has 9");
    }

    #[test]
    fn without_a_model_the_merges_order_is_the_score() {
        let mut json = tokenizer();
        let v = from_json(&json).unwrap();
        assert_eq!(v.scores[4..8], [-1.0, 0.0, -2.0, 0.0]); // ab, bc, abc, and a, which none makes
        json["model"]["merges"] = json!([["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]);
        assert_eq!(from_json(&json).unwrap(), v);
    }

    #[test]
    fn an_added_token_that_is_not_special_is_the_users() {
        let mut json = tokenizer();
        let mut token = json["added_tokens"][3].clone();
        (token["id"], token["content"], token["special"]) = (json!(11), json!("a b"), json!(false));
        json["added_tokens"].as_array_mut().unwrap().push(token);
        let v = from_json(&json).unwrap();
        assert_eq!((v.tokens[11].as_str(), v.types[11]), ("a b", TokenType::UserDefined));
    }

    #[test]
    fn other_schemes_are_refused_by_name() {
        let cases = [
            ("/model/type", json!("Unigram")),
            ("/model/byte_fallback", json!(false)),
            ("/model/unk_token", Value::Null),
            ("/normalizer", json!({"type": "NFKC"})),
            ("/pre_tokenizer", json!({"type": "Metaspace"})),
            ("/post_processor/type", json!("ByteLevel")),
            ("/post_processor/single", json!([])),
        ];
        for (at, found) in cases {
            let mut json = tokenizer();
            *json.pointer_mut(at).unwrap() = found.clone();
            assert_refused(from_json(&json), &format!("{at} is {found}, Llama-2's scheme has "));
        }
        let mut json = tokenizer();
        json["added_tokens"][3]["lstrip"] = json!(true);
        assert_refused(from_json(&json), "added token `<PAD>`");
        let mut unigram = model();
        unigram.trainer_spec = None;
        assert_refused(from_model(&unigram, json!({})), "model type 1, wanted 2");
        let ends = json!({"add_eos_token": true}).to_string().into();
        assert_refused(read_with(&[(CONFIG, ends)]), "add_eos_token is true");
    }

    #[test]
    fn damaged_or_missing_files_are_named() {
        let config = config().to_string();
        assert_refused(
            read_with(&[]),
            "looked for bos_token in tokenizer_config.json and special_tokens_map",
        );
        assert_refused(
            read_with(&[(CONFIG, config.clone().into())]),
            "looked for tokenizer.json and tokenizer.model, found neither",
        );
        assert_refused(
            read_with(&[(CONFIG, config.into()), (SENTENCEPIECE, vec![0xff; 9])]),
            "tokenizer.model: failed to decode",
        );
        assert_refused(from_model(&model(), json!({})), "pad_token is `<PAD>`, which is not in");
        let cases = [
            (json!({"<PAD>": 12}), "piece `<PAD>` has id 12, but the embedding has 12 rows"),
            (json!({"<PAD>": 9}), "id 9 is both `c` and `<PAD>`"),
            (json!({"<PAD>": 10, "x": 11}), "`x` is none of bos, eos, unk and pad"),
        ];
        for (added, wanted) in cases {
            assert_refused(from_model(&model(), added), wanted);
        }
    }
}
