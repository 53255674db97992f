//! What is remembered of a robot from one step to the next.

use std::collections::VecDeque;

use serde::Serialize;

/// One robot at one task, step after step: see [`crate::OpenVla::act_in`].
///
/// It is not part of the model, so one model serves as many sessions as there are robots. It begins
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
    /// Motions that are looked back at to see whether drafts pay: 16 pairs.
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

    /// Tokens of the last motions, the latest last.
    pub(crate) fn history(&self) -> &VecDeque<Vec<u32>> {
        &self.history
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
            assert!(session.history().is_empty());
            assert_eq!(session.totals, Totals::default());
        }
        let mut resumed = Session::with_history([STILL.to_vec()]);
        resumed.begin("wave", "bridge");
        assert_eq!(
            resumed.history().back().unwrap(),
            &STILL,
            "the first task is whatever comes first"
        );
    }
}
