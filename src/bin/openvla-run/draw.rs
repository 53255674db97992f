//! Draws an explanation: the picture, then for each number of a motion where the model looked, and how likely each
//! value was.

use std::io::Cursor;

use anyhow::Result;
use font8x8::{BASIC_FONTS, LATIN_FONTS, UnicodeFonts};
use openvla::image::imageops::{FilterType, resize};
use openvla::image::{ImageFormat, Rgb, RgbImage};
use openvla::{ActionSpace, Explanation, dimension_name};

/// The side of each picture.
const SIDE: u32 = 224;
/// The height of a distribution.
const BARS: u32 = 56;
/// Between things.
const GAP: u32 = 12;
/// A line of text.
const LINE: u32 = 11;
/// Panels next to each other.
const ACROSS: u32 = 4;
const PANEL: [u32; 2] = [SIDE, LINE + SIDE + LINE + BARS + LINE];

const PAPER: Rgb<u8> = Rgb([255; 3]);
const INK: Rgb<u8> = Rgb([30, 32, 34]);
const SOFT: Rgb<u8> = Rgb([100, 106, 112]);
const BAR: Rgb<u8> = Rgb([11, 92, 171]);
/// What the most looked at patch is painted with.
const HEAT: [f64; 3] = [255.0, 150.0, 0.0];

/// A PNG file of an explanation.
pub fn png(explanation: &Explanation, space: ActionSpace, instruction: &str) -> Result<Vec<u8>> {
    let action = &explanation.action;
    let picture = resize(&explanation.shown, SIDE, SIDE, FilterType::CatmullRom);
    let n = explanation.attention.len();
    let panels = 1 + n as u32;
    let (columns, rows) = (ACROSS.min(panels), panels.div_ceil(ACROSS));
    let mut page = RgbImage::from_pixel(edge(columns, PANEL[0]), edge(rows, PANEL[1]), PAPER);
    let corner = |i: u32| [edge(i % ACROSS, PANEL[0]), edge(i / ACROSS, PANEL[1])];

    let at = corner(0);
    write(&mut page, at, "what the model sees", INK);
    paste(&mut page, [at[0], at[1] + LINE], &picture);
    let mut y = at[1] + LINE + SIDE + 4;
    for line in wrapped(instruction, (SIDE / 8) as usize).iter().take(5) {
        write(&mut page, [at[0], y], line, INK);
        y += LINE;
    }
    write(&mut page, [at[0], y + 4], &format!("in {}", action.unnorm_key), SOFT);

    // A motion that ended early has fewer tokens than numbers, the last ones.
    let missing = action.action.len() - n;
    for (i, looks) in explanation.attention.iter().enumerate() {
        let at = corner(1 + i as u32);
        let [x, mut y] = at;
        let dimension = missing + i;
        let name = dimension_name(dimension, action.action.len());
        write(&mut page, [x, y], &format!("{name} {:.5}", action.action[dimension]), INK);
        y += LINE;
        paste(&mut page, [x, y], &heated(&picture, looks));
        y += SIDE + 3;
        let share = 100.0 * looks.iter().sum::<f64>();
        write(&mut page, [x, y], &format!("{share:.0} % on the picture"), SOFT);
        y += LINE - 3;
        let p = space.probabilities(&action.logits[i]);
        bars(&mut page, [x, y], &p);
        let best = p.iter().copied().fold(0.0, f64::max);
        let said = format!("-1{:^24}1", format!("best {:.0} %", 100.0 * best));
        write(&mut page, [x, y + BARS + 2], &said, SOFT);
    }
    let mut file = Cursor::new(Vec::new());
    page.write_to(&mut file, ImageFormat::Png)?;
    Ok(file.into_inner())
}

/// Where the panel after `n` others begins, or the page ends.
fn edge(n: u32, side: u32) -> u32 {
    GAP + n * (side + GAP)
}

/// The picture, darker and without its colors, with the patches as bright as they were looked at; the most looked at is
/// the brightest, whatever its share.
fn heated(picture: &RgbImage, looks: &[f64]) -> RgbImage {
    let side = (looks.len() as f64).sqrt().round() as u32;
    let most = looks.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let mut heated = picture.clone();
    for (x, y, pixel) in heated.enumerate_pixels_mut() {
        let patch = (y * side / SIDE) * side + x * side / SIDE;
        let heat = looks.get(patch as usize).map_or(0.0, |look| look / most);
        let light: f64 = pixel.0.iter().map(|byte| f64::from(*byte)).sum::<f64>() / 3.0;
        let mix = |heat_to: f64| {
            (0.5 * light * (1.0 - heat) + heat * (0.25 * light + 0.75 * heat_to)) as u8
        };
        pixel.0 = HEAT.map(mix);
    }
    heated
}

/// The probability of each value, the lowest on the left; of ids, the highest is the lowest value.
fn bars(page: &mut RgbImage, [x, y]: [u32; 2], p: &[f64]) {
    for dx in 0..SIDE {
        page.put_pixel(x + dx, y + BARS - 1, SOFT);
        // A column of the page stands for one id or more: the likeliest is shown.
        let ids = |column: u32| (column as usize * p.len()).div_ceil(SIDE as usize);
        let of = p.iter().rev().skip(ids(dx)).take((ids(dx + 1) - ids(dx)).max(1));
        let height = (of.copied().fold(0.0, f64::max) * f64::from(BARS - 1)).round() as u32;
        (0..height).for_each(|dy| page.put_pixel(x + dx, y + BARS - 2 - dy, BAR));
    }
}

fn paste(page: &mut RgbImage, [x, y]: [u32; 2], picture: &RgbImage) {
    picture.enumerate_pixels().for_each(|(dx, dy, pixel)| page.put_pixel(x + dx, y + dy, *pixel));
}

/// Writes letters of 8 x 8 pixels, as many as there is room for.
fn write(page: &mut RgbImage, [x, y]: [u32; 2], text: &str, color: Rgb<u8>) {
    for (i, letter) in text.chars().take((SIDE / 8) as usize).enumerate() {
        let glyph = BASIC_FONTS.get(letter).or_else(|| LATIN_FONTS.get(letter));
        let glyph = glyph.unwrap_or([0x3c, 0x42, 0x40, 0x30, 0x08, 0x00, 0x08, 0x00]); // a question mark
        for (dy, row) in (0..).zip(glyph) {
            for dx in (0..8).filter(|dx| row >> dx & 1 == 1) {
                page.put_pixel(x + 8 * i as u32 + dx, y + dy, color);
            }
        }
    }
}

/// Words in lines of at most so many letters.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
