//! How likely given tokens are after a picture and an instruction: teacher forcing, in as few passes as possible.
//!
//! The picture goes through the towers once, and the first statement's prompt through the Llama once. All statements
//! about that picture, whatever they say was asked or done, are continuations of this prompt, and run as the rows of
//! one pass, or of several where there is no room: what they share with each other is one row.

use image::RgbImage;
use serde::Serialize;

use crate::action::{ActionSpace, argmax};
use crate::llama::Tree;
use crate::policy::OpenVla;
use crate::{Error, Result};

/// What could have been asked for and done at a picture.
#[derive(Debug, Clone, Copy)]
pub struct Statement<'a> {
    /// What was asked for.
    pub instruction: &'a str,
    /// The action's ids, such as [`crate::ActionSpace::id`] gives.
    pub tokens: &'a [u32],
}

/// How one token fares among all that could be in its place, after those before it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TokenScore {
    /// Natural logarithm of its probability among all ids.
    pub log_likelihood: f64,
    /// What this logarithm is on average, negated, for tokens that are drawn from the model.
    pub entropy: f64,
    /// The probability that the token is an action at all.
    pub actions: f64,
    /// The most probable action id.
    pub best: u32,
}

/// Nodes of a tree: what a pass may have, unless one statement alone has more. Logits of so many rows are a few
/// megabytes.
const MAX_NODES: usize = 64;

impl OpenVla {
    /// The score of every token of some statements about a picture. They cost the least if they are of one instruction
    /// and their tokens begin alike. Where a pass of many rows rounds differently from a pass of one, so do scores.
    ///
    /// # Errors
    /// [`Error::Image`], [`Error::InstructionTooLong`], [`Error::NotFinite`], or [`Error::Kernels`] if the device has
    /// no room or fails.
    ///
    /// # Panics
    /// If a token is not a row of the embedding.
    pub fn score(
        &mut self,
        image: &RgbImage,
        statements: &[Statement<'_>],
    ) -> Result<Vec<Vec<TokenScore>>> {
        let Some(first) = statements.first() else { return Ok(Vec::new()) };
        let prompt = self.prompt_ids(first.instruction)?; // BOS … 29871
        let continuation = |statement: &Statement<'_>| {
            let ids = self.prompt_ids(statement.instruction)?;
            Ok(Continuation::new(&prompt, ids, statement.tokens))
        };
        let all: Vec<Continuation> = statements.iter().map(continuation).collect::<Result<_>>()?;
        let (actions, n_patch) = (self.config().actions, self.config().n_patch());
        let longest = all.iter().map(|c| c.ids.len()).max().unwrap_or(0);
        self.config().llama.check_rows(n_patch + longest)?;
        let max_nodes = MAX_NODES.max(longest);
        let planes = self.config().preprocess.planes(image)?; // [224, 224, 6]
        let network = self.network();
        network.reserve(max_nodes);
        let features = network.encode(&planes)?; // [2176, 256]
        let soft = network.project(&features)?; // [4096, 256]
        let mut sequence = network.prefill(&prompt, &soft)?;
        let after_prompt = Distribution::new(sequence.logits().to_vec(), actions);
        let mut scores = Vec::with_capacity(all.len());
        while scores.len() < all.len() {
            let (mut tree, mut nodes) = (Tree::default(), Vec::new());
            for c in &all[scores.len()..] {
                if tree.nodes().len() + tree.added(c.shared, &c.ids) > max_nodes {
                    break;
                }
                nodes.push(tree.insert(c.shared, &c.ids));
            }
            let logits = if tree.nodes().is_empty() { vec![] } else { sequence.branch(&tree)? };
            let after: Vec<_> =
                logits.into_iter().map(|logits| Distribution::new(logits, actions)).collect();
            let statements = statements[scores.len()..].iter().zip(&all[scores.len()..]);
            let scored = statements.zip(&nodes).map(|((statement, c), nodes)| {
                let before = (c.shared == c.n_prompt).then_some(&after_prompt);
                let skipped = (c.n_prompt - 1).saturating_sub(c.shared); // words of another instruction
                let after = before.into_iter().chain(nodes[skipped..].iter().map(|i| &after[*i]));
                let tokens = statement.tokens.iter().zip(after).enumerate();
                tokens.map(|(step, (token, after))| after.score(*token, step)).collect()
            });
            let scored: Vec<Vec<TokenScore>> = scored.collect::<Result<_>>()?;
            scores.extend(scored);
        }
        Ok(scores)
    }
}

/// A statement as what follows BOS and picture.
struct Continuation {
    /// The prompt's ids and its tokens, but for the last one, after which nothing is asked.
    ids: Vec<u32>,
    n_prompt: usize,
    /// How many ids it begins with that the prompt which is read anyway begins with.
    shared: usize,
}

impl Continuation {
    fn new(read: &[u32], prompt: Vec<u32>, tokens: &[u32]) -> Self {
        let n_prompt = prompt.len();
        let shared = if prompt == read {
            n_prompt
        } else {
            // The last id's row has logits where the prompt was read alone, and is a node here.
            let alike = read.iter().zip(&prompt[..n_prompt - 1]).take_while(|(a, b)| a == b);
            alike.count()
        };
        let ids = [&prompt, &tokens[..tokens.len().saturating_sub(1)]].concat();
        Self { ids, n_prompt, shared }
    }
}

/// What may come after a row.
struct Distribution {
    /// `[n_vocab]`
    logits: Vec<f32>,
    /// The logarithm of the sum of their exponentials.
    log_sum: f64,
    entropy: f64,
    actions: f64,
    best: u32,
}

impl Distribution {
    fn new(logits: Vec<f32>, space: ActionSpace) -> Self {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let share = |logit: &f32| f64::from(logit - most).exp();
        let sum: f64 = logits.iter().map(share).sum();
        let log_sum = f64::from(most) + sum.ln();
        let entropy = log_sum - logits.iter().map(|x| share(x) / sum * f64::from(*x)).sum::<f64>();
        let actions = &logits[space.rows()];
        let best = argmax(&logits, space.ids(), 0).unwrap_or(space.ids().start);
        let actions = actions.iter().map(share).sum::<f64>() / sum;
        Self { logits, log_sum, entropy, actions, best }
    }

    /// # Errors
    /// [`Error::NotFinite`] names the step.
    fn score(&self, token: u32, step: usize) -> Result<TokenScore> {
        let Self { log_sum, entropy, actions, best, .. } = *self;
        if !entropy.is_finite() {
            return Err(Error::NotFinite { step });
        }
        let log_likelihood = f64::from(self.logits[token as usize]) - log_sum;
        Ok(TokenScore { log_likelihood, entropy, actions, best })
    }
}
