//! Speculative decoding: tokens of the session's last motion are drafted for the next one, and the Llama
//! verifies several in one forward pass.
//!
//! A robot that moves smoothly repeats itself, so the draft is the motion before. Decoding stays greedy: each
//! token is the best one after those before it, whatever the draft. Because a pass of several tokens may round
//! differently from one of a single token, near-ties may be resolved differently.

use std::collections::VecDeque;
use std::str::FromStr;

use crate::Result;
use crate::llama::Llama;
use crate::network::Sequence;

/// Whether tokens are drafted, for the Llama to verify several in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Draft {
    /// One pass for each token.
    #[default]
    Off,
    /// The tokens of the session's motion before, as long as that pays.
    Auto,
}

impl FromStr for Draft {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            _ => Err("off or auto is wanted".into()),
        }
    }
}

/// What one more token costs in a forward pass, relative to a pass of one token: see `benches/SPEED.md`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TokenCost(pub f64);

impl TokenCost {
    /// With ggml's kernels on a CPU.
    pub const GGML: Self = Self(0.6);
    /// With our own kernels.
    pub const OWN: Self = Self(0.1);
    /// On a GPU, where eight tokens should cost a tenth more than one. Not yet measured.
    pub const GPU: Self = Self(0.015);
}

/// The draft of a motion of `n` tokens after those of `history`, the latest last. It lacks the last token,
/// after which nothing is computed, and is empty after motions for which drafting did not pay.
pub(crate) fn draft(history: &VecDeque<Vec<u32>>, cost: TokenCost, n: usize) -> Vec<u32> {
    let (mut saved, mut drafted) = (0, 0);
    for (draft, tokens) in history.iter().zip(history.iter().skip(1)) {
        let n = tokens.len().saturating_sub(1); // the last needs no draft
        drafted += n;
        for (i, token) in tokens[..n].iter().enumerate() {
            if draft.get(i) == Some(token) {
                saved += 1;
            } else {
                drafted += n - 1 - i; // the rest is drafted again
            }
        }
    }
    let pays = f64::from(saved) >= cost.0 * drafted as f64;
    let last = history.back().filter(|_| pays).cloned().unwrap_or_default();
    last.into_iter().take(n - 1).collect()
}

/// The drafts that go with a prompt of `n_row` rows, nearly for free: ggml's CUDA kernels compute whole tiles,
/// 288 rows in the time of 257, and 336 in that of 289.
pub(crate) fn drafts_of_prefill(draft: &[u32], n_row: usize) -> &[u32] {
    let room = n_row.next_multiple_of(48) - n_row;
    drafts_from(draft, 0, room.min(Llama::MAX_ROWS - 1))
}

/// The drafts of the tokens from `at` on, at most `room` of them.
fn drafts_from(draft: &[u32], at: usize, room: usize) -> &[u32] {
    let rest = draft.get(at..).unwrap_or_default();
    &rest[..rest.len().min(room)]
}

/// A token that was chosen.
pub(crate) struct Choice {
    pub token: u32,
    /// What all ids together would have chosen.
    pub unconstrained: u32,
    /// The logits of the action ids, `[n_bin]`.
    pub actions: Vec<f32>,
    /// Whether it ends the motion.
    pub is_end: bool,
}

/// The tokens of a motion.
#[derive(Debug, Default)]
pub(crate) struct Decoded {
    pub tokens: Vec<u32>,
    pub unconstrained: Vec<u32>,
    /// The logits of the action ids at each, `[n_bin]`.
    pub logits: Vec<Vec<f32>>,
    /// Forward passes, of which the prefill is one.
    pub passes: usize,
    /// Whether each token but the last was drafted and right.
    pub accepted: Vec<bool>,
}

/// A motion of up to `n` tokens that is being decoded, pass by pass.
pub(crate) struct Decoder {
    draft: Vec<u32>,
    n: usize,
    decoded: Decoded,
    is_complete: bool,
}

impl Decoder {
    pub fn new(draft: Vec<u32>, n: usize) -> Self {
        Self { draft, n, decoded: Decoded::default(), is_complete: false }
    }

    /// Takes the logits after each row of a pass, `[n_vocab]`: after the prompt or a token, and after each draft
    /// that followed it. `choose` gives the token after some logits, and is told how many there are before it. The
    /// pass gives the token after each of its rows, up to the first that was drafted wrongly. Returns how many
    /// rows are to be forgotten, from that one on.
    pub fn take(
        &mut self,
        logits: &[Vec<f32>],
        choose: impl Fn(&[f32], usize) -> Result<Choice>,
    ) -> Result<usize> {
        let (decoded, n_draft) = (&mut self.decoded, logits.len() - 1);
        decoded.passes += 1;
        for (i, logits) in logits.iter().enumerate() {
            let at = decoded.tokens.len();
            let Choice { token, unconstrained, actions, is_end } = choose(logits, at)?;
            decoded.unconstrained.push(unconstrained);
            decoded.logits.push(actions);
            decoded.tokens.push(token);
            if at + 1 == self.n || is_end {
                self.is_complete = true;
                break;
            }
            let is_right = i < n_draft && self.draft[at] == token;
            decoded.accepted.push(is_right);
            if !is_right {
                return Ok(n_draft - i);
            }
        }
        Ok(0)
    }

    /// Whether the last pass gave the last token.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The rows of the next pass, after those that were right: the last token, and drafts after it; at most `room`.
    pub fn next_rows(&self, room: usize) -> Vec<u32> {
        let at = self.decoded.tokens.len();
        let drafts = drafts_from(&self.draft, at, room - 1);
        [&self.decoded.tokens[at - 1..], drafts].concat()
    }

    /// Decodes the rest after a sequence that has what was taken so far.
    pub fn complete(
        &mut self,
        sequence: &mut Sequence<'_>,
        choose: impl Fn(&[f32], usize) -> Result<Choice>,
    ) -> Result<()> {
        while !self.is_complete {
            let logits = sequence.step_drafted(&self.next_rows(Llama::MAX_ROWS))?;
            let n_wrong = self.take(logits, &choose)?;
            sequence.forget(n_wrong);
        }
        Ok(())
    }

    pub fn into_decoded(self) -> Decoded {
        self.decoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Session;

    fn moving(i: u32) -> Vec<u32> {
        vec![i, i, i, i, i, i, 1]
    }

    fn draft_of(session: &Session, cost: f64) -> Vec<u32> {
        draft(session.history(), TokenCost(cost), 7)
    }

    #[test]
    fn the_draft_is_the_motion_before() {
        assert!(draft_of(&Session::default(), 0.1).is_empty());
        let twice = Session::with_history([moving(3), moving(3)]);
        assert_eq!(draft_of(&twice, 0.1), moving(3)[..6]);
        let once = Session::with_history([moving(3)]);
        assert_eq!(draft_of(&once, 9.0), moving(3)[..6], "nothing speaks against it");
        assert_eq!(draft(once.history(), TokenCost(0.1), 3), [3, 3]);
    }

    /// Six tokens save six passes where all is repeated; where nothing is, 21 save none.
    #[test]
    fn drafting_ends_where_it_does_not_pay_and_begins_again() {
        let mut session = Session::with_history([moving(0), moving(0)]);
        assert!(draft_of(&session, 1.01).is_empty() && !draft_of(&session, 0.99).is_empty());
        let mut is_drafted = |tokens: Vec<u32>| {
            session.end(tokens, 1, vec![]);
            !draft_of(&session, 0.2).is_empty()
        };
        let moves: Vec<bool> = (1..=20).map(|i| is_drafted(moving(i))).collect();
        assert_eq!(moves.iter().position(|drafts| !drafts), Some(1), "6 of 6 + 21, 6 of 48");
        assert!(moves[1..].iter().all(|drafts| !drafts));
        let stills: Vec<bool> = (0..20).map(|_| is_drafted(vec![1; 7])).collect();
        let first = stills.iter().position(|drafts| *drafts).unwrap();
        assert!(
            stills[first..].iter().all(|drafts| *drafts) && (4..16).contains(&first),
            "{first}"
        );
    }

    #[test]
    fn drafts_of_a_prefill_fill_the_tile() {
        let draft: Vec<u32> = (0..7).collect();
        for (n_row, n) in [(275, 7), (283, 5), (288, 0), (287, 1), (289, 7)] {
            assert_eq!(drafts_of_prefill(&draft, n_row), &draft[..n], "{n_row} rows");
        }
        assert!(drafts_of_prefill(&[], 275).is_empty());
    }
}
