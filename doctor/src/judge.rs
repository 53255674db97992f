//! What a model says to claims about what was asked and done: their log-likelihoods.
//!
//! An OpenVLA's is that of its tokens. An OpenVLA-OFT with an L1 head has none: the distance of what it predicts from
//! what was done stands for it, as that of a Laplace distribution around the prediction, which is what an L1 loss fits,
//! cut into the same bins.

use anyhow::{Result, ensure};
use openvla::image::RgbImage;
use openvla::oft::{Observation, OpenVlaOft};
use openvla::{ActionSpace, OpenVla, Policy, Scale, Statement};
use serde::{Deserialize, Serialize};

use crate::episode::Seen;

/// What may have been asked for and done.
#[derive(Debug, Clone)]
pub struct Claim {
    /// In words.
    pub instruction: String,
    /// Actions in -1..1: of the moment, and those after it that are known.
    pub actions: Vec<Vec<f64>>,
    /// Numbers of an action that are far outside of the data set's ranges, on average: clipping hides how far.
    pub n_outside: f64,
}

/// What a model thinks of a claim, in nats, all numbers of an action together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// How likely it is.
    pub log_likelihood: f64,
    /// How likely what the model itself draws would be on average.
    pub expected: f64,
}

/// One of so many numbers may be anything, whatever the model thinks: a bound on what a single one says.
const OUTLIERS: f64 = 0.05;
/// The share of a data set's numbers that are outside of its first and 99th percentile.
const OUTSIDE: f64 = 0.02;
/// The mean distance from a good OpenVLA-OFT's prediction to what was done, in -1..1.
const NEAR: f64 = 0.05;

/// A model that judges.
pub struct Judge<'p> {
    policy: &'p mut Policy,
    key: String,
    /// Which numbers of an action count: those whose range has a width.
    counted: Vec<bool>,
}

impl<'p> Judge<'p> {
    /// With the statistics of a data set.
    pub fn new(policy: &'p mut Policy, key: &str, scale: &Scale) -> Self {
        let counted =
            (0..scale.n()).map(|axis| !scale.mask[axis] || scale.low[axis] < scale.high[axis]);
        Self { key: key.to_owned(), counted: counted.collect(), policy }
    }

    /// Judges claims about one moment, the picture's features shared by all.
    ///
    /// # Errors
    /// Those of the policy.
    pub fn judge(&mut self, seen: &Seen, claims: &[Claim]) -> Result<Vec<Judged>> {
        let mut judged = match &mut *self.policy {
            Policy::OpenVla(policy) => tokens(policy, &seen.images[0], claims, &self.counted),
            Policy::Oft(policy) => chunks(policy, &self.key, seen, claims, &self.counted),
        }?;
        for (judged, claim) in judged.iter_mut().zip(claims) {
            judged.log_likelihood += claim.n_outside * OUTSIDE.ln();
        }
        Ok(judged)
    }
}

/// A number's log-likelihood where any number may be an outlier.
fn bounded(log_likelihood: f64, space: ActionSpace) -> f64 {
    let outlier = OUTLIERS / f64::from(space.n_bin);
    ((1.0 - OUTLIERS) * log_likelihood.exp() + outlier).ln()
}

fn tokens(
    policy: &mut OpenVla,
    image: &RgbImage,
    claims: &[Claim],
    counted: &[bool],
) -> Result<Vec<Judged>> {
    let space = policy.config().actions;
    let tokens: Vec<Vec<u32>> = claims
        .iter()
        .map(|claim| claim.actions[0].iter().map(|x| space.id(*x)).collect())
        .collect();
    let statements: Vec<Statement<'_>> = claims
        .iter()
        .zip(&tokens)
        .map(|(claim, tokens)| Statement { instruction: &claim.instruction, tokens })
        .collect();
    let scores = policy.score(image, &statements)?;
    let judged = |scores: Vec<openvla::TokenScore>| {
        let counted = scores.iter().zip(counted).filter(|(_, counted)| **counted);
        counted.fold(Judged { log_likelihood: 0.0, expected: 0.0 }, |sum, (score, _)| Judged {
            log_likelihood: sum.log_likelihood + bounded(score.log_likelihood, space),
            expected: sum.expected - score.entropy,
        })
    };
    Ok(scores.into_iter().map(judged).collect())
}

fn chunks(
    policy: &mut OpenVlaOft,
    key: &str,
    seen: &Seen,
    claims: &[Claim],
    counted: &[bool],
) -> Result<Vec<Judged>> {
    let n_camera = policy.oft().cameras.len();
    ensure!(
        seen.images.len() >= n_camera,
        "the model sees {n_camera} cameras ({}); the episode has pictures of {}",
        policy.oft().cameras.join(", "),
        seen.images.len()
    );
    let images: Vec<&RgbImage> = seen.images.iter().take(n_camera).collect();
    let observation = Observation { images: &images, state: seen.state.as_deref() };
    let space = policy.config().actions;
    let mut predicted: Vec<(&str, Vec<Vec<f64>>)> = Vec::new();
    let mut judged = Vec::with_capacity(claims.len());
    for claim in claims {
        let known = predicted.iter().position(|(instruction, _)| *instruction == claim.instruction);
        let i = match known {
            Some(i) => i,
            None => {
                let chunk = policy.act(&observation, &claim.instruction, Some(key))?;
                predicted.push((&claim.instruction, chunk.normalized));
                predicted.len() - 1
            }
        };
        judged.push(laplace(&predicted[i].1, &claim.actions, counted, space));
    }
    Ok(judged)
}

/// What a Laplace distribution around a prediction says to actions: the mean over the time steps that both have.
fn laplace(
    predicted: &[Vec<f64>],
    actions: &[Vec<f64>],
    counted: &[bool],
    space: ActionSpace,
) -> Judged {
    let bin = 2.0 / f64::from(space.n_bin - 1);
    let (log_peak, n_step) = ((bin / (2.0 * NEAR)).ln(), predicted.len().min(actions.len()));
    let mut sum = 0.0;
    for (predicted, action) in predicted.iter().zip(actions) {
        let pairs = predicted.iter().zip(action).zip(counted).filter(|(_, counted)| **counted);
        sum += pairs
            .map(|((a, b), _)| {
                let off = (a.clamp(-1.0, 1.0) - b.clamp(-1.0, 1.0)).abs();
                bounded(log_peak - off / NEAR, space)
            })
            .sum::<f64>();
    }
    let n_counted = counted.iter().filter(|counted| **counted).count();
    let log_likelihood = sum / n_step.max(1) as f64;
    Judged { log_likelihood, expected: (log_peak - 1.0) * n_counted as f64 }
}
