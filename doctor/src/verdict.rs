//! What the evidence says: one cause, or that there is none, or that nothing can be said.
//!
//! Likelihoods are compared moment by moment, which takes out what makes a moment easy or hard. How sure a cause is,
//! is how often it comes first when the moments are drawn again, with replacement.

use serde::Serialize;

use crate::examine::Evidence;
use crate::hypothesis::Cause;

/// A cause, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// What is wrong.
    pub cause: Cause,
    /// How often it came first, of all times that moments were drawn.
    pub confidence: f64,
    /// Why, in numbers.
    pub evidence: String,
    /// What to do.
    pub fix: Option<String>,
}

/// How a hypothesis fares.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What kind of reason it is.
    pub cause: Cause,
    /// In a few words.
    pub name: String,
    /// The mean log-likelihood of an action, in nats.
    pub log_likelihood: f64,
    /// How much larger it is than that of the input as it is, at the same moments.
    pub gain: f64,
    /// The standard error of that.
    pub gain_error: f64,
    /// Moments that have both.
    pub n: usize,
    /// How often it came first.
    pub first: f64,
    /// What to do if it is so.
    pub fix: String,
}

impl Finding {
    fn label(&self) -> String {
        format!("{} ({})", self.cause.name(), self.name)
    }
}

/// How likely the demonstration is without any change.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Level {
    /// The mean log-likelihood of an action, in nats.
    pub log_likelihood: f64,
    /// What it would be on average of actions that the model draws itself.
    pub expected: f64,
    /// The difference, for each number of an action.
    pub deficit_per_number: f64,
}

/// Nats that a hypothesis must gain at a moment, on average, to be more than chance.
pub const LEAST_GAIN: f64 = 0.5;
/// How often a cause must come first.
pub const SURE: f64 = 0.9;
/// Nats that a number of an action may be less likely than what the model draws, on average: more is no demonstration
/// that it would have followed.
pub const MOST_DEFICIT: f64 = 1.0;
/// Moments that are needed.
pub const LEAST_MOMENTS: usize = 3;
/// Times that moments are drawn again.
const DRAWS: usize = 1000;

/// The level, the hypotheses from best to worst, and the verdict.
pub fn decide(evidence: &Evidence) -> (Level, Vec<Finding>, Verdict) {
    let level = Level::of(evidence);
    let (firsts, none_first) = draw(evidence);
    let mut findings: Vec<Finding> = evidence
        .trials
        .iter()
        .zip(&firsts)
        .map(|(trial, first)| {
            let gains = gains(evidence, &trial.log_likelihoods);
            let there = || trial.log_likelihoods.iter().flatten();
            let (gain, gain_error) = mean_and_error(&gains);
            let hypothesis = &trial.hypothesis;
            Finding {
                cause: hypothesis.cause,
                name: hypothesis.name.clone(),
                log_likelihood: there().sum::<f64>() / there().count().max(1) as f64,
                gain,
                gain_error,
                n: gains.len(),
                first: *first,
                fix: hypothesis.fix.clone(),
            }
        })
        .collect();
    findings.sort_by(|a, b| b.gain.total_cmp(&a.gain));
    let verdict = Verdict::of(evidence, &level, &findings, none_first);
    (level, findings, verdict)
}

impl Level {
    fn of(evidence: &Evidence) -> Self {
        let n = evidence.given.len().max(1) as f64;
        let log_likelihood = evidence.given.iter().map(|j| j.log_likelihood).sum::<f64>() / n;
        let expected = evidence.given.iter().map(|j| j.expected).sum::<f64>() / n;
        let deficit_per_number = (expected - log_likelihood) / evidence.n_counted.max(1) as f64;
        Self { log_likelihood, expected, deficit_per_number }
    }
}

/// Gains over the input as it is, of the moments that have both.
fn gains(evidence: &Evidence, log_likelihoods: &[Option<f64>]) -> Vec<f64> {
    let both = log_likelihoods.iter().zip(&evidence.given);
    both.filter_map(|(x, given)| Some((*x)? - given.log_likelihood)).collect()
}

fn mean_and_error(gains: &[f64]) -> (f64, f64) {
    let n = gains.len().max(1) as f64;
    let mean = gains.iter().sum::<f64>() / n;
    let square = gains.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (square / n).sqrt())
}

/// How often each hypothesis came first, and how often none did.
fn draw(evidence: &Evidence) -> (Vec<f64>, f64) {
    let n = evidence.given.len();
    let gains: Vec<Vec<Option<f64>>> = evidence
        .trials
        .iter()
        .map(|trial| {
            let pairs = trial.log_likelihoods.iter().zip(&evidence.given);
            pairs.map(|(x, given)| Some((*x)? - given.log_likelihood)).collect()
        })
        .collect();
    let (mut firsts, mut none_first) = (vec![0.0; gains.len()], 0.0);
    // Knuth's linear congruence: the same moments on every machine.
    let mut state = 1_u64;
    let mut below = |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n.max(1) as u64) as usize
    };
    for _ in 0..DRAWS {
        let drawn: Vec<usize> = (0..n).map(|_| below(n)).collect();
        let mut best = (None, LEAST_GAIN);
        for (i, gains) in gains.iter().enumerate() {
            let there = || drawn.iter().filter_map(|moment| gains[*moment]);
            let gain = there().sum::<f64>() / there().count().max(1) as f64;
            if gain > best.1 {
                best = (Some(i), gain);
            }
        }
        *best.0.map_or(&mut none_first, |i: usize| &mut firsts[i]) += 1.0 / DRAWS as f64;
    }
    (firsts, none_first)
}

impl Verdict {
    fn of(evidence: &Evidence, level: &Level, findings: &[Finding], none_first: f64) -> Self {
        let unknown = |confidence, evidence: String| Self {
            cause: Cause::Unknown,
            confidence,
            evidence,
            fix: None,
        };
        let n = evidence.given.len();
        if n < LEAST_MOMENTS {
            return unknown(
                1.0,
                format!("{n} moments say nothing; {LEAST_MOMENTS} or more are needed"),
            );
        }
        if evidence.by_model {
            let why = "the actions are what a model did, which says nothing about its input: record what a person \
                       demonstrates";
            return unknown(1.0, why.to_owned());
        }
        let Level { log_likelihood, expected, deficit_per_number } = *level;
        let is_likely = deficit_per_number <= MOST_DEFICIT;
        let share = |cause: Cause| -> f64 {
            findings
                .iter()
                .filter(|finding| finding.cause == cause)
                .map(|finding| finding.first)
                .sum()
        };
        let sure = findings.first().filter(|best| share(best.cause) >= SURE);
        // What does nearly as well may be it as well, and was not drawn first by chance.
        let near = |best: &Finding| -> Vec<String> {
            let is_near = |f: &&Finding| f.cause != best.cause && f.gain > best.gain - LEAST_GAIN;
            findings.iter().filter(is_near).map(Finding::label).collect()
        };
        let rivals = sure.map(near).unwrap_or_default();
        if let Some(best) = sure.filter(|_| rivals.is_empty()) {
            let Finding { gain, gain_error, n, .. } = best;
            let why = format!(
                "{} makes the demonstrated actions likelier by {gain:.2} ± {gain_error:.2} nats each, over {n} moments",
                best.name
            );
            return Self::named(best, share(best.cause), why);
        }
        let of_level = format!(
            "the demonstrated actions have {log_likelihood:.2} nats each, what the model would draw itself {expected:.2}"
        );
        let jpeg = findings.iter().find(|finding| finding.cause == Cause::Jpeg);
        if let Some(jpeg) = jpeg.filter(|_| sure.is_none() && evidence.blocky >= SURE) {
            let why = format!(
                "blocks of JPEG show in {:.0} % of the frames, and nothing else stands out; {of_level}",
                100.0 * evidence.blocky
            );
            return Self::named(jpeg, evidence.blocky, why);
        }
        if none_first >= SURE && is_likely {
            let why = format!("{of_level}, and nothing that was tried makes them likelier");
            return Self { cause: Cause::None, confidence: none_first, evidence: why, fix: None };
        }
        let mut names: Vec<String> = sure.iter().map(|best| best.label()).chain(rivals).collect();
        for finding in findings.iter().filter(|finding| finding.first > 1.0 - SURE) {
            if !names.contains(&finding.label()) {
                names.push(finding.label());
            }
        }
        let why = match names.len() {
            0 => format!("{of_level}, and nothing that was tried explains it"),
            _ => format!("{of_level}; the moments do not tell apart: {}", names.join(", ")),
        };
        unknown(none_first, why)
    }

    fn named(finding: &Finding, confidence: f64, evidence: String) -> Self {
        Self { cause: finding.cause, confidence, evidence, fix: Some(finding.fix.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examine::Trial;
    use crate::hypothesis::{Change, Hypothesis};
    use crate::judge::Judged;

    /// An input of -10 nats at each moment, and hypotheses that gain something there.
    fn evidence(expected: f64, gains: &[(Cause, &[f64])]) -> Evidence {
        let n = gains.first().map_or(12, |(_, gains)| gains.len());
        let trial = |(cause, gains): &(Cause, &[f64])| Trial {
            hypothesis: Hypothesis {
                cause: *cause,
                name: cause.name(),
                fix: format!("undo {}", cause.name()),
                change: Change::Lag(0),
            },
            log_likelihoods: gains.iter().map(|gain| Some(gain - 10.0)).collect(),
        };
        Evidence {
            instruction: "wave".into(),
            key: "d".into(),
            moments: (0..n).collect(),
            given: vec![Judged { log_likelihood: -10.0, expected }; n],
            trials: gains.iter().map(trial).collect(),
            n_counted: 4,
            by_model: false,
            blocky: 0.0,
        }
    }

    fn verdict(expected: f64, gains: &[(Cause, &[f64])]) -> Verdict {
        decide(&evidence(expected, gains)).2
    }

    const LARGE: [f64; 6] = [4.0, 6.0, 5.0, 3.0, 7.0, 5.0];
    const SMALL: [f64; 6] = [0.3, -0.2, 0.4, 0.1, -0.3, 0.2];

    #[test]
    fn what_stands_out_is_named() {
        let found = verdict(-4.0, &[(Cause::Lag, &SMALL), (Cause::Bgr, &LARGE)]);
        assert_eq!((found.cause, found.fix.as_deref()), (Cause::Bgr, Some("undo bgr")));
        assert!(found.confidence > 0.99, "{found:?}");
    }

    #[test]
    fn nothing_is_named_where_nothing_stands_out() {
        let found = verdict(-9.0, &[(Cause::Lag, &SMALL)]);
        assert_eq!((found.cause, found.fix), (Cause::None, None));
        let found = verdict(-1.0, &[(Cause::Lag, &SMALL)]);
        assert_eq!(found.cause, Cause::Unknown, "the model would have done something else");
        let one = [30.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(
            verdict(-9.0, &[(Cause::Lag, &one)]).cause,
            Cause::Unknown,
            "one moment is not many"
        );
        assert_eq!(verdict(-9.0, &[(Cause::Bgr, &LARGE[..2])]).cause, Cause::Unknown);
    }

    #[test]
    fn of_two_that_do_as_well_none_is_named() {
        let nearly = LARGE.map(|gain| gain - 0.1);
        let found = verdict(-4.0, &[(Cause::Permuted, &LARGE), (Cause::Instruction, &nearly)]);
        assert_eq!(found.cause, Cause::Unknown);
        for wanted in ["permuted", "instruction"] {
            assert!(found.evidence.contains(wanted), "{}", found.evidence);
        }
        let same = verdict(-4.0, &[(Cause::Rotated90, &LARGE), (Cause::Rotated90, &nearly)]);
        assert_eq!(same.cause, Cause::Rotated90, "either is the same cause");
    }

    #[test]
    fn blocks_are_named_where_nothing_else_is() {
        let mut evidence = evidence(-9.0, &[(Cause::Jpeg, &SMALL)]);
        evidence.blocky = 1.0;
        assert_eq!(decide(&evidence).2.cause, Cause::Jpeg);
        evidence.by_model = true;
        assert_eq!(decide(&evidence).2.cause, Cause::Unknown);
    }
}
