//! The vocabulary: Llama-2's layout, learnt from sentences composed here.
//!
//! | ids; at full size | pieces |
//! |---|---|
//! | 0, 1, 2 | `<unk>`, `<s>`, `</s>` |
//! | 3 … 258 | the bytes `<0x00>` … `<0xFF>` |
//! | 259 … 351, 259 … 29870 | pieces of several characters, the earliest merged first |
//! | 352 … 447, 29871 … 31743 | single characters, from `▁` on |
//! | 448 … 703, 31744 … 31999 | the action tokens: single characters that no prompt contains |
//!
//! At full size the sentences do not have that many pieces: private characters fill the gaps.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use crate::size::Sizes;

/// What stands for a space.
pub const SPACE: char = '▁';

/// Id of the first piece that is learnt.
const LEARNT: usize = 3 + 256;
/// Unicode has exactly 256 Braille patterns: one for each action bin.
const BRAILLE: RangeInclusive<char> = '\u{2800}'..='\u{28FF}';
/// What no text has: a plane for private use.
const FILLERS: RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

const VERBS: [&str; 8] = ["put", "move", "place", "push", "slide", "stack", "pick up", "drop"];
const OBJECTS: [&str; 8] =
    ["eggplant", "carrot", "the red block", "the blue cup", "spoon", "towel", "jalapeño", "sponge"];
const PLACES: [&str; 6] = [
    "into pot",
    "onto the plate",
    "in the sink",
    "on the left of the bowl",
    "near the drawer",
    "to the other side of the table",
];

/// One entry of the vocabulary. Its id is its place.
pub struct Piece {
    pub text: String,
    /// How early it is merged: the higher, the earlier. Falls by one per learnt piece.
    pub score: f32,
    pub kind: Kind,
}

/// SentencePiece's types, by their numbers in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    Byte = 6,
}

/// The vocabulary, by id.
pub fn pieces(sizes: &Sizes) -> Vec<Piece> {
    learnt_from(&corpus(), sizes.space, sizes.n_piece)
}

/// The vocabulary of other sentences: `n_piece` pieces, of which the space is the one with id
/// `space`. There must be room for the single characters between it and the actions.
pub fn learnt_from(corpus: &[String], space: usize, n_piece: usize) -> Vec<Piece> {
    let mut fillers = FILLERS.map(String::from);
    let mut fill = |learnt: &mut Vec<String>, id: usize| {
        let missing = id - LEARNT - learnt.len();
        learnt.extend(fillers.by_ref().take(missing));
    };
    let mut learnt = merged(corpus, space - LEARNT);
    fill(&mut learnt, space);
    learnt.extend(alphabet(corpus).into_iter().map(String::from));
    fill(&mut learnt, n_piece - 256);
    learnt.extend(BRAILLE.map(String::from));

    let special = [("<unk>", Kind::Unknown), ("<s>", Kind::Control), ("</s>", Kind::Control)];
    let special = special.map(|(text, kind)| Piece { text: text.into(), score: 0.0, kind });
    let bytes =
        (0..256).map(|b| Piece { text: format!("<0x{b:02X}>"), score: 0.0, kind: Kind::Byte });
    let learnt = learnt.into_iter().enumerate();
    let learnt = learnt.map(|(i, text)| Piece { text, score: -(i as f32), kind: Kind::Normal });
    special.into_iter().chain(bytes).chain(learnt).collect()
}

/// Every verb with every object and place; each sixteenth sentence once in either prompt, or the
/// words of the prompts would be all that is learnt.
fn corpus() -> Vec<String> {
    let mut sentences = Vec::new();
    for verb in VERBS {
        for object in OBJECTS {
            sentences.extend(PLACES.map(|place| format!("{verb} {object} {place}")));
        }
    }
    let prompts: Vec<String> = sentences
        .iter()
        .step_by(16)
        .flat_map(|task| {
            let question = format!("What action should the robot take to {task}?");
            [
                format!("In: {question}\nOut:"),
                format!(
                    "A chat between a curious user and an artificial intelligence assistant. The \
                     assistant gives helpful, detailed, and polite answers to the user's \
                     questions. USER: {question} ASSISTANT:"
                ),
            ]
        })
        .collect();
    sentences.extend(prompts);
    sentences
}

/// Single characters: the space, the corpus's by falling count, the rest of printable ASCII.
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

/// Byte-pair encoding: joins the most frequent pair of neighbours, of equals the first, until there
/// are `n` pieces or every word is one.
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

/// The word with every `left`, `right` made one piece, from the left.
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

/// What may become one piece: letters with the space before them. All else stands alone, so
/// digits and punctuation stay single.
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
    use crate::Size;

    #[test]
    fn layout_is_llamas() {
        for size in [Size::Tiny, Size::Full] {
            let sizes = size.sizes();
            let pieces = pieces(&sizes);
            let texts: BTreeSet<&str> = pieces.iter().map(|p| p.text.as_str()).collect();
            let n = sizes.n_piece;
            assert_eq!((pieces.len(), texts.len()), (n, n), "no piece twice");
            assert_eq!(pieces[13].text, "<0x0A>");
            assert_eq!(pieces[259].text, "▁▁");
            assert_eq!(pieces[sizes.space].text, "▁");
            assert!(texts.contains("▁the") && texts.contains("▁eggplant"));
            let prompts = corpus().concat();
            for piece in &pieces[sizes.actions()] {
                assert!(!prompts.contains(&piece.text), "an action in a prompt: {}", piece.text);
            }
        }
    }

    #[test]
    fn joining_goes_from_the_left_and_does_not_overlap() {
        let word: Vec<String> = ["a", "a", "a", "b"].map(String::from).into();
        assert_eq!(join(&word, "a", "a"), ["aa", "a", "b"]);
    }
}
