//! TensorFlow's center crop: the middle nine tenths of the area, bilinear.
//!
//! All in f32, every operation in the reference's order.
//!
//! ref: openvla `crop_and_resize`; TensorFlow 2.15 `crop_and_resize_op.cc`, `image_ops_impl.py`
//! `convert_image_dtype`

use image::RgbImage;

/// What is left of the area.
const AREA: f32 = 0.9;

/// Where an output pixel is between two input pixels.
struct Neighbors {
    low: usize,
    high: usize,
    fraction: f32,
}

/// The middle, with the picture's aspect ratio, as `size` pixels a side.
pub fn center(image: &RgbImage, size: u32) -> RgbImage {
    let across = neighbors(image.width(), size);
    let down = neighbors(image.height(), size);
    let row = 3 * image.width() as usize;
    let level = |y: usize, x: usize, channel| {
        f32::from(image.as_raw()[y * row + 3 * x + channel]) * (1.0 / 255.0)
    };
    let mut pixels = Vec::with_capacity(3 * across.len() * down.len());
    for y in &down {
        for x in &across {
            for channel in 0..3 {
                let between = |y| {
                    let left = level(y, x.low, channel);
                    left + (level(y, x.high, channel) - left) * x.fraction
                };
                let top = between(y.low);
                let blend = top + (between(y.high) - top) * y.fraction;
                pixels.push((blend.clamp(0.0, 1.0) * 255.5) as u8); // truncates and saturates
            }
        }
    }
    RgbImage::from_raw(size, size, pixels).expect("a place for every pixel")
}

/// The neighbors of one side.
fn neighbors(n_in: u32, n_out: u32) -> Vec<Neighbors> {
    let side = AREA.sqrt();
    let start = (1.0 - side) / 2.0;
    let last = (n_in - 1) as f32;
    let step = (start + side - start) * last / (n_out - 1) as f32;
    let between = |x| {
        let at = start * last + x as f32 * step;
        let low = at.floor();
        Neighbors { low: low as usize, high: at.ceil() as usize, fraction: at - low }
    };
    (0..n_out).map(between).collect()
}
