//! A picture and an instruction without a demonstration: what the picture looks like, what the prompt becomes, and how
//! sure the model is.

use std::path::Path;

use anyhow::Result;
use openvla::image::RgbImage;
use openvla::{Config, Policy, Statement};
use serde::Serialize;

use crate::examine::BLOCKY;
use crate::picture::{Bars, blockiness, within};

/// What was found, and what is wrong with it in words.
#[derive(Debug, Clone, Serialize)]
pub struct Input {
    /// The pictures, of one moment or of several.
    pub pictures: Vec<Picture>,
    /// The prompt as the model is given it.
    pub prompt: String,
    /// Its ids.
    pub n_id: usize,
    /// Of the first picture, how sure an OpenVLA is of each number of its motion.
    pub numbers: Vec<Number>,
    /// What is wrong, and what to do.
    pub warnings: Vec<String>,
}

/// What a picture looks like.
#[derive(Debug, Clone, Serialize)]
pub struct Picture {
    /// Its file.
    pub file: String,
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Bars of one color.
    pub bars: Bars,
    /// The mean of all levels, 0 to 255.
    pub brightness: f64,
    /// The share of levels that are 0 or 255.
    pub clipped: f64,
    /// Whether all pixels are gray.
    pub is_gray: bool,
    /// The mean absolute second difference of neighbors' levels: a sharp picture has more than about 2.
    pub sharpness: f64,
    /// How much JPEG's blocks show: about 1 if they do not.
    pub blockiness: f64,
    /// The orientation in EXIF if it is not upright, which nobody applies.
    pub exif_orientation: Option<u16>,
}

/// How sure the model is of a number.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Number {
    /// What it chooses, in the data set's units.
    pub value: f64,
    /// The probability of this token among all.
    pub probability: f64,
    /// The entropy of all tokens, in bits: 8 for a guess among the bins.
    pub entropy_bits: f64,
    /// The probability of a token that is not an action.
    pub no_action: f64,
}

/// Examines pictures of one moment or several, and asks the model about the first.
///
/// # Errors
/// If the policy fails.
pub fn examine(
    policy: &mut Policy,
    files: &[(&Path, RgbImage)],
    instruction: &str,
    key: Option<&str>,
) -> Result<Input> {
    let config = policy.config().clone();
    let pictures: Vec<Picture> =
        files.iter().map(|(path, image)| Picture::of(path, image)).collect();
    let n_id = match &*policy {
        Policy::OpenVla(policy) => policy.prompt_ids(instruction),
        Policy::Oft(policy) => policy.prompt_ids(instruction),
    }?
    .len();
    let numbers = match (policy, files.first()) {
        (Policy::OpenVla(policy), Some((_, image))) => {
            let action = policy.act(image, instruction, key)?;
            let statement = Statement { instruction, tokens: &action.tokens };
            let scores = policy.score(image, &[statement])?.remove(0);
            let number = |(score, value): (&openvla::TokenScore, &f64)| Number {
                value: *value,
                probability: score.log_likelihood.exp(),
                entropy_bits: score.entropy / std::f64::consts::LN_2,
                no_action: 1.0 - score.actions,
            };
            scores.iter().zip(&action.action).map(number).collect()
        }
        _ => Vec::new(), // an OpenVLA-OFT computes numbers without a distribution
    };
    let mut warnings: Vec<String> = Vec::new();
    for doubt in pictures.iter().flat_map(|picture| picture.doubts(&config)) {
        if !warnings.contains(&doubt) {
            warnings.push(doubt);
        }
    }
    warnings.extend(config.prompt.doubt(instruction).map(str::to_owned));
    let vague = numbers.iter().filter(|number| number.no_action > 0.5).count();
    if vague > 0 {
        warnings.push(format!(
            "for {vague} of {} numbers, a token that is not an action is likelier than all actions: is this what the model was \
             trained for?",
            numbers.len()
        ));
    }
    Ok(Input { pictures, prompt: config.prompt.text(instruction), n_id, numbers, warnings })
}

/// Pictures of different shapes or worse are told by these limits, on what cameras of robots see.
const DARK: f64 = 30.0;
const BRIGHT: f64 = 225.0;
const CLIPPED: f64 = 0.3;
const BLURRED: f64 = 0.8;

impl Picture {
    /// That of a file.
    pub fn of(path: &Path, image: &RgbImage) -> Self {
        let levels = image.as_raw();
        let n = levels.len().max(1) as f64;
        let clipped = levels.iter().filter(|level| [0, 255].contains(*level)).count();
        Self {
            file: path.display().to_string(),
            width: image.width(),
            height: image.height(),
            bars: Bars::of(image),
            brightness: levels.iter().map(|level| f64::from(*level)).sum::<f64>() / n,
            clipped: clipped as f64 / n,
            is_gray: image
                .pixels()
                .all(|pixel| pixel.0[0] == pixel.0[1] && pixel.0[1] == pixel.0[2]),
            sharpness: sharpness(image),
            blockiness: blockiness(image),
            exif_orientation: std::fs::read(path).ok().and_then(|bytes| exif_orientation(&bytes)),
        }
    }

    fn doubts(&self, config: &Config) -> Vec<String> {
        let mut doubts = Vec::new();
        let mut doubt = |is_so: bool, why: String| {
            if is_so {
                doubts.push(why);
            }
        };
        let Self {
            width, height, bars, brightness, clipped, is_gray, sharpness, blockiness, ..
        } = self;
        let size = config.preprocess.size;
        doubt(
            bars.are_there(),
            "there are bars at the rim, which were hardly in the training data: cut them off"
                .to_owned(),
        );
        doubt(*brightness < DARK, format!("it is dark: {brightness:.0} of 255 on average"));
        doubt(
            *brightness > BRIGHT,
            format!("it is overexposed: {brightness:.0} of 255 on average"),
        );
        doubt(
            *clipped > CLIPPED,
            format!("{:.0} % of all levels are 0 or 255: look at the exposure", 100.0 * clipped),
        );
        doubt(*is_gray, "it is gray: models are trained on color".to_owned());
        doubt(*sharpness < BLURRED, "it is blurred, or of one color".to_owned());
        doubt(
            *blockiness > BLOCKY,
            format!(
                "blocks of JPEG show ({blockiness:.1} times as steep as what is inside): use quality 90 or more"
            ),
        );
        doubt(
            width.min(height) < &(size / 2),
            format!(
                "it has {width} x {height} pixels, the model sees {size} x {size}: send larger ones"
            ),
        );
        doubt(
            f64::from(*width.max(height)) > 2.5 * f64::from(*width.min(height)),
            format!(
                "{width} x {height} pixels are squeezed into a square: is this one camera's picture?"
            ),
        );
        if let Some(orientation) = self.exif_orientation {
            doubt(
                true,
                format!(
                    "EXIF says that it is to be turned (orientation {orientation}), which neither the reference nor this program does: turn the pixels"
                ),
            );
        }
        doubts
    }
}

/// The mean absolute second difference of lightness along rows and columns, after a picture of at most 256 pixels.
fn sharpness(image: &RgbImage) -> f64 {
    let image = within(image, 256);
    let (w, h) = image.dimensions();
    let light = |x: u32, y: u32| image[(x, y)].0.iter().map(|v| f64::from(*v)).sum::<f64>() / 3.0;
    let (mut sum, mut n) = (0.0, 0.0);
    for y in 1..h.saturating_sub(1) {
        for x in 1..w.saturating_sub(1) {
            let middle = 4.0 * light(x, y);
            let around = light(x - 1, y) + light(x + 1, y) + light(x, y - 1) + light(x, y + 1);
            sum += (middle - around).abs();
            n += 1.0;
        }
    }
    if n == 0.0 { 0.0 } else { sum / n }
}

/// The orientation that a JPEG's EXIF names, 2 to 8, if it is not upright.
fn exif_orientation(bytes: &[u8]) -> Option<u16> {
    let mut rest = bytes.strip_prefix(&[0xFF, 0xD8])?;
    // Segments until the pixels: a marker, a length that counts itself, what it says.
    loop {
        let [0xFF, marker, high, low] = *rest.first_chunk()? else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let segment = rest.get(4..2 + length)?;
        match (marker, segment.strip_prefix(b"Exif\0\0")) {
            (0xE1, Some(tiff)) => return orientation(tiff).filter(|o| (2..=8).contains(o)),
            (0xDA, _) => return None,
            _ => rest = rest.get(2 + length..)?,
        }
    }
}

/// Tag 0x0112 of the first directory.
fn orientation(tiff: &[u8]) -> Option<u16> {
    let is_big = match tiff.get(..4)? {
        [b'M', b'M', 0, 42] => true,
        [b'I', b'I', 42, 0] => false,
        _ => return None,
    };
    let short = |at: usize| {
        let two = *tiff.get(at..)?.first_chunk()?;
        Some(if is_big { u16::from_be_bytes(two) } else { u16::from_le_bytes(two) })
    };
    let four = *tiff.get(4..)?.first_chunk()?;
    let at = if is_big { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) } as usize;
    let entries = (0..usize::from(short(at)?)).map(|i| at + 2 + 12 * i);
    entries.into_iter().find(|at| short(*at) == Some(0x0112)).and_then(|at| short(at + 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use openvla::image::Rgb;

    #[test]
    fn exif_is_read_in_either_byte_order() {
        let little = b"II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0";
        let big = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0";
        for (tiff, wanted) in [(&little[..], 6), (&big[..], 3)] {
            let segment = [b"Exif\0\0", tiff].concat();
            let length = (segment.len() as u16 + 2).to_be_bytes();
            let jpeg =
                [&[0xFF, 0xD8, 0xFF, 0xE0, 0, 4, 1, 2, 0xFF, 0xE1][..], &length, &segment].concat();
            assert_eq!(exif_orientation(&jpeg), Some(wanted));
            for n in 0..jpeg.len() {
                let _ = exif_orientation(&jpeg[..n]); // cut off anywhere
            }
        }
        assert_eq!(exif_orientation(b"\x89PNG"), None);
    }

    #[test]
    fn pictures_are_doubted_by_what_they_look_like() {
        let of = |f: &dyn Fn(u32, u32) -> [u8; 3]| {
            let image = RgbImage::from_fn(64, 64, |x, y| Rgb(f(x, y)));
            Picture::of(Path::new("none"), &image)
        };
        let dark = of(&|_, _| [3, 2, 1]);
        assert!(dark.brightness < DARK && dark.sharpness < BLURRED && !dark.is_gray);
        let noise = of(&|x, y| [(x * 97 + y * 57) as u8; 3]);
        assert!(noise.is_gray && noise.sharpness > BLURRED);
        let white = of(&|_, _| [255; 3]);
        assert!(white.clipped > CLIPPED && white.brightness > BRIGHT);
    }
}
