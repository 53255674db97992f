//! Control steps of several robots at once, and of one: the only place where stages meet.
//!
//! Each robot's picture and prompt go through towers, projector and Llama by themselves: that is arithmetic, of which a
//! CPU has none to spare. (A GPU might take the pictures of all at once; this is the place.) The tokens after the first
//! read all weights of the Llama for a row of arithmetic each, so those of all robots run as the rows of one pass, as far
//! as the kernels give each row what it gets alone. Elsewhere, robots are served one after another.

use std::time::Instant;

use image::RgbImage;

use crate::action::argmax;
use crate::config::Config;
use crate::llama::Llama;
use crate::options::Decoding;
use crate::policy::{Action, Clock, OpenVla, Timing, Unconstrained, milliseconds};
use crate::session::Session;
use crate::speculative::{self, Choice, Decoder, Draft};
use crate::statistics::Dataset;
use crate::{Error, Result};

/// What one robot asks for, see [`OpenVla::act_in`].
#[derive(Debug)]
pub struct Request<'a> {
    /// What is remembered of the robot.
    pub session: &'a mut Session,
    /// What its camera sees.
    pub image: &'a RgbImage,
    /// What it is asked to do.
    pub instruction: &'a str,
    /// The data set whose units the motion is in; it may be left out where there is one.
    pub unnorm_key: Option<&'a str>,
}

/// A motion whose first token is known.
struct Motion {
    start: Instant,
    /// The name of the data set.
    key: String,
    dataset: Dataset,
    /// The prompt.
    ids: Vec<u32>,
    decoder: Decoder,
    timing: Timing,
}

/// A robot that waits for further tokens.
struct Waiting {
    /// Its place among the requests.
    at: usize,
    /// Where the Llama keeps what it has read of it.
    slot: usize,
    motion: Motion,
}

impl OpenVla {
    /// So many robots are served together: as many rows as a pass may have.
    pub const MAX_BATCH: usize = Llama::MAX_ROWS;

    /// Whether robots that are served together share passes, rather than take turns.
    pub fn shares_passes(&self) -> bool {
        self.network.shares_passes()
    }

    /// One step of several robots' sessions: of each what [`OpenVla::act_in`] gives, in less time than one after
    /// another where the tokens of several cost less than those of each. More than [`OpenVla::MAX_BATCH`] are served
    /// in groups.
    ///
    /// On a CPU, each robot's tokens are exactly those that it gets alone, whoever else is served: robots share passes
    /// where the kernels compute each row by itself (our own, of a quantized Llama, for prompts that have at most 480 rows with
    /// the motion's), and elsewhere they do not. On a GPU, a pass of several rows may round differently from a pass of one, and near-ties
    /// may be resolved differently, as with drafts.
    ///
    /// The first such step takes memory for the keys and values of all robots: some 160 MB each for openvla-7b.
    ///
    /// # Errors
    /// Of each request its own, as [`OpenVla::act_in`]; [`Error::SharedPass`] for all whose pass failed.
    pub fn act_all(&mut self, requests: &mut [Request<'_>]) -> Vec<Result<Action>> {
        let mut results: Vec<_> = requests.iter().map(|_| None).collect();
        self.act_each(requests, |at, result| results[at] = Some(result));
        results.into_iter().map(|result| result.expect("each request gets a result")).collect()
    }

    /// As [`OpenVla::act_all`]; calls `answer` with each request's place and result as soon as that is known.
    pub fn act_each(
        &mut self,
        requests: &mut [Request<'_>],
        mut answer: impl FnMut(usize, Result<Action>),
    ) {
        for (group, requests) in requests.chunks_mut(Self::MAX_BATCH).enumerate() {
            let first = group * Self::MAX_BATCH;
            self.act_together(requests, &mut |at, result| answer(first + at, result));
        }
    }

    fn act_together(
        &mut self,
        requests: &mut [Request<'_>],
        answer: &mut dyn FnMut(usize, Result<Action>),
    ) {
        let (start, n) = (Instant::now(), requests.len());
        if n > 1 {
            let n_patch = self.config.n_patch();
            let prompts = requests.iter().map(|request| self.prompt_ids(request.instruction));
            let n_rows: Vec<usize> = prompts.flatten().map(|ids| n_patch + ids.len()).collect();
            self.network.plan_slots(&n_rows);
        }
        let mut waiting = Vec::new();
        for (at, request) in requests.iter_mut().enumerate() {
            let has_company = !waiting.is_empty() || at + 1 < n;
            match self.read(request, has_company, start) {
                Ok((motion, Some(slot))) => waiting.push(Waiting { at, slot, motion }),
                Ok((motion, None)) => answer(at, Ok(self.action(motion, request.session))),
                Err(error) => answer(at, Err(error)),
            }
        }
        let decode = Instant::now();
        while !waiting.is_empty() {
            let room = Llama::MAX_ROWS / waiting.len();
            let rows = |of: &Waiting| (of.slot, of.motion.decoder.next_rows(room));
            let rows: Vec<_> = waiting.iter().map(rows).collect();
            let logits = match self.network.step_slots(&rows) {
                Ok(logits) => logits,
                Err(error) => {
                    let shared = || Error::SharedPass { why: error.to_string() };
                    return waiting.iter().for_each(|robot| answer(robot.at, Err(shared())));
                }
            };
            for (mut robot, logits) in std::mem::take(&mut waiting).into_iter().zip(logits) {
                let (at, motion) = (robot.at, &mut robot.motion);
                let choose =
                    |logits: &[f32], step| choose(&self.config, self.decoding, logits, step);
                match motion.decoder.take(&logits, choose) {
                    Ok(_) if motion.decoder.is_complete() => {
                        motion.timing.decode = milliseconds(decode.elapsed());
                        answer(at, Ok(self.action(robot.motion, requests[at].session)));
                    }
                    Ok(n_wrong) => {
                        self.network.forget_in(robot.slot, n_wrong);
                        waiting.push(robot);
                    }
                    Err(error) => answer(at, Err(error)),
                }
            }
        }
    }

    /// Everything up to the first token, and the others too unless the robot gets a slot, as it may if it has company.
    fn read(
        &mut self,
        request: &mut Request<'_>,
        has_company: bool,
        start: Instant,
    ) -> Result<(Motion, Option<usize>)> {
        let mut clock = Clock(Instant::now());
        let Request { session, image, instruction, unnorm_key } = request;
        let (key, dataset) = self.config.statistics.select(*unnorm_key)?;
        let (key, dataset) = (key.to_owned(), dataset.clone());
        session.begin(instruction, &key);

        let mut timing = Timing::default();
        let planes = self.config.preprocess.planes(image)?; // [224, 224, 6]
        timing.preprocess = clock.lap();
        let features = self.network.encode(&planes)?; // [2176, 256]
        timing.vision = clock.lap();
        let soft = self.network.project(&features)?; // [4096, 256]
        timing.projector = clock.lap();
        let ids = self.config.prompt.ids(&self.tokenizer, instruction)?; // BOS … 29871
        let n = dataset.action.n();
        let draft = self.draft(session, n);
        let drafts = speculative::drafts_of_prefill(&draft, self.config.n_patch() + ids.len());
        let mut sequence = self.network.prefill_drafted(&ids, &soft, drafts)?;
        timing.prefill = clock.lap();
        let choose = |logits: &[f32], step| choose(&self.config, self.decoding, logits, step);
        let mut decoder = Decoder::new(draft, n);
        let n_wrong = decoder.take(sequence.all_logits(), choose)?;
        sequence.forget(n_wrong);
        let slot = if has_company && !decoder.is_complete() { sequence.park()? } else { None };
        if slot.is_none() {
            decoder.complete(&mut sequence, choose)?; // one token per dimension
            timing.decode = clock.lap();
        }
        Ok((Motion { start, key, dataset, ids, decoder, timing }, slot))
    }

    /// Ends a step of the session.
    fn action(&self, motion: Motion, session: &mut Session) -> Action {
        let Motion { start, key, dataset, ids, decoder, mut timing } = motion;
        let decoded = decoder.into_decoded();
        timing.total = milliseconds(start.elapsed());
        let draft = session.end(decoded.tokens.clone(), decoded.passes, decoded.accepted);
        // ref: `predict_action` takes the last n ids of prompt and tokens together, whichever they
        // are.
        let all = [ids, decoded.tokens].concat();
        let tokens = all[all.len().saturating_sub(dataset.action.n())..].to_vec();
        let actions = self.config.actions;
        let normalized = actions.normalized(&tokens);
        let all_actions = decoded.unconstrained.iter().all(|id| actions.ids().contains(id));
        Action {
            action: dataset.action.unnormalize(&normalized),
            normalized,
            tokens,
            logits: decoded.logits,
            unnorm_key: key,
            unconstrained: Unconstrained { tokens: decoded.unconstrained, all_actions },
            draft,
            timing_ms: timing,
        }
    }

    /// What is drafted of `n` tokens. A resumed session may hold ids of another vocabulary.
    fn draft(&self, session: &Session, n: usize) -> Vec<u32> {
        let draft = match self.draft {
            Draft::Off => Vec::new(),
            Draft::Auto => speculative::draft(session.history(), self.token_cost, n),
        };
        let n_vocab = self.config.llama.n_vocab;
        draft.into_iter().take_while(|id| (*id as usize) < n_vocab).collect()
    }
}

/// Chooses the token of a step greedily.
fn choose(config: &Config, decoding: Decoding, logits: &[f32], step: usize) -> Result<Choice> {
    let unconstrained = argmax(logits, 0..config.llama.n_vocab as u32, step)?;
    let actions = logits[config.actions.rows()].to_vec();
    Ok(match decoding {
        Decoding::Reference => {
            let is_end = unconstrained == config.vocabulary.eos;
            Choice { token: unconstrained, unconstrained, actions, is_end }
        }
        Decoding::Actions => {
            let token = argmax(logits, config.actions.ids(), step)?;
            Choice { token, unconstrained, actions, is_end: false }
        }
    })
}
