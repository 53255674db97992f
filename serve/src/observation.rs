//! Observations and answers: what every protocol decodes to, and what it encodes.

use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use openvla::image::RgbImage;
use openvla::oft::Chunk;
use openvla::{Timing, Unconstrained};
use serde::Serialize;

use crate::error::{Code, Error};
use crate::meta::{Client, Meta};
use crate::safety;
use crate::tokens::Caller;

/// Images of a robot's cameras, an instruction and, if the model reads it, the arm's state.
#[derive(Debug, Clone)]
pub struct Observation {
    /// The image, of any size.
    pub image: RgbImage,
    /// Images of the wrist cameras, in the order that the client sent them in.
    pub wrists: Vec<RgbImage>,
    /// The arm's state, in the data set's units.
    pub state: Option<Vec<f64>>,
    /// The instruction.
    pub instruction: String,
    /// The data set whose units the motion should have.
    pub unnorm_key: Option<String>,
    /// How many actions of a chunk are wanted: the first so many.
    pub n_actions: Option<u64>,
}

/// The most bytes of an instruction: more than any model's context, and quickly tokenized.
const MAX_INSTRUCTION: usize = 8192;

impl Observation {
    /// An observation of one image, if its texts are not too long.
    ///
    /// # Errors
    /// [`Code::InstructionTooLong`], [`Code::UnknownUnnormKey`].
    pub fn new(
        image: RgbImage,
        instruction: String,
        unnorm_key: Option<String>,
    ) -> Result<Self, Error> {
        if instruction.len() > MAX_INSTRUCTION {
            let n = instruction.len();
            let message = format!("the instruction has {n} bytes; {MAX_INSTRUCTION} are taken");
            return Err(Error::new(Code::InstructionTooLong, message));
        }
        if let Some(n) = unnorm_key.as_ref().map(String::len).filter(|n| *n > 256) {
            let message = format!("no statistics have a name of {n} bytes");
            return Err(Error::new(Code::UnknownUnnormKey, message));
        }
        let (wrists, state, n_actions) = (Vec::new(), None, None);
        Ok(Self { image, wrists, state, instruction, unnorm_key, n_actions })
    }
}

/// The optional metadata of a request: HTTP headers, or fields of a websocket message.
#[derive(Debug, Clone, Default)]
pub struct Headers {
    /// `X-Client-Id`, or `X-Session-Id`, by which a fleet's router keeps a robot at its server: the robot's name.
    /// Without one, the connection counts as the client.
    pub client_id: Option<String>,
    /// `X-Epoch`: a number that is higher each time the client's program starts.
    pub epoch: Option<u64>,
    /// `X-Seq`: the client's own count.
    pub seq: Option<u64>,
    /// `X-Timestamp`: when the picture was taken, in seconds since 1970.
    pub timestamp: Option<f64>,
    /// `X-Deadline-Ms`: for how many milliseconds an answer is useful.
    pub deadline_ms: Option<u64>,
}

/// The longest deadline, in milliseconds: an hour.
pub const MAX_DEADLINE_MS: u64 = 3_600_000;

impl Headers {
    /// Parses the headers of a request.
    ///
    /// # Errors
    /// [`Code::BadRequest`] names the header.
    pub fn of(headers: &HeaderMap) -> Result<Self, Error> {
        Ok(Self {
            client_id: match header(headers, "x-client-id", "a name")? {
                None => header(headers, "x-session-id", "a name")?,
                named => named,
            },
            epoch: header(headers, "x-epoch", "a whole number")?,
            seq: header(headers, "x-seq", "a whole number")?,
            timestamp: header(headers, "x-timestamp", "seconds since 1970")?,
            deadline_ms: header(headers, "x-deadline-ms", "milliseconds")?,
        })
    }

    /// The metadata of a request that arrived at `arrived` on the connection of this number, from nobody in particular.
    ///
    /// # Errors
    /// [`Code::BadRequest`] names the invalid part.
    pub fn meta(
        self,
        arrived: Instant,
        connection: u64,
        default_deadline: Duration,
    ) -> Result<Meta, Error> {
        let client = match self.client_id {
            Some(name) if (1..=128).contains(&name.len()) => Client::Named(name),
            Some(name) => {
                let n = name.len();
                let message = format!("the client's name has {n} bytes; 1 to 128 are taken");
                return Err(Error::bad_request(message));
            }
            None => Client::Connection(connection),
        };
        if self.timestamp.is_some_and(|seconds| !seconds.is_finite()) {
            return Err(Error::bad_request("the timestamp is not a finite number"));
        }
        if let Some((seconds, unit)) = self.timestamp.and_then(|at| Some((at, other_unit(at)?))) {
            let message = format!("the timestamp is {seconds}; this looks like {unit}");
            let hint = "seconds since 1970 are wanted, as time.time() returns them in Python";
            return Err(Error::bad_request(message).hint(hint));
        }
        let deadline = match self.deadline_ms {
            Some(ms @ 1..=MAX_DEADLINE_MS) => Duration::from_millis(ms),
            Some(ms) => {
                let message = format!("a deadline of {ms} ms; 1 to {MAX_DEADLINE_MS} are taken");
                return Err(Error::bad_request(message));
            }
            None => default_deadline,
        };
        let Self { epoch, seq, timestamp, .. } = self;
        Ok(Meta {
            client,
            caller: Caller::default(),
            connection,
            epoch,
            seq,
            timestamp,
            arrived,
            deadline: arrived + deadline,
        })
    }
}

/// The probable unit of a timestamp that is too large for seconds. As seconds, even the smallest is in the
/// year 5138; as milliseconds, it is in 1973.
fn other_unit(seconds: f64) -> Option<&'static str> {
    match seconds.abs() {
        ..1e11 => None,
        ..1e14 => Some("milliseconds"),
        ..1e17 => Some("microseconds"),
        _ => Some("nanoseconds"),
    }
}

fn header<T: std::str::FromStr>(
    headers: &HeaderMap,
    name: &str,
    wanted: &str,
) -> Result<Option<T>, Error> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    let wrong = || Error::bad_request(format!("`{name}: {value:?}`; {wanted} is wanted"));
    parsed.ok_or_else(wrong).map(Some)
}

/// The output of a model for one observation.
#[derive(Debug, Clone)]
pub struct Motion {
    /// Actions to be executed one after another, each of one number per dimension, in the data set's units.
    pub actions: Vec<Vec<f64>>,
    /// The same as the model computed them, about -1..1.
    pub normalized: Vec<Vec<f64>>,
    /// The tokens that they were decoded from, if the model chooses tokens.
    pub tokens: Vec<u32>,
    /// The logits of the action ids, `[n_bin]`, at each token of the first action, if the model chooses tokens.
    pub logits: Vec<Vec<f32>>,
    /// The data set.
    pub unnorm_key: String,
    /// The best tokens of the whole vocabulary, and whether all of them are actions.
    pub unconstrained: (Vec<u32>, bool),
    /// The statistics of speculative decoding.
    pub draft: Draft,
    /// Milliseconds by stage.
    pub timing: Timing,
}

/// The statistics of speculative decoding for one motion.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Draft {
    /// Forward passes of the Llama.
    pub passes: usize,
    /// Whether each token but the last was drafted and accepted.
    pub accepted: Vec<bool>,
}

impl From<openvla::Action> for Motion {
    fn from(action: openvla::Action) -> Self {
        let Unconstrained { tokens, all_actions, .. } = action.unconstrained;
        Self {
            actions: vec![action.action],
            normalized: vec![action.normalized],
            tokens: action.tokens,
            logits: action.logits,
            unnorm_key: action.unnorm_key,
            unconstrained: (tokens, all_actions),
            draft: Draft { passes: action.draft.passes, accepted: action.draft.accepted },
            timing: action.timing_ms,
        }
    }
}

impl From<Chunk> for Motion {
    fn from(chunk: Chunk) -> Self {
        let of = chunk.timing_ms;
        let mut timing = Timing::default();
        (timing.preprocess, timing.vision, timing.projector) =
            (of.preprocess, of.vision, of.projector);
        (timing.prefill, timing.total) = (of.llama + of.head, of.total);
        let n = chunk.actions.first().map_or(0, Vec::len);
        Self {
            actions: chunk.actions,
            normalized: chunk.normalized,
            tokens: chunk.tokens.map(|tokens| tokens.concat()).unwrap_or_default(),
            logits: chunk.logits.into_iter().take(n).collect(),
            unnorm_key: chunk.unnorm_key,
            unconstrained: (Vec::new(), true),
            draft: Draft { passes: 1, accepted: Vec::new() },
            timing,
        }
    }
}

/// The answer to a request: a checked motion, and details about it.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// The first action: one number per dimension, in the data set's units.
    pub action: Vec<f64>,
    /// All actions, to be executed one after another; one, unless the model computes chunks.
    pub actions: Vec<Vec<f64>>,
    /// The model's output for the first action in -1..1, before anything was clamped or limited.
    pub normalized: Vec<f64>,
    /// The tokens that it was decoded from.
    pub tokens: Vec<u32>,
    /// The logits of the action ids, `[n_bin]`, at each token of the first action: for the page, which shows the
    /// alternatives.
    #[serde(skip)]
    pub logits: Vec<Vec<f32>>,
    /// The data set.
    pub unnorm_key: String,
    /// Lowest and highest number of each dimension in the data set.
    pub ranges: Vec<[f64; 2]>,
    /// Whether the best tokens of the whole vocabulary are all actions.
    pub all_actions: bool,
    /// The best tokens of the whole vocabulary.
    pub unconstrained: Vec<u32>,
    /// A warning about this motion, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<&'static str>,
    /// What the safety checks changed.
    pub safety: safety::Report,
    /// The statistics of speculative decoding.
    pub draft: Draft,
    /// The time of each stage.
    pub timing_ms: Times,
    /// The fingerprint of the model whose motion it is.
    pub fingerprint: String,
    /// That model's file: for the audit log.
    #[serde(skip)]
    pub file: String,
    /// The `seq` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
}

/// The warning if the model would have chosen tokens that are not actions.
pub const UNSURE: &str = "among all tokens the model would have chosen one that is not a motion; is \
                          this what it was trained for?";

/// Milliseconds between a request and its answer.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Times {
    /// From the request's first byte to the model: reading, decoding, queueing.
    pub queue: f64,
    /// Preprocessing: image to planes.
    pub preprocess: f64,
    /// The vision towers: planes to patch features.
    pub vision: f64,
    /// The projector: patch features to soft tokens.
    pub projector: f64,
    /// Tokenization and the Llama's prefill.
    pub prefill: f64,
    /// Decode steps: the tokens after the first.
    pub decode: f64,
    /// The model's stages together.
    pub step: f64,
}

impl Times {
    /// A step's times, after so long a wait.
    pub fn new(queue: Duration, step: &Timing) -> Self {
        Self {
            queue: queue.as_secs_f64() * 1e3,
            preprocess: step.preprocess,
            vision: step.vision,
            projector: step.projector,
            prefill: step.prefill,
            decode: step.decode,
            step: step.total,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(headers: &[(&'static str, &str)]) -> Result<Meta, Error> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        Headers::of(&map)?.meta(Instant::now(), 7, Duration::from_secs(60))
    }

    #[test]
    fn headers_say_who_and_when() {
        let named = meta(&[
            ("x-client-id", "arm"),
            ("x-seq", "18446744073709551615"),
            ("x-timestamp", "1700000000.25"),
            ("x-deadline-ms", "200"),
        ]);
        let named = named.unwrap();
        assert_eq!(named.client, Client::Named("arm".into()));
        assert_eq!((named.seq, named.timestamp), (Some(u64::MAX), Some(1_700_000_000.25)));
        assert_eq!(named.deadline - named.arrived, Duration::from_millis(200));
        let routed = meta(&[("x-session-id", "leg")]).unwrap();
        assert_eq!(routed.client, Client::Named("leg".into()));
        let both = meta(&[("x-session-id", "leg"), ("x-client-id", "arm")]).unwrap();
        assert_eq!(both.client, Client::Named("arm".into()));
        let silent = meta(&[]).unwrap();
        assert_eq!(silent.client, Client::Connection(7));
        assert_eq!(silent.deadline - silent.arrived, Duration::from_secs(60));
    }

    #[test]
    fn headers_that_make_no_sense_are_named() {
        for (name, value) in [
            ("x-seq", "-1"),
            ("x-seq", "1.5"),
            ("x-timestamp", "noon"),
            ("x-deadline-ms", "9999999999999999999999"),
        ] {
            let error = meta(&[(name, value)]).unwrap_err();
            assert!(error.message.contains(name) && error.message.contains(value), "{error}");
        }
        for (name, value) in [
            ("x-timestamp", "NaN"),
            ("x-timestamp", "inf"),
            ("x-deadline-ms", "0"),
            ("x-deadline-ms", "3600001"),
            ("x-client-id", ""),
            ("x-session-id", ""),
        ] {
            assert_eq!(meta(&[(name, value)]).unwrap_err().code, Code::BadRequest, "{name}");
        }
    }

    #[test]
    fn timestamps_in_another_unit_are_refused() {
        for (timestamp, unit) in [
            ("1700000000000", "milliseconds"),
            ("1.7e12", "milliseconds"),
            ("1700000000000000", "microseconds"),
            ("1700000000000000000", "nanoseconds"),
            ("1e300", "nanoseconds"),
        ] {
            let error = meta(&[("x-timestamp", timestamp)]).unwrap_err();
            assert_eq!(error.code, Code::BadRequest);
            assert!(error.message.ends_with(unit), "{timestamp}: {error}");
            assert!(error.hint.unwrap().contains("seconds since 1970"));
        }
        for timestamp in ["0", "99999999999.5", "-1"] {
            assert!(meta(&[("x-timestamp", timestamp)]).is_ok(), "{timestamp}");
        }
    }

    #[test]
    fn texts_are_bounded() {
        let new = |n, key: usize| {
            Observation::new(RgbImage::new(1, 1), "x".repeat(n), Some("k".repeat(key)))
        };
        assert!(new(MAX_INSTRUCTION, 256).is_ok());
        assert_eq!(new(MAX_INSTRUCTION + 1, 0).unwrap_err().code, Code::InstructionTooLong);
        assert_eq!(new(0, 257).unwrap_err().code, Code::UnknownUnnormKey);
    }
}
