//! Learns pieces from sentences, in the layout of Llama-2's vocabulary.
//!
//! | ids | pieces |
//! |---|---|
//! | 0, 1, 2 | `<unk>`, `<s>`, `</s>` |
//! | 3 … 258 | the bytes `<0x00>` … `<0xFF>` |
//! | 259 … `space` - 1 | pieces of several characters, the earliest merged first |
//! | `space` … `n_piece` - 257 | single characters, from `▁` on |
//! | `n_piece` - 256 … `n_piece` - 1 | the action tokens: single characters that no prompt contains |
//!
//! Characters for private use fill the gaps where the sentences have fewer pieces.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// SentencePiece's space.
pub const SPACE: char = '▁';

/// The id of the first learned piece.
const FIRST_LEARNED: usize = 3 + 256;
/// Unicode has exactly 256 Braille patterns: one for each action bin.
const BRAILLE: RangeInclusive<char> = '\u{2800}'..='\u{28FF}';
/// Characters that no text has: a plane for private use.
const FILLERS: RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

/// One entry of the vocabulary. Its id is its index.
pub struct Piece {
    /// The text, with `▁` for spaces.
    pub text: String,
    /// Merge priority: the highest is merged first. Falls by one per learned piece.
    pub score: f32,
    /// What the piece is.
    pub kind: PieceType,
}

/// SentencePiece's types of pieces, by their numbers in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum PieceType {
    /// Text.
    Normal = 1,
    /// `<unk>`.
    Unknown = 2,
    /// `<s>` and `</s>`.
    Control = 3,
    /// A byte of text that has no piece.
    Byte = 6,
}

/// Learns a vocabulary of `n_piece` pieces from sentences: those that are merged have the ids before
/// `space`, single characters those from there on, and the last 256 are the actions.
///
/// # Panics
/// If the single characters do not fit between `space` and the actions.
pub fn learn(corpus: &[String], space: usize, n_piece: usize) -> Vec<Piece> {
    let mut fillers = FILLERS.map(String::from);
    let mut fill = |learned: &mut Vec<String>, id: usize| {
        let missing = id - FIRST_LEARNED - learned.len();
        learned.extend(fillers.by_ref().take(missing));
    };
    let mut learned = merged(corpus, space - FIRST_LEARNED);
    fill(&mut learned, space);
    learned.extend(alphabet(corpus).into_iter().map(String::from));
    fill(&mut learned, n_piece - 256);
    learned.extend(BRAILLE.map(String::from));

    let special =
        [("<unk>", PieceType::Unknown), ("<s>", PieceType::Control), ("</s>", PieceType::Control)];
    let special = special.map(|(text, kind)| Piece { text: text.into(), score: 0.0, kind });
    let bytes =
        (0..256).map(|b| Piece { text: format!("<0x{b:02X}>"), score: 0.0, kind: PieceType::Byte });
    let learned = learned.into_iter().enumerate();
    let learned =
        learned.map(|(i, text)| Piece { text, score: -(i as f32), kind: PieceType::Normal });
    special.into_iter().chain(bytes).chain(learned).collect()
}

/// Single characters: the space, the corpus's by descending count, the rest of printable ASCII.
/// A newline stays a byte, as in Llama-2.
fn alphabet(corpus: &[String]) -> Vec<char> {
    let mut counts: BTreeMap<char, usize> = ('!'..='~').map(|c| (c, 0)).collect();
    for c in corpus.iter().flat_map(|text| text.chars()).filter(|c| !c.is_whitespace()) {
        *counts.entry(c).or_default() += 1;
    }
    let mut found: Vec<char> = counts.keys().copied().collect();
    found.sort_by_key(|c| Reverse(counts[c]));
    [SPACE].into_iter().chain(found).collect()
}

/// Byte-pair encoding: joins the most frequent pair of neighbors, the first of equals, until there are
/// `n` pieces or every word is one piece.
///
/// Runs of spaces come first, as in Llama-2, though no sentence has them.
fn merged(corpus: &[String], n: usize) -> Vec<String> {
    let mut words: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    for word in corpus.iter().flat_map(|text| words_of(text)) {
        *words.entry(word.chars().map(String::from).collect()).or_default() += 1;
    }
    let mut pieces: Vec<String> = [2, 3, 4].map(|n| SPACE.to_string().repeat(n)).into();
    let mut known: BTreeSet<String> = pieces.iter().cloned().collect();
    while pieces.len() < n {
        let Some((left, right)) = commonest_pair(&words) else { break };
        words = words.iter().map(|(word, count)| (join(word, &left, &right), *count)).collect();
        let piece = left + &right;
        if known.insert(piece.clone()) {
            pieces.push(piece);
        }
    }
    pieces
}

fn commonest_pair(words: &BTreeMap<Vec<String>, usize>) -> Option<(String, String)> {
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for (word, count) in words {
        for pair in word.windows(2) {
            *counts.entry((&pair[0], &pair[1])).or_default() += count;
        }
    }
    let (pair, _) = counts.into_iter().max_by_key(|&(pair, count)| (count, Reverse(pair)))?;
    Some((pair.0.into(), pair.1.into()))
}

/// The word with every `left`, `right` joined, from the left.
fn join(word: &[String], left: &str, right: &str) -> Vec<String> {
    let mut joined: Vec<String> = Vec::with_capacity(word.len());
    let mut open = false; // whether the last piece may still be a `left`
    for piece in word {
        match joined.last_mut() {
            Some(last) if open && last == left && piece == right => {
                last.push_str(piece);
                open = false;
            }
            _ => {
                joined.push(piece.clone());
                open = true;
            }
        }
    }
    joined
}

/// Splits a text into what may become one piece: letters with the space before them. All other
/// characters stay single.
fn words_of(text: &str) -> Vec<String> {
    let mut words: Vec<String> = vec![SPACE.into()];
    for c in text.chars() {
        let c = if c == ' ' { SPACE } else { c };
        match words.last_mut() {
            Some(word)
                if c.is_alphabetic()
                    && word.ends_with(|last: char| last == SPACE || last.is_alphabetic()) =>
            {
                word.push(c);
            }
            _ => words.push(c.into()),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_goes_from_the_left_and_does_not_overlap() {
        let word: Vec<String> = ["a", "a", "a", "b"].map(String::from).into();
        assert_eq!(join(&word, "a", "a"), ["aa", "a", "b"]);
    }
}
