//! What the page shows of a step: pictures as the model sees them, the motion in its range with the alternatives, and
//! what a person should notice, in words.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use openvla::image::RgbImage;
use openvla::{ActionSpace, Resize, dimension_name};
use serde::Serialize;
use turbojpeg::{Image, PixelFormat, Subsamp};

use crate::checks;
use crate::error::{Code, Error};
use crate::live::{Last, Robot, Step};
use crate::observation::{Answer, Times};
use crate::policy::ModelInfo;

/// Probabilities below this are not shown.
const LEAST: f64 = 0.002;

/// For how long a picture may stay the same, or a motion at the end of its range, unremarked.
const PATIENCE: Duration = Duration::from_secs(2);

/// Seconds that a picture may be on its way unremarked.
const MAX_AGE: f64 = 0.25;

/// A robot's last step, as the page shows it.
#[derive(Debug, Serialize)]
pub struct View<'a> {
    /// The robot's name, if it has one.
    robot: &'a Robot,
    connection: u64,
    /// Counts its steps.
    n: u64,
    /// When the step ended, in seconds since 1970.
    at: f64,
    pictures: Vec<Picture>,
    instruction: &'a str,
    motion: Option<Motion<'a>>,
    error: Option<&'a Error>,
    timing_ms: Option<Times>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Picture {
    name: String,
    /// A JPEG as a URL of its own.
    data: String,
    width: u32,
    height: u32,
}

#[derive(Debug, Serialize)]
struct Motion<'a> {
    unnorm_key: &'a str,
    /// Of the first action.
    dimensions: Vec<Dimension>,
    /// Actions of a chunk.
    n_action: usize,
}

/// A number of a motion, in the data set's units.
#[derive(Debug, Serialize)]
struct Dimension {
    name: String,
    value: f64,
    low: f64,
    high: f64,
    /// Values that the model could have chosen, the lowest first, and the probability of each; none where the model
    /// chooses no tokens.
    alternatives: Vec<(f64, f64)>,
}

/// What is remembered of a robot from one view to the next.
struct Memory {
    connection: u64,
    picture: RgbImage,
    same_since: SystemTime,
    /// Since when each dimension is at an end of its range.
    ends: Vec<Option<SystemTime>>,
}

/// Makes views of the steps of all robots.
#[derive(Default)]
pub struct Views(HashMap<Robot, Memory>);

impl Views {
    /// The view of a robot's last step.
    ///
    /// # Errors
    /// If a picture cannot be shown.
    pub fn view<'a>(&mut self, model: &ModelInfo, last: &'a Last) -> Result<View<'a>> {
        let step = &*last.step;
        let observation = &step.observation;
        let mut shown = vec![("camera".to_owned(), shown(model, &observation.image)?)];
        for (i, wrist) in observation.wrists.iter().enumerate() {
            shown.push((format!("wrist camera {}", i + 1), self::shown(model, wrist)?));
        }
        let answer = step.outcome.as_ref().ok();
        let motion = answer.map(|answer| motion(model, answer));
        let mut warnings = of_answer(step);
        let bars = !matches!(model.shown.resize, Resize::Letterbox { .. });
        for (_, picture) in &shown {
            warnings.extend(checks::picture(picture, bars));
        }
        warnings.extend(self.over_time(step, &shown[0].1, motion.as_ref(), model));
        let pictures = shown.iter().map(|(name, image)| Picture::new(name, image));
        let unix = step.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(View {
            robot: &step.robot,
            connection: step.connection,
            n: last.n,
            at: unix.as_secs_f64(),
            pictures: pictures.collect::<Result<_>>()?,
            instruction: &observation.instruction,
            motion,
            error: step.outcome.as_ref().err(),
            timing_ms: answer.map(|answer| answer.timing_ms),
            warnings,
        })
    }

    /// Forgets all robots but these.
    pub fn keep(&mut self, robots: &[Robot]) {
        self.0.retain(|robot, _| robots.contains(robot));
    }

    /// What only several steps together show.
    fn over_time(
        &mut self,
        step: &Step,
        picture: &RgbImage,
        motion: Option<&Motion<'_>>,
        model: &ModelInfo,
    ) -> Vec<String> {
        let n = motion.map_or(0, |motion| motion.dimensions.len());
        let begin = || Memory {
            connection: step.connection,
            picture: RgbImage::new(0, 0),
            same_since: step.at,
            ends: Vec::new(),
        };
        let memory = self.0.entry(step.robot.clone()).or_insert_with(begin);
        if step.robot.is_none() && memory.connection != step.connection {
            *memory = begin(); // another robot, for all that is known
        }
        let since = |begun: SystemTime| step.at.duration_since(begun).unwrap_or_default();
        let mut found = Vec::new();
        if memory.picture == *picture {
            let same = since(memory.same_since);
            if same >= PATIENCE {
                found.push(format!(
                    "The picture has been the same for {} s, pixel by pixel: is the camera still running?",
                    same.as_secs()
                ));
            }
        } else {
            (memory.picture, memory.same_since) = (picture.clone(), step.at);
        }
        let Some(motion) = motion else { return found };
        let dataset = model.statistics.datasets().get(motion.unnorm_key);
        let is_scaled = |i| dataset.is_some_and(|dataset| dataset.action.mask[i]);
        memory.ends.resize(n, None);
        let (mut names, mut longest) = (Vec::new(), Duration::ZERO);
        for (i, (of, end)) in motion.dimensions.iter().zip(&mut memory.ends).enumerate() {
            if !of.is_at_an_end() || !is_scaled(i) {
                *end = None;
                continue;
            }
            let long = since(*end.get_or_insert(step.at));
            if long >= PATIENCE {
                names.push(of.name.as_str());
                longest = longest.max(long);
            }
        }
        if !names.is_empty() {
            found.push(format!(
                "At the end of its range for {} s: {}. If that is no long fast motion, look at the data set ({}), and at \
                 what the model sees.",
                longest.as_secs(),
                names.join(", "),
                motion.unnorm_key
            ));
        }
        found
    }
}

impl Dimension {
    /// Whether it is in the first or the last bin, where it has a width at all.
    fn is_at_an_end(&self) -> bool {
        let width = self.high - self.low;
        let near = width.abs() / 250.0;
        let is_near = |end: f64| (self.value - end).abs() <= near;
        width != 0.0 && (is_near(self.low) || is_near(self.high))
    }
}

impl Picture {
    fn new(name: &str, image: &RgbImage) -> Result<Self> {
        let (width, height) = image.dimensions();
        let [across, down] = [width, height].map(|side| side as usize);
        let (pixels, format) = (image.as_raw().as_slice(), PixelFormat::RGB);
        let pixels = Image { pixels, width: across, pitch: 3 * across, height: down, format };
        let file = turbojpeg::compress(pixels, 90, Subsamp::None)?;
        let data = format!("data:image/jpeg;base64,{}", STANDARD.encode(&*file));
        Ok(Self { name: name.into(), data, width, height })
    }
}

/// A picture as the towers see it.
fn shown<'a>(model: &ModelInfo, image: &'a RgbImage) -> Result<Cow<'a, RgbImage>> {
    Ok(match model.preprocess {
        Some(_) => Cow::Borrowed(image), // it has become the square already
        None => Cow::Owned(model.shown.shown(image)?),
    })
}

fn motion<'a>(model: &ModelInfo, answer: &'a Answer) -> Motion<'a> {
    let n = answer.action.len();
    let logits = Some(&answer.logits).filter(|logits| logits.len() == n);
    let dimension = |(i, value): (usize, &f64)| {
        let [low, high] = *answer.ranges.get(i).unwrap_or(&[-1.0, 1.0]);
        let alternatives = logits.map(|logits| alternatives(model.actions, &logits[i], low, high));
        let alternatives = alternatives.unwrap_or_default();
        Dimension { name: dimension_name(i, n), value: *value, low, high, alternatives }
    };
    Motion {
        unnorm_key: &answer.unnorm_key,
        dimensions: answer.action.iter().enumerate().map(dimension).collect(),
        n_action: answer.actions.len(),
    }
}

/// The likely values of a dimension, the lowest first, and the probability of each.
fn alternatives(space: ActionSpace, logits: &[f32], low: f64, high: f64) -> Vec<(f64, f64)> {
    let mut all: Vec<(f64, f64)> = Vec::new();
    // From the highest id, which has the lowest value. Two ids share the last bin, and all one value where there is no
    // range.
    for (id, p) in space.ids().zip(space.probabilities(logits)).rev() {
        let value = low + 0.5 * (space.center(space.bin(id)) + 1.0) * (high - low);
        match all.last_mut() {
            Some((last, sum)) if *last == value => *sum += p,
            _ => all.push((value, p)),
        }
    }
    all.retain(|(_, p)| *p >= LEAST);
    all
}

/// What the answer itself says.
fn of_answer(step: &Step) -> Vec<String> {
    let mut found = Vec::new();
    match &step.outcome {
        Err(error) if error.code == Code::DeadlineExceeded => {
            found.push("The motion came too late, and was not sent.".into());
        }
        Err(error) => found.push(format!("There was no motion: {error}.")),
        Ok(answer) => {
            let named = |dimensions: &[usize]| {
                let n = answer.action.len();
                dimensions.iter().map(|i| dimension_name(*i, n)).collect::<Vec<_>>().join(", ")
            };
            found.extend(answer.warning.map(sentence));
            let [clamped, limited] =
                [&answer.safety.clamped, &answer.safety.limited].map(|of| named(of));
            if !clamped.is_empty() {
                found.push(format!("--clamp kept {clamped} within the range."));
            }
            if !limited.is_empty() {
                found.push(format!("--max-delta held {limited} near the motion before."));
            }
        }
    }
    match step.age {
        Some(age) if age < -MAX_AGE => found.push(format!(
            "The picture is {:.1} s from the future: the robot's clock and this one differ.",
            -age
        )),
        Some(age) if age > MAX_AGE => found.push(format!(
            "The picture was {age:.1} s old when it came: the camera or the network is slow, or the clocks differ."
        )),
        _ => {}
    }
    found
}

/// With a capital and a full stop, or a question mark.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_uppercase().collect::<String>());
    let end = if text.ends_with(['.', '?', '!']) { "" } else { "." };
    format!("{}{}{end}", first.unwrap_or_default(), letters.as_str())
}
