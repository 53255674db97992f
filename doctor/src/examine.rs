//! An episode under every hypothesis: how likely the demonstrated actions are at each moment.

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use openvla::{Policy, Scale};

use crate::action::Scaled;
use crate::episode::{Episode, Seen};
use crate::hypothesis::{Change, Hypothesis, Setting, all};
use crate::judge::{Claim, Judge, Judged};
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
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            unnorm_key: None,
            statistics: Vec::new(),
            instruction: None,
            max_moments: 24,
            quick: false,
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
    let is_picture = |trial: &&mut Trial| matches!(trial.hypothesis.change, Change::Picture(_));
    let n_picture = evidence.trials.iter_mut().filter(is_picture).count();
    progress.set_length((moments.len() * (1 + n_picture)) as u64);
    let chunk = config.oft.as_ref().map_or(1, |oft| oft.chunk);
    let mut judge = Judge::new(policy, key, scale);
    for i in moments {
        let seen = episode.seen(i)?;
        // All claims about the picture as it is share its features and the prompt's rows.
        let asked = |instruction: &str, change: &Change| {
            claim(episode, i, chunk, instruction, change, scale)
        };
        let given = asked(&instruction, &Change::Lag(0)).expect("the moment is in the episode");
        let mut claims = vec![given.clone()];
        let claimed: Vec<bool> = evidence
            .trials
            .iter()
            .map(|trial| match &trial.hypothesis.change {
                Change::Picture(_) => false,
                change => asked(&instruction, change).map(|claim| claims.push(claim)).is_some(),
            })
            .collect();
        let mut judged = judge.judge(&seen, &claims)?.into_iter();
        evidence.given.push(judged.next().expect("the first claim"));
        progress.inc(1);
        for (trial, claimed) in evidence.trials.iter_mut().zip(claimed) {
            let log_likelihood = match trial.hypothesis.change {
                Change::Picture(change) => {
                    let judged =
                        judge.judge(&changed(&seen, change), std::slice::from_ref(&given))?;
                    progress.inc(1);
                    judged.first().map(|judged| judged.log_likelihood)
                }
                _ if claimed => judged.next().map(|judged| judged.log_likelihood),
                _ => None,
            };
            trial.log_likelihoods.push(log_likelihood);
        }
    }
    Ok(evidence)
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
