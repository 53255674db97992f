//! What is remembered from one step to the next, and what the next motion is guessed to be.
//!
//! A robot that moves smoothly repeats itself, so the guess is the motion before. The Llama checks
//! many guessed tokens in one pass; which tokens are chosen does not depend on the guess.

use std::collections::VecDeque;

use serde::Serialize;

/// One robot at one task, step after step: see [`crate::OpenVla::act_in`].
///
/// It is no part of the model, so one model serves as many sessions as there are robots. It begins
/// anew when the instruction or the data set changes.
#[derive(Debug, Clone, Default)]
pub struct Session {
    /// The instruction, and the name of the data set.
    task: Option<(String, String)>,
    /// Tokens of the last motions, the latest last.
    history: VecDeque<Vec<u32>>,
    totals: Totals,
}

/// What drafts did for one motion.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Drafted {
    /// Passes of the Llama, of which the prefill is one. Without drafts, one for each token.
    pub passes: usize,
    /// Whether each token was drafted and right, but for the last, which needs no draft.
    pub accepted: Vec<bool>,
    /// The session's motions, this one among them.
    pub session: Totals,
}

/// What drafts did for a session.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Totals {
    /// Motions.
    pub actions: usize,
    /// Passes of the Llama for one motion, on average.
    pub passes_per_action: f64,
    /// Passes of the Llama.
    pub passes: usize,
    /// Of how many motions each token was drafted and right.
    pub accepted: Vec<usize>,
}

impl Session {
    /// Motions that are looked back at to see whether drafts pay.
    const WINDOW: usize = 17;

    /// A session that goes on after `motions`, the latest last: [`crate::Action::tokens`] of each.
    pub fn with_history(motions: impl IntoIterator<Item = Vec<u32>>) -> Self {
        let mut session = Self::default();
        motions.into_iter().for_each(|tokens| session.remember(tokens));
        session
    }

    /// Forgets everything if this is another task than before.
    pub(crate) fn begin(&mut self, instruction: &str, key: &str) {
        let task = Some((instruction.to_owned(), key.to_owned()));
        if self.task.is_some() && self.task != task {
            *self = Self::default();
        }
        self.task = task;
    }

    /// The tokens that the next motion is guessed to have. None after motions for which guessing
    /// did not pay, where a row more costs `row_cost` of a pass.
    pub(crate) fn guess(&self, row_cost: f64) -> Vec<u32> {
        let (mut saved, mut rows) = (0, 0);
        for (guess, tokens) in self.history.iter().zip(self.history.iter().skip(1)) {
            let n = tokens.len().saturating_sub(1); // the last needs no draft
            rows += n;
            for (i, token) in tokens[..n].iter().enumerate() {
                match guess.get(i) == Some(token) {
                    true => saved += 1,
                    false => rows += n - 1 - i, // drafted again
                }
            }
        }
        let pays = f64::from(saved) >= row_cost * rows as f64;
        self.history.back().filter(|_| pays).cloned().unwrap_or_default()
    }

    /// Ends a motion, which took so many passes.
    pub(crate) fn end(&mut self, tokens: Vec<u32>, passes: usize, accepted: Vec<bool>) -> Drafted {
        self.remember(tokens);
        let totals = &mut self.totals;
        totals.actions += 1;
        totals.passes += passes;
        totals.passes_per_action = totals.passes as f64 / totals.actions as f64;
        totals.accepted.resize(totals.accepted.len().max(accepted.len()), 0);
        totals.accepted.iter_mut().zip(&accepted).for_each(|(n, hit)| *n += usize::from(*hit));
        Drafted { passes, accepted, session: totals.clone() }
    }

    fn remember(&mut self, tokens: Vec<u32>) {
        self.history.push_back(tokens);
        if self.history.len() > Self::WINDOW {
            self.history.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STILL: [u32; 7] = [1; 7];

    fn moving(i: u32) -> Vec<u32> {
        vec![i, i, i, i, i, i, 1]
    }

    #[test]
    fn the_guess_is_the_motion_before() {
        assert!(Session::default().guess(0.1).is_empty());
        assert_eq!(Session::with_history([moving(3), moving(3)]).guess(0.1), moving(3));
        assert_eq!(
            Session::with_history([moving(3)]).guess(9.0),
            moving(3),
            "nothing speaks against"
        );
    }

    /// Six rows save six passes where all is repeated; where nothing is, 21 save none.
    #[test]
    fn guessing_ends_where_it_does_not_pay_and_begins_again() {
        let mut session = Session::with_history([moving(0), moving(0)]);
        assert!(session.guess(1.01).is_empty() && !session.guess(0.99).is_empty());
        let mut guessed = |tokens: Vec<u32>| {
            session.end(tokens, 1, vec![]);
            !session.guess(0.2).is_empty()
        };
        let moves: Vec<bool> = (1..=20).map(|i| guessed(moving(i))).collect();
        assert_eq!(moves.iter().position(|drafts| !drafts), Some(1), "6 of 6 + 21 rows, 6 of 48");
        assert!(moves[1..].iter().all(|drafts| !drafts));
        let stills: Vec<bool> = (0..20).map(|_| guessed(STILL.to_vec())).collect();
        let first = stills.iter().position(|drafts| *drafts).unwrap();
        assert!(
            stills[first..].iter().all(|drafts| *drafts) && (4..16).contains(&first),
            "{first}"
        );
    }

    #[test]
    fn another_task_begins_anew() {
        let mut session = Session::default();
        session.begin("wave", "bridge");
        session.end(STILL.to_vec(), 7, vec![false; 6]);
        session.begin("wave", "bridge");
        let drafted = session.end(STILL.to_vec(), 1, vec![true; 6]);
        let totals = Totals { actions: 2, passes: 8, passes_per_action: 4.0, accepted: vec![1; 6] };
        assert_eq!(drafted.session, totals);
        for (instruction, key) in [("wave again", "bridge"), ("wave", "fractal")] {
            let mut session = session.clone();
            session.begin(instruction, key);
            assert!(session.guess(0.0).is_empty());
            assert_eq!(session.totals, Totals::default());
        }
        let mut resumed = Session::with_history([STILL.to_vec()]);
        resumed.begin("wave", "bridge");
        assert_eq!(resumed.guess(0.0), STILL, "the first task is whatever comes first");
    }
}
