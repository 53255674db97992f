//! `tokenizer.model`: SentencePiece's own file, as far as it determines token ids.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use crate::files::read_optional;

/// The file's name.
pub const SENTENCEPIECE: &str = "tokenizer.model";

/// The part of SentencePiece's `ModelProto` that determines token ids.
///
/// ref: sentencepiece `src/sentencepiece_model.proto`
#[derive(Clone, PartialEq, Message)]
pub struct SentencePieceModel {
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    pub trainer_spec: Option<TrainerSpec>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Piece {
    #[prost(string, tag = "1")]
    pub text: String,
    #[prost(float, tag = "2")]
    pub score: f32,
    /// A [`TokenType`]; the two lists of numbers are one.
    #[prost(int32, optional, tag = "3", default = "1")]
    pub kind: Option<i32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    pub model_type: Option<i32>,
}

impl SentencePieceModel {
    const BPE: i32 = 2;

    /// Reads `tokenizer.model`, if there is one.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let Some(bytes) = read_optional(&dir.join(SENTENCEPIECE))? else { return Ok(None) };
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

    /// The score of each piece, after checking that both files have the same vocabulary.
    pub fn scores_of(&self, vocab: &BTreeMap<String, u32>) -> Result<HashMap<String, f32>> {
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

    /// The merges that the scores imply, as `"a b"`: each way to split a piece into two pieces, sorted by
    /// the ids of the two and then, stably, by the piece's score, best first.
    ///
    /// ref: `SentencePieceExtractor.extract`, whose sort is stable too
    pub fn merges(&self) -> Vec<String> {
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
