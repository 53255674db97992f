//! Preprocessing: a picture of any shape to the normalized square the vision towers see.
//!
//! in   `[3, width, height]`         RGB bytes
//! out  `[size, size, 3 * towers]`   f32; R, G, B planes of the first tower, then of the second
//!
//! Bit-exact with Pillow's 8-bit bicubic and torchvision's `to_tensor` and `normalize`.
//!
//! ref: `PrismaticImageProcessor.apply_transform`; Pillow 10.4 `src/libImaging/Resample.c`

use image::RgbImage;

use crate::Result;
use crate::decode::check_sides;
use crate::profile::{Profile, check_size};

/// How an image of any shape becomes the square the towers see. The names are those of
/// `image_resize_strategy` in `preprocessor_config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// `resize-naive`: to the square at once; the aspect ratio is lost.
    Naive,
    /// `letterbox`: padded to a square, then as [`Resize::Crop`].
    Letterbox {
        /// Color of the padding, RGB.
        fill: [u8; 3],
    },
    /// `resize-crop`: the short side to the square's, then the centre of the long one.
    Crop,
}

/// Mean and standard deviation of one tower, in units of 0..=1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// Subtracted, per channel.
    pub mean: [f32; 3],
    /// Divided by, per channel.
    pub std: [f32; 3],
}

/// From picture to pixel values, as the checkpoint's image processor does it.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// What is done to a picture before the image processor.
    pub profile: Profile,
    /// Whether only the middle nine tenths of a picture's area are shown, as models expect that were trained with
    /// random crops.
    pub center_crop: bool,
    /// Side of the square, in pixels: 14 to 1024.
    pub size: u32,
    /// How the picture becomes square.
    pub resize: Resize,
    /// Each tower's normalization, in the order of its planes.
    pub towers: Vec<Normalize>,
}

impl Preprocess {
    /// The square that all towers start from: `[3, size, size]` bytes.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Image`] if a side is not in 1 to 16384 pixels, or `size` not in 14 to 1024.
    pub fn square(&self, image: &RgbImage) -> Result<RgbImage> {
        check_sides(image.width(), image.height())?;
        check_size(self.size)?;
        let [across, down] = self.axes(image).map(|axis| axis.taps(self.size));
        let fill = match self.resize {
            Resize::Letterbox { fill } => fill,
            Resize::Naive | Resize::Crop => [0; 3], // there is no padding
        };
        // Only the rows that the vertical pass reads: of a tall picture the crop drops most.
        let first = down[0].first;
        let end = down.last().map_or(first, |tap| tap.first + tap.weights.len());
        let rows = image.as_raw().chunks_exact(3 * image.width() as usize);
        let narrow = horizontal(rows.take(end).skip(first), &across, fill);
        let square = vertical(&narrow, first, &down, fill);
        Ok(RgbImage::from_raw(self.size, self.size, square).expect("a tap for every pixel"))
    }

    /// What the towers are shown of a picture, `[3, size, size]` bytes: prepared as the profile says, and made square.
    ///
    /// # Errors
    ///
    /// As [`Preprocess::square`].
    pub fn shown(&self, image: &RgbImage) -> Result<RgbImage> {
        self.square(&*self.profile.prepare(image, self.size, self.center_crop)?)
    }

    /// Pixel values, `[size, size, 3 * towers]`, of what the towers are [shown](Preprocess::shown).
    ///
    /// # Errors
    ///
    /// As [`Preprocess::square`].
    pub fn planes(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let square = self.shown(image)?;
        let mut planes = Vec::with_capacity(square.len() * self.towers.len());
        for tower in &self.towers {
            for channel in 0..3 {
                let value = tower.table(channel);
                let pixels = square.as_raw().chunks_exact(3);
                planes.extend(pixels.map(|pixel| value[usize::from(pixel[channel])]));
            }
        }
        Ok(planes)
    }

    /// The way of the picture's width and of its height.
    fn axes(&self, image: &RgbImage) -> [Axis; 2] {
        let sides = [image.width(), image.height()];
        let longest = sides[0].max(sides[1]);
        // An odd difference leaves the frame one pixel off square, as in the reference.
        let pads = sides.map(|side| match self.resize {
            Resize::Letterbox { .. } => (longest - side) / 2,
            Resize::Naive | Resize::Crop => 0,
        });
        let frames = [0, 1].map(|i| sides[i] + 2 * pads[i]);
        let short = frames[0].min(frames[1]);
        [0, 1].map(|i| {
            let scaled = match self.resize {
                Resize::Naive => self.size,
                Resize::Letterbox { .. } | Resize::Crop => self.size * frames[i] / short,
            };
            Axis { image: sides[i], pad: pads[i], scaled, crop: centre(scaled - self.size) }
        })
    }
}

impl Normalize {
    /// The value of every byte. The order of the roundings is the reference's.
    fn table(&self, channel: usize) -> [f32; 256] {
        let (mean, std) = (self.mean[channel], self.std[channel]);
        std::array::from_fn(|byte| (byte as f32 / 255.0 - mean) / std)
    }
}

/// Where the crop starts when `excess` pixels are cut: half of it, ties to even as in Python.
fn centre(excess: u32) -> u32 {
    (f64::from(excess) / 2.0).round_ties_even() as u32
}

/// What happens to one side: `pad + image + pad` pixels become `scaled`, cut from `crop` on.
struct Axis {
    image: u32,
    pad: u32,
    scaled: u32,
    crop: u32,
}

/// What one output pixel takes from each input pixel, as fractions of 2²².
struct Tap {
    /// The first pixel of the image that `weights` is for.
    first: usize,
    weights: Vec<i32>,
    /// The sum of the weights that fall on the padding, which thus is never made.
    padding: i32,
}

impl Axis {
    /// The weights of the `size` pixels that the crop keeps. At equal size they are 0, 1, 0, so
    /// that a pass which the reference skips just copies.
    fn taps(&self, size: u32) -> Vec<Tap> {
        let frame = self.image + 2 * self.pad;
        let image = self.pad..self.pad + self.image;
        let tap = |x| {
            let (start, all) = weights(frame, self.scaled, x);
            let first = start.clamp(image.start, image.end) - image.start;
            let (mut weights, mut padding) = (Vec::with_capacity(all.len()), 0);
            for (at, weight) in (start..).zip(all) {
                if image.contains(&at) { weights.push(weight) } else { padding += weight }
            }
            Tap { first: first as usize, weights, padding }
        };
        (self.crop..self.crop + size).map(tap).collect()
    }
}

/// The input pixels that make up output pixel `x`, when `n_in` become `n_out`: the first one,
/// and the weight of each.
///
/// ref: Resample.c `precompute_coeffs`, `normalize_coeffs_8bpc`; every operation in its order
fn weights(n_in: u32, n_out: u32, x: u32) -> (u32, Vec<i32>) {
    let scale = f64::from(n_in) / f64::from(n_out);
    let stretch = scale.max(1.0); // the filter widens when the image shrinks
    let (support, shrink) = (2.0 * stretch, 1.0 / stretch);
    let centre = (f64::from(x) + 0.5) * scale;
    let start = (centre - support + 0.5) as u32; // saturates at 0
    let end = ((centre + support + 0.5) as u32).min(n_in);
    let weight = |i| bicubic((f64::from(i) - centre + 0.5) * shrink);
    let all: Vec<f64> = (start..end).map(weight).collect();
    let sum: f64 = all.iter().sum();
    let fixed = |weight: f64| {
        let scaled = weight / sum * f64::from(1 << BITS);
        (scaled + 0.5_f64.copysign(scaled)) as i32
    };
    (start, all.into_iter().map(fixed).collect())
}

/// Keys' cubic with a = -0.5.
fn bicubic(t: f64) -> f64 {
    const A: f64 = -0.5;
    match t.abs() {
        t if t < 1.0 => ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0,
        t if t < 2.0 => (((t - 5.0) * t + 8.0) * t - 4.0) * A,
        _ => 0.0,
    }
}

/// Bits behind the point of a weight. The weights of a pixel sum to 1, their magnitudes to less
/// than 2, so that the weighted sum of bytes fits an i32.
const BITS: u32 = 22;
/// Half a grey level, so that the shift in [`level`] rounds.
const HALF: i32 = 1 << (BITS - 1);

/// A weighted sum as a grey level.
fn level(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// `[3, width, rows]` to `[3, size, rows]`.
fn horizontal<'a>(rows: impl Iterator<Item = &'a [u8]>, across: &[Tap], fill: [u8; 3]) -> Vec<u8> {
    let mut narrow = Vec::with_capacity(rows.size_hint().0 * across.len() * 3);
    for row in rows {
        for tap in across {
            let [mut r, mut g, mut b] = fill.map(|fill| HALF + tap.padding * i32::from(fill));
            let pixels = row[3 * tap.first..].chunks_exact(3);
            for (pixel, weight) in pixels.zip(&tap.weights) {
                r += weight * i32::from(pixel[0]);
                g += weight * i32::from(pixel[1]);
                b += weight * i32::from(pixel[2]);
            }
            narrow.extend([r, g, b].map(level));
        }
    }
    narrow
}

/// `[3, size, rows]`, whose rows count from `first`, to `[3, size, size]`.
///
/// Rows of padding are still `fill` after the horizontal pass: their weights sum to 2²² but for
/// the rounding of each, which makes a difference far below half a level.
fn vertical(narrow: &[u8], first: usize, down: &[Tap], fill: [u8; 3]) -> Vec<u8> {
    let row = 3 * down.len();
    let mut square = Vec::with_capacity(row * down.len());
    for tap in down {
        let padding = fill.map(|fill| HALF + tap.padding * i32::from(fill));
        let mut sums = padding.repeat(down.len());
        let rows = narrow.chunks_exact(row).skip(tap.first - first);
        for (row, weight) in rows.zip(&tap.weights) {
            for (sum, byte) in sums.iter_mut().zip(row) {
                *sum += weight * i32::from(*byte);
            }
        }
        square.extend(sums.into_iter().map(level));
    }
    square
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::MAX_SIDE;
    use image::Rgb;

    const GREY: Normalize = Normalize { mean: [0.5; 3], std: [0.5; 3] };

    fn to(size: u32, resize: Resize) -> Preprocess {
        Preprocess { profile: Profile::Raw, center_crop: false, size, resize, towers: vec![GREY] }
    }

    fn pattern(w: u32, h: u32) -> RgbImage {
        let pixel = |x, y| [x * 37 + y * 11, x * x * 5 + y * 3, x * y * 13 + 100];
        RgbImage::from_fn(w, h, |x, y| Rgb(pixel(x, y).map(|v| v as u8)))
    }

    /// Small numbers that look random: Knuth's linear congruence, its high bits.
    fn below(state: &mut u64, n: u32) -> u32 {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((*state >> 33) % u64::from(n)) as u32
    }

    /// One sample of one pass, straight from the definition.
    fn sample(n_in: u32, n_out: u32, x: u32, pixel: impl Fn(u32) -> u8) -> u8 {
        let scale = f64::from(n_in) / f64::from(n_out);
        let (stretch, centre) = (scale.max(1.0), (f64::from(x) + 0.5) * scale);
        let start = i64::max((centre - 2.0 * stretch + 0.5) as i64, 0);
        let end = i64::min((centre + 2.0 * stretch + 0.5) as i64, i64::from(n_in));
        let weight = |i: i64| bicubic((i as f64 - centre + 0.5) * (1.0 / stretch));
        let total: f64 = (start..end).map(weight).sum();
        let fixed = |i: i64| (weight(i) / total * 4_194_304.0).round() as i64;
        let sum: i64 = (start..end).map(|i| fixed(i) * i64::from(pixel(i as u32))).sum();
        ((sum + 2_097_152) >> 22).clamp(0, 255) as u8
    }

    /// Pad, resize and crop, each whole and in turn.
    fn twin(image: &RgbImage, size: u32, resize: Resize) -> RgbImage {
        let (mut image, (w, h)) = (image.clone(), image.dimensions());
        if let Resize::Letterbox { fill } = resize {
            let (left, top) = ((w.max(h) - w) / 2, (w.max(h) - h) / 2);
            let mut frame = RgbImage::from_pixel(w + 2 * left, h + 2 * top, Rgb(fill));
            image::imageops::replace(&mut frame, &image, left.into(), top.into());
            image = frame;
        }
        let (w, h) = image.dimensions();
        let (to_w, to_h) = match resize {
            Resize::Naive => (size, size),
            _ if w <= h => (size, size * h / w),
            _ => (size * w / h, size),
        };
        let wide = RgbImage::from_fn(to_w, h, |x, y| {
            Rgb([0, 1, 2].map(|c| sample(w, to_w, x, |i| image[(i, y)][c])))
        });
        let (left, top) = (centre(to_w - size), centre(to_h - size));
        RgbImage::from_fn(size, size, |x, y| {
            Rgb([0, 1, 2].map(|c| sample(h, to_h, top + y, |i| wide[(left + x, i)][c])))
        })
    }

    #[test]
    fn every_strategy_equals_its_naive_twin() {
        let mut seed = 1;
        for round in 0..40 {
            let (w, h) = (1 + below(&mut seed, 60), 1 + below(&mut seed, 60));
            let size = 14 + below(&mut seed, 20);
            // Every other image is black and white, which makes the cubic overshoot.
            let image = RgbImage::from_fn(w, h, |_, _| {
                let level = below(&mut seed, 256) as u8;
                Rgb([[level, !level, level / 3], [255 * (level >> 7); 3]][round % 2])
            });
            for resize in [Resize::Naive, Resize::Letterbox { fill: [127, 3, 250] }, Resize::Crop] {
                let got = to(size, resize).square(&image).unwrap();
                assert!(got == twin(&image, size, resize), "{w} x {h} to {size}, {resize:?}");
            }
        }
    }

    /// What Pillow 10.4 makes of [`pattern`]: the sum of all bytes, each times its place.
    #[test]
    fn bicubic_equals_pillow() {
        for ((w, h), want) in [((7, 5), 18_839_583), ((61, 47), 21_939_291)] {
            let square = to(14, Resize::Naive).square(&pattern(w, h)).unwrap();
            let got: u64 = (1..).zip(square.as_raw()).map(|(i, v)| i * u64::from(*v)).sum();
            assert_eq!(got, want, "{w} x {h}");
        }
    }

    #[test]
    fn a_square_of_the_right_size_is_untouched() {
        for resize in [Resize::Naive, Resize::Letterbox { fill: [9; 3] }, Resize::Crop] {
            assert!(to(30, resize).square(&pattern(30, 30)).unwrap() == pattern(30, 30));
        }
    }

    #[test]
    fn one_colour_stays_one_colour() {
        let color = [255, 127, 1];
        for (w, h) in [(1, 1), (3, 500), (333, 20), (1, MAX_SIDE), (MAX_SIDE, 1)] {
            let image = RgbImage::from_pixel(w, h, Rgb(color));
            for resize in [Resize::Naive, Resize::Letterbox { fill: color }, Resize::Crop] {
                let square = to(14, resize).square(&image).unwrap();
                assert!(square.pixels().all(|p| p.0 == color), "{w} x {h}, {resize:?}");
            }
        }
    }

    #[test]
    fn the_crop_rounds_half_to_even() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7, 8].map(centre), [0, 0, 1, 2, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn an_odd_letterbox_is_one_pixel_off_square() {
        // 17 x 14 gets one row above and one below, 17 x 16. Nothing is left to resize, and of
        // the 17 columns the crop starts at half a pixel, which rounds to column 0.
        let image = pattern(17, 14);
        let square = to(16, Resize::Letterbox { fill: [127; 3] }).square(&image).unwrap();
        let want = RgbImage::from_fn(16, 16, |x, y| match y {
            0 | 15 => Rgb([127; 3]),
            _ => image[(x, y - 1)],
        });
        assert!(square == want);
    }

    #[test]
    fn planes_are_per_tower_and_channel() {
        let first = Normalize { mean: [0.484375, 0.25, 0.5], std: [0.25, 0.5, 2.0] };
        let (image, towers) = (pattern(14, 14), vec![first, GREY]);
        let planes = Preprocess { towers, ..to(14, Resize::Naive) }.planes(&image).unwrap();
        assert_eq!(planes.len(), 6 * 14 * 14);
        for (i, got) in planes.iter().enumerate() {
            let (plane, tower) = (i / 196, [first, GREY][i / 588]);
            let byte = image.as_raw()[i % 196 * 3 + plane % 3];
            let want = (f32::from(byte) / 255.0 - tower.mean[plane % 3]) / tower.std[plane % 3];
            assert_eq!(got.to_bits(), want.to_bits(), "plane {plane}, element {i}");
        }
    }

    #[test]
    fn sizes_out_of_bounds_are_errors() {
        let error = |size, w, h| to(size, Resize::Crop).planes(&RgbImage::new(w, h)).unwrap_err();
        let why = |size, w, h| error(size, w, h).to_string();
        assert!(why(14, 0, 5).contains("0 x 5 pixels; each side may be 1 to 16384"));
        assert!(why(14, 1, MAX_SIDE + 1).contains("1 x 16385 pixels"));
        assert!(why(0, 5, 5).contains("0 pixels wide, not 14 to 1024"));
        assert!(why(u32::MAX, 5, 5).contains("4294967295 pixels wide"));
    }
}
