//! What may have happened to pictures: undone, and measured.

use anyhow::Result;
use openvla::image::imageops::{self, FilterType};
use openvla::image::{Rgb, RgbImage};
use serde::Serialize;

/// What is done to a picture before the model sees it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PictureChange {
    /// Red and blue are swapped.
    SwapChannels,
    /// By half a turn.
    Rotate180,
    /// By a quarter turn, clockwise.
    Clockwise,
    /// By a quarter turn, counter-clockwise.
    CounterClockwise,
    /// Left and right are swapped.
    Mirror,
    /// Top and bottom are swapped.
    Flip,
    /// The middle nine tenths of the area are cut out.
    Crop,
    /// The picture becomes nine tenths of the area of one whose rim repeats its own.
    Uncrop,
    /// Bars of one color at the rim are cut off, and what is left is stretched to the same size.
    CutBars,
    /// Black bars make it square.
    AddBars,
    /// The edges between a JPEG's blocks are smoothed.
    Deblock,
}

/// The side that nine tenths of an area leave of one.
const CROP: f64 = 0.948_683_298_050_513_8;

impl PictureChange {
    /// The changed picture.
    pub fn apply(self, image: &RgbImage) -> RgbImage {
        let (w, h) = image.dimensions();
        match self {
            Self::SwapChannels => {
                let mut image = image.clone();
                image.pixels_mut().for_each(|Rgb([r, _, b])| std::mem::swap(r, b));
                image
            }
            Self::Rotate180 => imageops::rotate180(image),
            Self::Clockwise => imageops::rotate90(image),
            Self::CounterClockwise => imageops::rotate270(image),
            Self::Mirror => imageops::flip_horizontal(image),
            Self::Flip => imageops::flip_vertical(image),
            Self::Crop => {
                let [cw, ch] = [w, h].map(|side| (f64::from(side) * CROP).round().max(1.0) as u32);
                let middle = imageops::crop_imm(image, (w - cw) / 2, (h - ch) / 2, cw, ch);
                imageops::resize(&middle.to_image(), w, h, FilterType::CatmullRom)
            }
            Self::Uncrop => {
                let [cw, ch] = [w, h].map(|side| (f64::from(side) * CROP).round().max(1.0) as u32);
                let small = imageops::resize(image, cw, ch, FilterType::CatmullRom);
                let [left, top] = [(w - cw) / 2, (h - ch) / 2];
                let inside = |at: u32, before: u32, n: u32| at.saturating_sub(before).min(n - 1);
                RgbImage::from_fn(w, h, |x, y| small[(inside(x, left, cw), inside(y, top, ch))])
            }
            Self::CutBars => {
                let Bars { left, right, top, bottom } = Bars::of(image);
                let inner =
                    imageops::crop_imm(image, left, top, w - left - right, h - top - bottom);
                imageops::resize(&inner.to_image(), w, h, FilterType::CatmullRom)
            }
            Self::AddBars => {
                let side = w.max(h);
                let mut square = RgbImage::new(side, side);
                imageops::replace(
                    &mut square,
                    image,
                    ((side - w) / 2).into(),
                    ((side - h) / 2).into(),
                );
                square
            }
            Self::Deblock => deblocked(image),
        }
    }
}

/// Bars of one color at the rim, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bars {
    /// At the left.
    pub left: u32,
    /// At the right.
    pub right: u32,
    /// Above.
    pub top: u32,
    /// Below.
    pub bottom: u32,
}

/// How far a bar's pixels may be from black or from the bar's color, as JPEG leaves them.
const BAR_LEVELS: u8 = 12;
/// The share of a side that bars take at least if they are some.
const LEAST_BARS: f64 = 0.04;

impl Bars {
    /// Those of a picture: opposite ones, about equally wide, of one color. Others are what the camera saw.
    pub fn of(image: &RgbImage) -> Self {
        let (w, h) = image.dimensions();
        let color = image[(0, 0)];
        let is_bar =
            |pixel: &Rgb<u8>| pixel.0.iter().zip(color.0).all(|(a, b)| a.abs_diff(b) <= BAR_LEVELS);
        let column = |x: &u32| (0..h).all(|y| is_bar(&image[(*x, y)]));
        let row = |y: &u32| (0..w).all(|x| is_bar(&image[(x, *y)]));
        let count = |n: usize| n as u32;
        let pair = |a: u32, b: u32, side: u32| {
            let is_one = f64::from(a + b) >= LEAST_BARS * f64::from(side)
                && a.abs_diff(b) <= 2
                && a + b < side;
            if is_one { (a, b) } else { (0, 0) }
        };
        let (left, right) = pair(
            count((0..w).take_while(column).count()),
            count((0..w).rev().take_while(column).count()),
            w,
        );
        let (top, bottom) = pair(
            count((0..h).take_while(row).count()),
            count((0..h).rev().take_while(row).count()),
            h,
        );
        Self { left, right, top, bottom }
    }

    /// Whether there are any.
    pub fn are_there(&self) -> bool {
        self.left + self.right + self.top + self.bottom > 0
    }
}

/// The side of a JPEG's blocks.
const BLOCK: u32 = 8;

/// How much larger steps between neighbors are at the edges of a JPEG's blocks than inside of them: about 1 without
/// strong JPEG. Blocks begin in the picture's corner, so that pictures which were resized since show nothing.
pub fn blockiness(image: &RgbImage) -> f64 {
    let (w, h) = image.dimensions();
    let light = |x: u32, y: u32| image[(x, y)].0.iter().map(|v| f64::from(*v)).sum::<f64>();
    let (mut edge, mut inside) = ([0.0, 0.0], [0.0, 0.0]);
    let mut note = |at: u32, step: f64| {
        let sum = if at.is_multiple_of(BLOCK) { &mut edge } else { &mut inside };
        // What are edges of things would hide what are edges of blocks.
        *sum = [sum[0] + step.abs().min(24.0), sum[1] + 1.0];
    };
    for y in 0..h {
        (1..w).for_each(|x| note(x, light(x, y) - light(x - 1, y)));
    }
    for x in 0..w {
        (1..h).for_each(|y| note(y, light(x, y) - light(x, y - 1)));
    }
    // Half a level keeps pictures of one color from dividing by nothing.
    let mean = |[sum, n]: [f64; 2]| sum / n.max(1.0) + 0.5;
    mean(edge) / mean(inside)
}

/// Each side of an edge between blocks moves a quarter of the step toward the other, where the step is small.
fn deblocked(image: &RgbImage) -> RgbImage {
    let (w, h) = image.dimensions();
    let smooth = |a: u8, b: u8| {
        let step = i32::from(b) - i32::from(a);
        let quarter = if step.abs() <= 40 { step / 4 } else { 0 };
        [(i32::from(a) + quarter) as u8, (i32::from(b) - quarter) as u8]
    };
    let mut image = image.clone();
    for y in 0..h {
        for x in (BLOCK..w).step_by(BLOCK as usize) {
            for c in 0..3 {
                let both = smooth(image[(x - 1, y)].0[c], image[(x, y)].0[c]);
                [image[(x - 1, y)].0[c], image[(x, y)].0[c]] = both;
            }
        }
    }
    for x in 0..w {
        for y in (BLOCK..h).step_by(BLOCK as usize) {
            for c in 0..3 {
                let both = smooth(image[(x, y - 1)].0[c], image[(x, y)].0[c]);
                [image[(x, y - 1)].0[c], image[(x, y)].0[c]] = both;
            }
        }
    }
    image
}

/// The picture itself if its sides are at most `most` pixels; else a smaller one.
pub fn within(image: &RgbImage, most: u32) -> RgbImage {
    let (w, h) = image.dimensions();
    let longest = w.max(h);
    if longest <= most {
        return image.clone();
    }
    let [w, h] = [w, h].map(|side| (side * most / longest).max(1));
    imageops::resize(image, w, h, FilterType::Triangle)
}

/// A round trip through JPEG of a quality from 1 to 100.
///
/// # Errors
/// What the encoder says.
pub fn jpeg(image: &RgbImage, quality: i32) -> Result<RgbImage> {
    let (width, height) = image.dimensions();
    let (width, height) = (width as usize, height as usize);
    let format = turbojpeg::PixelFormat::RGB;
    let pixels = turbojpeg::Image {
        pixels: image.as_raw().as_slice(),
        width,
        pitch: 3 * width,
        height,
        format,
    };
    let bytes = turbojpeg::compress(pixels, quality, turbojpeg::Subsamp::Sub2x2)?;
    Ok(openvla::decode(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examine::BLOCKY;

    fn picture(w: u32, h: u32) -> RgbImage {
        RgbImage::from_fn(w, h, |x, y| {
            let wave = |k: u32| (128.0 + 100.0 * (f64::from(x * k + y) / 9.0).sin()) as u8;
            Rgb([wave(1), wave(2), 255 - wave(1)])
        })
    }

    #[test]
    fn changes_undo_what_they_are_for() {
        use PictureChange::*;
        let image = picture(40, 30);
        let twice = [SwapChannels, Rotate180, Mirror, Flip];
        for change in twice {
            let changed = change.apply(&image);
            assert!(changed != image && change.apply(&changed) == image, "{change:?}");
        }
        assert!(CounterClockwise.apply(&Clockwise.apply(&image)) == image);
        let off = |a: &RgbImage, b: &RgbImage| {
            let sum: u64 =
                a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            sum as f64 / a.as_raw().len() as f64
        };
        let cropped = Crop.apply(&image);
        assert!(off(&Uncrop.apply(&cropped), &image) < 0.5 * off(&cropped, &image));
        let (barred, whole) = (AddBars.apply(&image), picture(40, 40));
        assert_eq!(Bars::of(&barred), Bars { left: 0, right: 0, top: 5, bottom: 5 });
        assert_eq!(CutBars.apply(&barred).dimensions(), (40, 40));
        assert!(!Bars::of(&whole).are_there() && CutBars.apply(&whole) == whole);
    }

    #[test]
    fn strong_jpeg_shows() {
        let image = picture(96, 96);
        assert!(blockiness(&image) < 1.2, "{}", blockiness(&image));
        let coarse = jpeg(&image, 8).unwrap();
        assert!(blockiness(&coarse) > BLOCKY, "{}", blockiness(&coarse));
        assert!(blockiness(&PictureChange::Deblock.apply(&coarse)) < blockiness(&coarse));
        assert!(blockiness(&jpeg(&image, 95).unwrap()) < 1.2);
        assert!(blockiness(&RgbImage::new(1, 1)) <= 1.0 + 1e-9);
    }
}
