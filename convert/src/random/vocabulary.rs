//! The vocabulary of random checkpoints, learned from sentences composed here.

use openvla_vocabulary::{Piece, learn};

use super::size::Sizes;

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

/// The pieces, by id.
pub fn pieces(sizes: &Sizes) -> Vec<Piece> {
    learn(&corpus(), sizes.space, sizes.n_piece)
}

/// Every verb with every object and place; every sixteenth sentence in both prompts too. With all of
/// them, hardly more than the words of the prompts would be learned.
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::random::Size;

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
}
