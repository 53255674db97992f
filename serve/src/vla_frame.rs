//! What vla-eval's frames hold: types, observations, and what the server says of itself.

use std::borrow::Cow;
use std::collections::BTreeMap;

use axum::body::Bytes;
use openvla::Header;
use openvla::image::RgbImage;
use serde::de::{DeserializeSeed, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::Error;
use crate::field::Field;
use crate::message::{Message, Named, Schema};
use crate::numpy::Convention;
use crate::observation::{Answer, Observation};
use crate::plain::refused;
use crate::policy::ModelInfo;

/// The version of the protocol that is spoken here.
pub const PROTOCOL: u64 = 1;

/// What observations hold. The first picture is the model's first, whatever its name.
static SCHEMA: Schema = Schema {
    image: &[],
    wrists: false,
    cameras: true,
    instruction: &["task_description"],
    options: &["states", "state"],
    hint: "a map with `images`, a map of uint8 [height, width, 3] or of PNG or JPEG files, and `task_description`, as \
           vla_eval packs it",
};

/// What a client asks for in its URL.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wishes {
    /// The data set.
    unnorm_key: Option<String>,
    /// How many actions of each chunk are given out before the model looks again.
    n_actions: Option<u64>,
    /// How the last number of a motion is given.
    #[serde(default)]
    gripper: Gripper,
}

/// Formats of the gripper's number, by vla-eval's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
enum Gripper {
    /// As the model gives it: 0 closed to 1 open.
    #[default]
    #[serde(rename = "continuous_01")]
    Continuous01,
    /// As LIBERO's robots take it: -1 open, 1 closed.
    #[serde(rename = "binary_close_positive")]
    BinaryClosePositive,
}

impl Wishes {
    /// What may be asked for.
    pub const HINT: &str =
        "?unnorm_key=KEY, n_actions=N, and gripper=continuous_01 or binary_close_positive are read";

    /// The actions of an answer as the benchmark takes them.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] if there is no one gripper.
    pub fn actions(&self, answer: &Answer) -> Result<Vec<Vec<f32>>, Error> {
        let n = answer.action.len();
        if self.gripper == Gripper::BinaryClosePositive && n != ARM {
            let message = format!("motions of {n} numbers have no gripper at their end");
            return Err(Error::bad_request(message).hint("leave `gripper` out of the URL"));
        }
        let single = |action: &Vec<f64>| {
            let mut action: Vec<f32> = action.iter().map(|x| *x as f32).collect();
            if self.gripper == Gripper::BinaryClosePositive {
                action[ARM - 1] = closed(action[ARM - 1]);
            }
            action
        };
        Ok(answer.actions.iter().map(single).collect())
    }
}

/// Numbers of an arm's motion: position, rotation, gripper.
const ARM: usize = 7;

/// ref: `-np.sign(2 * action[..., -1] - 1)` of vla_eval's servers of OpenVLA and OFT
fn closed(open: f32) -> f32 {
    match 2.0 * open - 1.0 {
        x if x > 0.0 => -1.0,
        x if x < 0.0 => 1.0,
        _ => 0.0,
    }
}

/// A frame's type, `seq` and `timestamp`.
pub struct Head {
    /// Its type.
    pub kind: Kind,
    /// The client's own count.
    pub seq: u64,
    /// When it was sent, in seconds since 1970.
    pub timestamp: f64,
}

/// Types of frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The first, with the version of the client's protocol.
    Hello(u64),
    /// An observation.
    Observation,
    /// An episode begins.
    EpisodeStart,
    /// An episode is over.
    EpisodeEnd,
    /// Something went wrong at the client.
    Error,
    /// None that the protocol has.
    Other(String),
}

#[derive(Deserialize)]
struct Whole<'a, P> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    payload: P,
    seq: u64,
    timestamp: f64,
}

/// What a payload says that is no observation.
#[derive(Deserialize)]
struct Said {
    protocol_version: Option<u64>,
}

struct Observed<'a>(Message<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for Observed<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        DeserializeSeed::deserialize(&SCHEMA, from).map(Self)
    }
}

fn read<'a, P: Deserialize<'a>>(frame: &'a [u8]) -> Result<Whole<'a, P>, Error> {
    rmp_serde::from_slice(frame).map_err(|why| {
        let hint = "a map with `type`, `payload`, `seq` and `timestamp`, as vla_eval packs it";
        Error::bad_request(format!("the frame cannot be read: {why}")).hint(hint)
    })
}

impl Head {
    /// Reads a frame.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`].
    pub fn read(frame: &[u8]) -> Result<Self, Error> {
        let Whole { kind, seq, timestamp, .. } = read::<IgnoredAny>(frame)?;
        let kind = match kind.as_ref() {
            "hello" => {
                let version = read::<Said>(frame)?.payload.protocol_version;
                // ref: clients before the version was sent
                Kind::Hello(version.unwrap_or(PROTOCOL))
            }
            "observation" => Kind::Observation,
            "episode_start" => Kind::EpisodeStart,
            "episode_end" => Kind::EpisodeEnd,
            "error" => Kind::Error,
            other => Kind::Other(other.chars().take(64).collect()),
        };
        Ok(Self { kind, seq, timestamp })
    }
}

/// An observation whose picture files were checked, but not decoded yet.
pub struct Draft {
    pictures: Vec<Picture>,
    state: Option<Vec<f64>>,
    instruction: String,
    wishes: Wishes,
    /// The cost of decoding them.
    pub samples: u64,
}

enum Picture {
    Pixels(RgbImage),
    File(Bytes),
}

impl Draft {
    /// Reads an observation for a model, which is shown as many pictures as it has cameras.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`], [`crate::error::Code::BadImage`].
    pub fn read(
        frame: &[u8],
        wishes: &Wishes,
        model: Option<&ModelInfo>,
        max_pixels: usize,
    ) -> Result<Self, Error> {
        let Observed(mut payload) = read(frame)?.payload;
        let mut samples: u64 = 0;
        let mut picture = |(name, field): Named<'_>| match field {
            Field::Picture(file) => {
                samples = samples.saturating_add(Header::read(&file).map_err(refused)?.samples);
                Ok(Picture::File(Bytes::from(file.into_owned())))
            }
            field => {
                let pixels = field.array(&name)?.image(Convention::Pillow, max_pixels)?;
                Ok(Picture::Pixels(pixels))
            }
        };
        let cameras = payload.cameras().into_iter().take(model.map_or(1, ModelInfo::n_camera));
        let pictures = cameras.map(&mut picture).collect::<Result<Vec<_>, Error>>()?;
        if pictures.is_empty() {
            return Err(Error::bad_request("`images` holds no picture").hint(SCHEMA.hint));
        }
        let instruction = payload.instruction()?;
        // A model that reads no state is not sent one, whatever the benchmark calls by that name.
        let reads_state =
            model.and_then(|model| model.oft.as_ref()).is_some_and(|oft| oft.n_state > 0);
        let state = if reads_state { payload.option("states", Field::numbers)? } else { None };
        let state = match state {
            None if reads_state => payload.option("state", Field::numbers)?,
            state => state,
        };
        Ok(Self { pictures, state, instruction, wishes: wishes.clone(), samples })
    }

    /// Decodes the pictures.
    ///
    /// # Errors
    /// [`crate::error::Code::BadImage`], and those of [`Observation::new`].
    pub fn decode(self, max_pixels: usize) -> Result<Observation, Error> {
        let decode = |picture| match picture {
            Picture::Pixels(pixels) => Ok(pixels),
            Picture::File(file) => openvla::decode_within(&file, max_pixels).map_err(refused),
        };
        let mut pictures = self.pictures.into_iter().map(decode);
        let first = pictures.next().ok_or_else(|| Error::bad_request("there is no picture"))??;
        let observation = Observation::new(first, self.instruction, self.wishes.unnorm_key)?;
        let wrists = pictures.collect::<Result<_, _>>()?;
        let n_actions = self.wishes.n_actions;
        Ok(Observation { wrists, state: self.state, n_actions, ..observation })
    }
}

/// An array of numbers as vla-eval's msgpack has it.
#[derive(Debug, Serialize)]
pub struct Array {
    #[serde(rename = "__ndarray__")]
    is_array: bool,
    #[serde(with = "serde_bytes")]
    data: Vec<u8>,
    dtype: &'static str,
    shape: [usize; 1],
}

impl Array {
    /// Of one dimension.
    pub fn new(numbers: &[f32]) -> Self {
        let data = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { is_array: true, data, dtype: "<f4", shape: [numbers.len()] }
    }
}

/// The answer to `hello`.
#[derive(Debug, Serialize)]
pub struct Hello {
    harness_version: &'static str,
    protocol_version: u64,
    model_server: &'static str,
    capabilities: BTreeMap<&'static str, bool>,
    /// What the benchmark should be made with, if it knows such a parameter.
    observation_params: Params,
    /// Parts of an action, in their order. None where it is not known to be an arm's.
    action_spec: BTreeMap<&'static str, Spec>,
    observation_spec: BTreeMap<&'static str, Spec>,
}

/// ref: `get_observation_params` of vla_eval's servers of OpenVLA and OFT
#[derive(Debug, Default, Serialize)]
struct Params {
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    env_seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quat_no_antipodal: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    send_wrist_image: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    send_state: Option<bool>,
}

/// A part of an action or an observation. 0 dimensions stand for what is no array of numbers.
///
/// ref: vla_eval `specs.py`
#[derive(Debug, Serialize)]
struct Spec {
    name: &'static str,
    dims: usize,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    range: Option<[f64; 2]>,
}

impl Hello {
    /// Of what a model gives to a client with these wishes, whose data set is otherwise `default_key`.
    pub fn new(model: &ModelInfo, wishes: Option<&Wishes>, default_key: Option<&str>) -> Self {
        let key = wishes.and_then(|wishes| wishes.unnorm_key.as_deref()).or(default_key);
        let n = model.statistics.select(key).map(|(_, dataset)| dataset.action.n());
        let is_arm = n.is_ok_and(|n| n == ARM);
        let spec = |name, dims, format, range| (name, Spec { name, dims, format, range });
        let gripper = match wishes.map(|wishes| wishes.gripper).unwrap_or_default() {
            Gripper::Continuous01 => spec("gripper", 1, "continuous_01", Some([0.0, 1.0])),
            Gripper::BinaryClosePositive => {
                spec("gripper", 1, "binary_close_positive", Some([-1.0, 1.0]))
            }
        };
        let parts = [
            spec("position", 3, "delta_xyz", Some([-1.0, 1.0])),
            spec("rotation", 3, "axis_angle", Some([-3.15, 3.15])),
            gripper,
        ];
        let picture =
            |name| (name, Spec { name: "image", dims: 0, format: "rgb_hwc_uint8", range: None });
        let mut observation_spec =
            BTreeMap::from([picture("image"), spec("language", 0, "language", None)]);
        let observation_params = match &model.oft {
            None => Params { seed: Some(0), ..Params::default() },
            Some(oft) => {
                let (sees_wrist, reads_state) = (oft.cameras.len() > 1, oft.n_state > 0);
                observation_spec.extend(sees_wrist.then(|| picture("wrist_image")));
                // LIBERO's arm has eight numbers; of others, nothing is said but how many.
                let format = if oft.n_state == 8 { "eef_pos3_axisangle3_gripper2" } else { "raw" };
                observation_spec
                    .extend(reads_state.then(|| spec("state", oft.n_state, format, None)));
                Params {
                    env_seed: Some(0),
                    quat_no_antipodal: Some(true),
                    send_wrist_image: sees_wrist.then_some(true),
                    send_state: reads_state.then_some(true),
                    ..Params::default()
                }
            }
        };
        Self {
            harness_version: concat!("openvla-serve ", env!("CARGO_PKG_VERSION")),
            protocol_version: PROTOCOL,
            model_server: "openvla-serve",
            capabilities: BTreeMap::new(),
            observation_params,
            action_spec: if is_arm { parts.into() } else { BTreeMap::new() },
            observation_spec,
        }
    }
}
