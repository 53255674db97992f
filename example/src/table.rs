//! The picture: an eggplant and a pot on a wooden table.
//!
//! Coordinates are pixels, x to the right, y down. Colors are red, green, blue from 0 to 255.

use anyhow::Result;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{Rgb, RgbImage};

const WIDTH: u32 = 320;
const HEIGHT: u32 = 240;
/// Samples per pixel and axis: smooth edges.
const SAMPLES: u32 = 3;
/// Colors are multiples of this: hardly seen, and it keeps the file small.
const STEP: u32 = 4;

type Point = [f32; 2];
type Color = [f32; 3];

/// Draws the picture, 320 × 240.
pub fn table_image() -> RgbImage {
    RgbImage::from_fn(WIDTH, HEIGHT, |x, y| {
        let mut sum = [0.0; 3];
        for sample in 0..SAMPLES * SAMPLES {
            let offset = |i: u32| (i as f32 + 0.5) / SAMPLES as f32;
            let at = [x as f32 + offset(sample % SAMPLES), y as f32 + offset(sample / SAMPLES)];
            let color = scene(at);
            sum = [0, 1, 2].map(|c| sum[c] + color[c]);
        }
        Rgb(sum.map(|c| (c / (STEP * SAMPLES * SAMPLES) as f32).round() as u8 * STEP as u8))
    })
}

/// The picture as a PNG file.
pub fn table_png() -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let encoder =
        PngEncoder::new_with_quality(&mut file, CompressionType::Best, FilterType::Adaptive);
    table_image().write_with_encoder(encoder)?;
    Ok(file)
}

/// The nearest thing at a point.
fn scene(p: Point) -> Color {
    eggplant(p).or_else(|| pot(p)).or_else(|| table(p)).unwrap_or_else(|| wall(p))
}

fn wall([_, y]: Point) -> Color {
    scale([220.0, 224.0, 222.0], 1.0 - y / 900.0)
}

/// Six planks that run towards a vanishing point, the front edge, and what the things shade.
fn table(p: Point) -> Option<Color> {
    let [x, y] = p;
    let (back, front) = (78.0, 224.0);
    let across = (x - 160.0) / (98.0 + 0.57 * (y.min(front) - back)); // -1 … 1, left to right
    if y < back || across.abs() > 1.0 {
        return None;
    }
    if y > front {
        return Some([116.0, 78.0, 46.0]);
    }
    let plank = 3.0 * (across + 1.0);
    let tone = [1.0, 0.95, 1.04, 0.97, 1.02, 0.94][plank.min(5.9) as usize];
    let seam = if (plank - plank.round()).abs() < 0.02 { 0.8 } else { 1.0 };
    let light = 0.9 + 0.1 * (y - back) / (front - back);
    let under_pot = shade(ellipse(p, [228.0, 152.0], [52.0, 15.0]));
    let under_eggplant = shade(ellipse(p, [112.0, 188.0], [56.0, 16.0]));
    Some(scale([196.0, 148.0, 98.0], tone * seam * light * under_pot * under_eggplant))
}

/// A steel pot seen from above: the opening, the rim, the body, two handles.
fn pot(p: Point) -> Option<Color> {
    let [x, y] = p;
    let (rim, bottom) = ([216.0, 100.0], [216.0, 146.0]);
    if ellipse(p, rim, [40.0, 12.0]) < 1.0 {
        return Some(scale([58.0, 62.0, 68.0], 0.8 + (y - 88.0) / 60.0));
    }
    if ellipse(p, rim, [44.0, 15.0]) < 1.0 {
        return Some([208.0, 212.0, 216.0]);
    }
    let half = 43.0 - 0.12 * (y - rim[1]); // narrower below
    let on_side = y > rim[1] && y < bottom[1] && (x - rim[0]).abs() < half;
    if on_side || ellipse(p, bottom, [37.5, 13.0]) < 1.0 {
        let turn = (x - rim[0]) / half + 0.4; // 0 where the light falls
        return Some(scale([176.0, 182.0, 190.0], 1.0 - 0.32 * turn * turn));
    }
    let handle = |center: Point| {
        let r = ellipse(p, center, [11.0, 7.0]);
        (0.35..1.0).contains(&r)
    };
    (handle([168.0, 110.0]) || handle([264.0, 110.0])).then_some([74.0, 76.0, 82.0])
}

/// An eggplant on its side, the stem towards the pot.
fn eggplant(p: Point) -> Option<Color> {
    const NECK: Point = [136.0, 158.0];
    const CAP: Point = [144.0, 154.0];
    let stem = limb(p, CAP, 5.0, [166.0, 142.0], 3.5);
    let leaf = |tip: Point| limb(p, CAP, 8.0, tip, 1.0);
    if stem < 0.0 {
        return Some([88.0, 118.0, 52.0]);
    }
    if leaf([122.0, 150.0]) < 0.0 || leaf([122.0, 164.0]) < 0.0 || leaf([136.0, 174.0]) < 0.0 {
        return Some([104.0, 142.0, 60.0]);
    }
    let depth = -limb(p, [84.0, 178.0], 25.0, NECK, 13.0); // 0 at the edge, 25 at the heart
    if depth < 0.0 {
        return None;
    }
    if limb(p, [78.0, 167.0], 5.0, [112.0, 154.0], 2.5) < 0.0 {
        return Some([148.0, 110.0, 170.0]);
    }
    Some(scale([98.0, 48.0, 122.0], 0.6 + 0.4 * (depth / 14.0).min(1.0)))
}

/// Signed distance to a round limb that goes from `a` to `b` and changes its radius on the way.
fn limb(p: Point, a: Point, radius_a: f32, b: Point, radius_b: f32) -> f32 {
    let [dx, dy] = [b[0] - a[0], b[1] - a[1]];
    let [px, py] = [p[0] - a[0], p[1] - a[1]];
    let along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clamp(0.0, 1.0);
    let [x, y] = [px - along * dx, py - along * dy];
    (x * x + y * y).sqrt() - (radius_a + along * (radius_b - radius_a))
}

/// Below 1 inside an upright ellipse.
fn ellipse(p: Point, center: Point, radii: Point) -> f32 {
    let [x, y] = [(p[0] - center[0]) / radii[0], (p[1] - center[1]) / radii[1]];
    x * x + y * y
}

/// How much light a soft shadow leaves, `r` being the ellipse's.
fn shade(r: f32) -> f32 {
    0.6 + 0.4 * r.min(1.0)
}

fn scale(color: Color, by: f32) -> Color {
    color.map(|c| c * by)
}
