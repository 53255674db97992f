//! An episode under every hypothesis: how likely the demonstrated actions are at each moment.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use openvla::{Policy, Scale};

use crate::action::Scaled;
use crate::episode::{Episode, Seen};
use crate::hypothesis::{Change, Hypothesis, Setting, all};
use crate::judge::{Claim, Judge, Judged};
use crate::judgments::{Judgments, Moment};
use crate::picture::{Bars, PictureChange, blockiness};

/// How thoroughly an episode is looked at.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The data set whose units the actions are in; may be left out where the model knows one.
    pub unnorm_key: Option<String>,
    /// Other data sets' statistics to try, beside those of the model's file.
    pub statistics: Vec<(String, Scale)>,
    /// What was asked for, if the episode does not say, or something else is to be taken.
    pub instruction: Option<String>,
    /// Moments of the episode that are judged.
    pub max_moments: usize,
    /// Whether only the likeliest hypotheses are tried.
    pub quick: bool,
    /// Where judgments are kept, and taken from if they are there.
    pub judgments: Option<PathBuf>,
    /// In any form, the model and how it computes: others' judgments are not taken.
    pub model: String,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            unnorm_key: None,
            statistics: Vec::new(),
            instruction: None,
            max_moments: 24,
            quick: false,
            judgments: None,
            model: String::new(),
        }
    }
}

/// A hypothesis, and how likely the actions are under it.
#[derive(Debug, Clone)]
pub struct Trial {
    /// What may be wrong.
    pub hypothesis: Hypothesis,
    /// The log-likelihood at each moment, in nats; none where the action is beyond the episode's ends.
    pub log_likelihoods: Vec<Option<f64>>,
}

/// What a model says to an episode.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// What was asked for.
    pub instruction: String,
    /// The data set whose statistics were taken.
    pub key: String,
    /// The moments that were judged, by their index.
    pub moments: Vec<usize>,
    /// The input as it is.
    pub given: Vec<Judged>,
    /// The hypotheses.
    pub trials: Vec<Trial>,
    /// Numbers of an action that count.
    pub n_counted: usize,
    /// Whether the actions are what a model did, which says nothing about its input.
    pub by_model: bool,
    /// The share of pictures in which blocks of JPEG show.
    pub blocky: f64,
}

/// Blocks of JPEG show from here on.
pub const BLOCKY: f64 = 1.3;

/// Judges an episode under every hypothesis.
///
/// # Errors
/// If the episode is not one for this model, or the policy fails.
pub fn examine(
    policy: &mut Policy,
    episode: &Episode,
    plan: &Plan,
    progress: &ProgressBar,
) -> Result<Evidence> {
    let config = policy.config().clone();
    let (key, dataset) = config.statistics.select(plan.unnorm_key.as_deref())?;
    let scale = &dataset.action;
    let (found, wanted) = (episode.actions[0].len(), scale.n());
    ensure!(
        found == wanted,
        "the episode's actions have {found} numbers; those of `{key}` have {wanted}"
    );
    let instruction = plan.instruction.clone().or_else(|| episode.instruction.clone());
    let instruction = instruction.context(
        "what was asked for is unknown: give the instruction, or write it in instruction.txt",
    )?;
    let moments = episode.moments(plan.max_moments);
    let looks = look(episode, &moments)?;
    let own = config.statistics.datasets().iter().map(|(name, d)| (name.clone(), d.action.clone()));
    let setting = Setting {
        config: &config,
        key,
        others: own.chain(plan.statistics.iter().cloned()).collect(),
        instruction: &instruction,
        actions: &episode.actions,
        has_bars: looks.has_bars,
        is_oblong: looks.is_oblong,
        has_blocks: looks.blocky > 0.5,
        quick: plan.quick,
    };
    let hypotheses = all(&setting, scale);
    let mut evidence = Evidence {
        instruction: instruction.clone(),
        key: key.to_owned(),
        moments: moments.clone(),
        given: Vec::new(),
        trials: hypotheses
            .into_iter()
            .map(|hypothesis| Trial { hypothesis, log_likelihoods: Vec::new() })
            .collect(),
        n_counted: (0..scale.n())
            .filter(|i| !scale.mask[*i] || scale.low[*i] < scale.high[*i])
            .count(),
        by_model: episode.by_model,
        blocky: looks.blocky,
    };
    let trials = &mut evidence.trials;
    let mut judgments = match &plan.judgments {
        Some(path) => {
            let names: Vec<&str> = trials.iter().map(|t| t.hypothesis.name.as_str()).collect();
            let examined = format!(
                "{} {key} {scale:?} {:?} {instruction} {names:?} {:?}",
                plan.model, plan.statistics, episode.actions
            );
            Judgments::open(path, &examined)?
        }
        None => Judgments::default(),
    };
    let is_picture = |trial: &&Trial| matches!(trial.hypothesis.change, Change::Picture(_));
    let pictures = 1 + trials.iter().filter(is_picture).count() as u64;
    progress.set_length(moments.len() as u64 * pictures);
    let chunk = config.oft.as_ref().map_or(1, |oft| oft.chunk);
    let mut judge = Judge::new(policy, key, scale);
    for index in moments {
        let seen = episode.seen(index)?;
        let hash = seen.hash();
        let moment = match judgments.of(index, &hash) {
            Some(moment) => {
                progress.inc(pictures);
                moment.clone()
            }
            None => {
                let asked = |instruction: &str, change: &Change| {
                    claim(episode, index, chunk, instruction, change, scale)
                };
                let (given, log_likelihoods) =
                    judge_moment(&mut judge, &seen, &instruction, trials, asked, progress)?;
                let moment = Moment { index, seen: hash, given, log_likelihoods };
                judgments.keep(moment.clone())?;
                moment
            }
        };
        ensure!(
            moment.log_likelihoods.len() == trials.len(),
            "moment {index} was judged under other hypotheses: delete the file of judgments"
        );
        evidence.given.push(moment.given);
        for (trial, log_likelihood) in trials.iter_mut().zip(moment.log_likelihoods) {
            trial.log_likelihoods.push(log_likelihood);
        }
    }
    Ok(evidence)
}

/// One moment as it is, and under each hypothesis. `asked` gives what a change makes of the claim that the recorded
/// actions were done.
fn judge_moment(
    judge: &mut Judge<'_>,
    seen: &Seen,
    instruction: &str,
    trials: &[Trial],
    asked: impl Fn(&str, &Change) -> Option<Claim>,
    progress: &ProgressBar,
) -> Result<(Judged, Vec<Option<f64>>)> {
    // All claims about the picture as it is share its features and the prompt's rows.
    let given = asked(instruction, &Change::Lag(0)).expect("the moment is in the episode");
    let mut claims = vec![given.clone()];
    let claimed: Vec<bool> = trials
        .iter()
        .map(|trial| match &trial.hypothesis.change {
            Change::Picture(_) => false,
            change => asked(instruction, change).map(|claim| claims.push(claim)).is_some(),
        })
        .collect();
    let mut judged = judge.judge(seen, &claims)?.into_iter();
    let as_it_is = judged.next().expect("the first claim");
    progress.inc(1);
    let mut log_likelihoods = Vec::with_capacity(trials.len());
    for (trial, claimed) in trials.iter().zip(claimed) {
        let judged = match trial.hypothesis.change {
            Change::Picture(change) => {
                progress.inc(1);
                let of_picture = judge.judge(&changed(seen, change), std::slice::from_ref(&given));
                of_picture?.into_iter().next()
            }
            _ if claimed => judged.next(),
            _ => None,
        };
        log_likelihoods.push(judged.map(|judged| judged.log_likelihood));
    }
    Ok((as_it_is, log_likelihoods))
}

/// What a change makes of the claim that the recorded actions were done; none where they are not known.
fn claim(
    episode: &Episode,
    i: usize,
    chunk: usize,
    instruction: &str,
    change: &Change,
    scale: &Scale,
) -> Option<Claim> {
    let lag = if let Change::Lag(lag) = change { *lag } else { 0 };
    let first = usize::try_from(i64::try_from(i).ok()? + i64::from(lag)).ok()?;
    let actions = episode.actions.get(first..)?.iter().take(chunk);
    let scaled = actions.map(|action| match change {
        Change::Action(change) => change.apply(action, scale),
        _ => Scaled::new(action, scale),
    });
    let scaled: Vec<Scaled> = scaled.collect();
    let n_outside =
        scaled.iter().map(|s| s.n_outside).sum::<usize>() as f64 / scaled.len().max(1) as f64;
    let instruction =
        if let Change::Instruction(text) = change { text } else { instruction }.to_owned();
    let actions: Vec<_> = scaled.into_iter().map(|scaled| scaled.normalized).collect();
    (!actions.is_empty()).then_some(Claim { instruction, actions, n_outside })
}

/// What a change makes of the pictures of all cameras.
fn changed(seen: &Seen, change: PictureChange) -> Seen {
    let images = seen.images.iter().map(|image| change.apply(image)).collect();
    Seen { images, state: seen.state.clone() }
}

/// What most pictures of the third-person camera look like.
struct Looks {
    has_bars: bool,
    is_oblong: bool,
    /// The share in which blocks of JPEG show.
    blocky: f64,
}

/// Pictures that are looked at for it.
const MAX_LOOKS: usize = 8;

fn look(episode: &Episode, moments: &[usize]) -> Result<Looks> {
    let every = moments.len().div_ceil(MAX_LOOKS);
    let (mut n, mut bars, mut oblong, mut blocks) = (0_usize, 0, 0, 0_usize);
    for i in moments.iter().step_by(every) {
        let image = &episode.seen(*i)?.images[0];
        n += 1;
        bars += usize::from(Bars::of(image).are_there());
        oblong += usize::from(image.width() != image.height());
        blocks += usize::from(blockiness(image) > BLOCKY);
    }
    let most = |count: usize| 2 * count > n;
    let blocky = blocks as f64 / n.max(1) as f64;
    Ok(Looks { has_bars: most(bars), is_oblong: most(oblong), blocky })
}
