//! A vocabulary of ten pieces, through every file it can come in.

use std::fs;

use prost::Message;

use super::sentencepiece::{Piece, TrainerSpec};
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
        read_with(&[(CONFIG, config), (TOKENIZER, json), (SENTENCEPIECE, model.encode_to_vec())])
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

/// Transformers 5 has a pre-tokenizer write spaces, and no piece for what is unknown.
#[test]
fn a_pre_tokenizer_may_write_the_spaces() {
    let mut json = tokenizer();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    (0..=255).for_each(|byte| drop(vocab.insert(format!("<0x{byte:02X}>"), json!(20 + byte))));
    let read = |json: &Value| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(SPECIAL), config().to_string()).unwrap();
        fs::write(dir.path().join(TOKENIZER), json.to_string()).unwrap();
        read(dir.path(), 300)
    };
    let wanted = read(&json).unwrap();
    json["normalizer"] = Value::Null;
    json["model"]["unk_token"] = Value::Null;
    for scheme in ["first", "always"] {
        json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁",
                                       "prepend_scheme": scheme, "split": false});
        assert_eq!(read(&json).unwrap(), wanted);
    }
    for (key, value) in [
        ("split", json!(true)),
        ("split", Value::Null),
        ("replacement", json!("_")),
        ("prepend_scheme", json!("never")),
    ] {
        let mut other = json.clone();
        other["pre_tokenizer"][key] = value;
        assert_refused(read(&other), "take the tokenizer files of openvla/openvla-7b");
    }
    json["model"]["vocab"].as_object_mut().unwrap().remove("<0x42>");
    assert_refused(read(&json), "/model/unk_token is null");
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
