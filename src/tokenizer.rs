//! Text to token ids: Llama-2's SentencePiece BPE with byte fallback.
//!
//! in   text, such as the prompt that [`prompt`](crate::prompt) makes of an instruction
//! out  `[n]` ids, beginning with BOS
//!
//! Ids must be the reference's exactly, so this is the Hugging Face `tokenizers` crate, set up as
//! the reference sets it up. All settings are constants; only the pieces and merges come from the
//! model file.
//!
//! ref: transformers 4.40.1, `convert_slow_tokenizer.py` `LlamaConverter` and
//! `tokenization_llama_fast.py` `LlamaTokenizerFast`

use std::iter;

use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence};

use crate::{Error, Result};

/// What SentencePiece writes for a space.
const SPACE: &str = "▁";

/// The vocabulary as the GGUF holds it (`tokenizer.ggml.*`): SentencePiece BPE with byte fallback,
/// as Llama-2's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Vocabulary {
    /// One piece for each row of the embedding. A row without a piece holds a name such as
    /// `[PAD32001]` and is [`Unused`](TokenType::Unused), as llama.cpp's converter writes it.
    pub tokens: Vec<String>,
    /// One score for each piece. Kept for other readers of the file: merging goes by `merges`.
    pub scores: Vec<f32>,
    /// One type for each piece.
    pub types: Vec<TokenType>,
    /// Pairs of pieces that become one piece, as `"a b"`; the first are merged first.
    pub merges: Vec<String>,
    /// Id that begins every text.
    pub bos: u32,
    /// Id that ends a generated text.
    pub eos: u32,
    /// Id of a character that has neither a piece nor bytes.
    pub unknown: u32,
    /// Id that fills up a batch.
    pub padding: u32,
}

/// What a piece is for; the values are ggml's `llama_token_type` and SentencePiece's `Type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    /// Text.
    Normal = 1,
    /// Stands for what no piece covers, `<unk>`.
    Unknown = 2,
    /// Not text: `<s>`, `</s>`, `<PAD>`.
    Control = 3,
    /// Text that is one token wherever it occurs.
    UserDefined = 4,
    /// A row of the embedding without a piece.
    Unused = 5,
    /// One byte of a character that has no piece, `<0x0A>`.
    Byte = 6,
}

impl TryFrom<i32> for TokenType {
    type Error = Error;

    fn try_from(value: i32) -> Result<Self> {
        Ok(match value {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return Err(unusable(format!("token type {value}, wanted 1 to 6"))),
        })
    }
}

/// Turns text into ids.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: u32,
}

impl Tokenizer {
    /// Sets the tokenizer up for a vocabulary.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the lists differ in length, a special id is out of range or not special,
    /// a piece occurs twice, or a merge is not two pieces that make a third.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self> {
        check_lengths(vocabulary)?;
        let ids = ids_by_piece(vocabulary)?;
        let merges = merges(vocabulary, &ids)?;
        let unknown = special(vocabulary, "unknown", vocabulary.unknown)?;
        for (role, id) in
            [("bos", vocabulary.bos), ("eos", vocabulary.eos), ("padding", vocabulary.padding)]
        {
            special(vocabulary, role, id)?;
        }
        let inner = reference(ids, merges, unknown, added_tokens(vocabulary))
            .map_err(|e| unusable(e.to_string()))?;
        Ok(Self { inner, bos: vocabulary.bos })
    }

    /// The ids of a text, with BOS before them; of an empty text, BOS alone.
    ///
    /// A control piece that is spelled out in the text (`<s>`) becomes its id, as in the reference.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the library refuses the text, which no known text makes it do.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| unusable(e.to_string()))?;
        Ok(iter::once(self.bos).chain(encoding.get_ids().iter().copied()).collect())
    }

    /// The id of a piece as the vocabulary spells it, `"▁"` for a space; none for unused rows.
    pub fn id(&self, piece: &str) -> Option<u32> {
        self.inner.token_to_id(piece)
    }
}

/// The reference's tokenizer: no pre-tokenizer, so merges run over the whole text.
fn reference(
    ids: Vocab,
    merges: Merges,
    unknown: &str,
    added: Vec<AddedToken>,
) -> tokenizers::Result<tokenizers::Tokenizer> {
    let bpe = BPE::builder()
        .vocab_and_merges(ids, merges)
        .unk_token(unknown.to_owned())
        .fuse_unk(true)
        .byte_fallback(true)
        // The library's cache is a thread local that outlives the tokenizer; without it a prompt
        // takes 0.1 ms.
        .cache_capacity(0)
        .build()?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(Sequence::new(vec![
        Prepend::new(SPACE.to_owned()).into(),
        Replace::new(" ", SPACE)?.into(),
    ])))?;
    tokenizer.add_special_tokens(added)?;
    Ok(tokenizer)
}

/// The pieces that are cut out of the text before BPE sees it. Special ones are matched in the raw
/// text, so what follows one is normalized afresh and gets its own `▁`.
fn added_tokens(vocabulary: &Vocabulary) -> Vec<AddedToken> {
    iter::zip(&vocabulary.tokens, &vocabulary.types)
        .filter(|(_, kind)| {
            matches!(kind, TokenType::Control | TokenType::Unknown | TokenType::UserDefined)
        })
        .map(|(piece, _)| AddedToken::from(piece.as_str(), true))
        .collect()
}

fn check_lengths(vocabulary: &Vocabulary) -> Result<()> {
    let [tokens, scores, types] =
        [vocabulary.tokens.len(), vocabulary.scores.len(), vocabulary.types.len()];
    if tokens != scores || tokens != types {
        return Err(unusable(format!("{tokens} pieces with {scores} scores and {types} types")));
    }
    u32::try_from(tokens).map_err(|_| unusable(format!("{tokens} pieces")))?;
    Ok(())
}

/// Ids of all pieces that can come out of a text.
fn ids_by_piece(vocabulary: &Vocabulary) -> Result<Vocab> {
    let mut ids = Vocab::with_capacity(vocabulary.tokens.len());
    for ((id, piece), kind) in (0..).zip(&vocabulary.tokens).zip(&vocabulary.types) {
        if *kind == TokenType::Unused {
            continue;
        }
        if let Some(first) = ids.insert(piece.clone(), id) {
            return Err(unusable(format!("piece `{piece}` has two ids, {first} and {id}")));
        }
    }
    Ok(ids)
}

/// Merges as pairs. The library checks that they are of pieces, but panics where a pair is longer
/// than any piece.
fn merges(vocabulary: &Vocabulary, ids: &Vocab) -> Result<Merges> {
    let longest = ids.keys().map(String::len).max().unwrap_or(0);
    vocabulary
        .merges
        .iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) if left.len() + right.len() <= longest => {
                Ok((left.to_owned(), right.to_owned()))
            }
            _ => Err(unusable(format!("merge `{merge}` is not two pieces that make a third"))),
        })
        .collect()
}

/// The piece of a special id.
fn special<'v>(vocabulary: &'v Vocabulary, role: &str, id: u32) -> Result<&'v str> {
    let row = id as usize;
    match vocabulary.types.get(row) {
        Some(TokenType::Control | TokenType::Unknown) => Ok(&vocabulary.tokens[row]),
        Some(kind) => Err(unusable(format!(
            "the {role} id {id} is `{}` of type {kind:?}, wanted Control or Unknown",
            vocabulary.tokens[row]
        ))),
        None => Err(unusable(format!(
            "the {role} id is {id}, but there are {} pieces",
            vocabulary.tokens.len()
        ))),
    }
}

fn unusable(why: String) -> Error {
    Error::Model { why: format!("tokenizer: {why}") }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Six special and byte pieces, then letters and the words that the merges make of them.
    pub(crate) fn tiny() -> Vocabulary {
        use TokenType::{Byte, Control, Normal, Unknown, Unused};
        let rows = [
            ("<unk>", Unknown), // 0
            ("<s>", Control),
            ("</s>", Control),
            ("<PAD>", Control),
            ("<0xC3>", Byte), // 4
            ("<0xA9>", Byte),
            ("▁", Normal), // 6
            ("c", Normal),
            ("u", Normal),
            ("p", Normal),
            ("up", Normal),  // 10
            ("cup", Normal), // 11
            ("▁cup", Normal),
            ("▁▁", Normal), // 13
            ("[PAD14]", Unused),
        ];
        Vocabulary {
            tokens: rows.iter().map(|(piece, _)| (*piece).to_owned()).collect(),
            scores: vec![0.0; rows.len()],
            types: rows.iter().map(|(_, kind)| *kind).collect(),
            merges: ["u p", "c up", "▁ cup", "▁ ▁"].map(str::to_owned).to_vec(),
            bos: 1,
            eos: 2,
            unknown: 0,
            padding: 3,
        }
    }

    fn refusal(change: impl FnOnce(&mut Vocabulary)) -> String {
        let mut vocabulary = tiny();
        change(&mut vocabulary);
        Tokenizer::new(&vocabulary).err().expect("a refusal").to_string()
    }

    #[test]
    fn text_becomes_the_ids_of_the_scheme() {
        let tokenizer = Tokenizer::new(&tiny()).unwrap();
        let cases: [(&str, &[u32]); 10] = [
            ("", &[1]),
            ("cup", &[1, 12]),
            (" cup", &[1, 6, 12]),
            ("  ", &[1, 13, 6]),
            ("upcup", &[1, 6, 10, 11]),
            ("é", &[1, 6, 4, 5]),            // no piece, but both its bytes
            ("xy", &[1, 6, 0]),              // neither: unknown, fused
            ("cup</s>cup", &[1, 12, 2, 12]), // a new ▁ after a control piece
            ("<PAD>", &[1, 3]),
            ("[PAD14]", &[1, 6, 0]), // an unused row is not a piece
        ];
        for (text, want) in cases {
            assert_eq!(tokenizer.encode(text).unwrap(), want, "{text:?}");
        }
    }

    #[test]
    fn pieces_have_their_ids_and_unused_rows_none() {
        let tokenizer = Tokenizer::new(&tiny()).unwrap();
        assert_eq!(tokenizer.id("▁"), Some(6));
        assert_eq!(tokenizer.id("<PAD>"), Some(3));
        assert_eq!(tokenizer.id("[PAD14]"), None);
    }

    #[test]
    fn a_damaged_vocabulary_is_refused_with_the_reason() {
        let cases = [
            (refusal(|v| v.scores.truncate(3)), "15 pieces with 3 scores and 15 types"),
            (refusal(|v| v.bos = 15), "the bos id is 15, but there are 15 pieces"),
            (refusal(|v| v.padding = 14), "the padding id 14 is `[PAD14]` of type Unused"),
            (refusal(|v| v.tokens[9] = "c".into()), "piece `c` has two ids, 7 and 9"),
            (refusal(|v| v.merges[0] = "u x".into()), "Token `x` out of vocabulary"),
            (refusal(|v| v.merges[0] = "up".into()), "merge `up` is not two pieces"),
            // Longer than any piece in use: the library alone would panic.
            (refusal(|v| v.merges[0] = "<PAD> up".into()), "merge `<PAD> up` is not two pieces"),
        ];
        for (found, wanted) in cases {
            assert!(found.contains(wanted), "{found}");
        }
    }

    #[test]
    fn types_are_ggmls_numbers() {
        for value in 1..=6 {
            assert_eq!(TokenType::try_from(value).unwrap() as i32, value);
        }
        assert!(TokenType::try_from(0).is_err() && TokenType::try_from(7).is_err());
    }
}
