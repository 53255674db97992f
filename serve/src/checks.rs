//! Quick checks of a picture, in words: what a person would see at a glance. They look at pixels alone; whether the
//! channels are in the right order, or the picture stands on its head, only the model can tell.

use openvla::image::RgbImage;

/// Levels of a byte.
const WHITE: f64 = 255.0;

/// What is wrong with a picture at a glance; `bars` says whether black bars at its edges count.
pub fn picture(image: &RgbImage, bars: bool) -> Vec<String> {
    let light = Light::of(image);
    let percent = 100.0 * light.mean / WHITE;
    if light.mean < 0.06 * WHITE {
        return vec![format!("The picture is too dark: {percent:.0} % of white on average.")];
    }
    if light.mean > 0.95 * WHITE {
        return vec![format!("The picture is too bright: {percent:.0} % of white on average.")];
    }
    let mut found = Vec::new();
    if light.deviation < 0.012 * WHITE {
        found.push("The picture is of nearly one color: is something in front of the lens?".into());
    } else if light.color < 0.008 * WHITE {
        found.push("The picture is grey: the camera, or its driver, gives no colors.".into());
    }
    if bars {
        found.extend(black_bars(image));
    }
    found
}

/// What is counted of all pixels.
struct Light {
    /// Mean of all channels.
    mean: f64,
    /// Standard deviation of the pixels' means.
    deviation: f64,
    /// Mean difference between the highest and the lowest channel of a pixel.
    color: f64,
}

impl Light {
    fn of(image: &RgbImage) -> Self {
        let (mut sum, mut squares, mut color) = (0_u64, 0_u64, 0_u64);
        for pixel in image.as_raw().chunks_exact(3) {
            let light: u64 = pixel.iter().map(|byte| u64::from(*byte)).sum(); // three times the mean
            let [r, g, b] = [pixel[0], pixel[1], pixel[2]];
            sum += light;
            squares += light * light;
            color += u64::from(r.max(g).max(b) - r.min(g).min(b));
        }
        let n = (image.as_raw().len() / 3).max(1) as f64;
        let mean = sum as f64 / n / 3.0;
        let variance = squares as f64 / n / 9.0 - mean * mean;
        Self { mean, deviation: variance.max(0.0).sqrt(), color: color as f64 / n }
    }
}

/// The highest byte of a black bar; the picture's resizing has rounded it.
const BLACK: u8 = 12;

/// The least share of a side that bars take.
const LEAST: f64 = 0.04;

/// Bars along the picture's edges.
fn black_bars(image: &RgbImage) -> Option<String> {
    let (width, height) = image.dimensions();
    let is_black = |x, y| image.get_pixel(x, y).0.iter().all(|byte| *byte <= BLACK);
    let row = |y: u32| (0..width).all(|x| is_black(x, y));
    let column = |x: u32| (0..height).all(|y| is_black(x, y));
    let ends = |n: u32, is_bar: &dyn Fn(u32) -> bool| {
        let first = (0..n).take_while(|i| is_bar(*i)).count();
        let last = (0..n).rev().take_while(|i| is_bar(*i)).count();
        first + last
    };
    let (rows, columns) = (ends(height, &row), ends(width, &column));
    let counts = |bars: usize, side: u32| bars as f64 >= LEAST * f64::from(side);
    let found = match (counts(rows, height), counts(columns, width)) {
        (true, _) => format!("{rows} of {height} rows"),
        (_, true) => format!("{columns} of {width} columns"),
        _ => return None,
    };
    Some(format!(
        "The picture has black bars, {found}: send the camera's picture as it is, without a border."
    ))
}

#[cfg(test)]
mod tests {
    use openvla::image::Rgb;

    use super::*;

    /// Something with light, shadow and color.
    fn scene() -> RgbImage {
        RgbImage::from_fn(100, 50, |x, y| Rgb([2 * x, 4 * y, 100].map(|byte| byte as u8)))
    }

    fn changed(change: impl Fn(u32, u32, [u8; 3]) -> [u8; 3]) -> Vec<String> {
        let mut image = scene();
        image.enumerate_pixels_mut().for_each(|(x, y, pixel)| pixel.0 = change(x, y, pixel.0));
        picture(&image, true)
    }

    #[test]
    fn a_sound_picture_is_not_complained_of() {
        assert!(picture(&scene(), true).is_empty());
    }

    #[test]
    fn each_fault_is_named_and_no_other() {
        let grey = |_, _, [r, g, b]: [u8; 3]| [r / 3 + g / 3 + b / 3; 3];
        let rows = |_, y, pixel| if (2..48).contains(&y) { pixel } else { [3; 3] };
        let columns = |x, _, pixel| if x < 95 { pixel } else { [0; 3] };
        for (found, word) in [
            (changed(|_, _, pixel| pixel.map(|byte| byte / 10)), "dark: 4 %"),
            (changed(|_, _, pixel| pixel.map(|byte| 250 + byte % 6)), "bright: 99 %"),
            (changed(|_, _, _| [90, 120, 100]), "one color"),
            (changed(grey), "grey"),
            (changed(rows), "4 of 50 rows"),
            (changed(columns), "5 of 100 columns"),
        ] {
            assert!(found.len() == 1 && found[0].contains(word), "{word}: {found:?}");
        }
        let thin = changed(|_, y, pixel| if y > 0 { pixel } else { [0; 3] });
        assert!(thin.is_empty(), "one row is no bar: {thin:?}");
        assert!(picture(&RgbImage::new(0, 0), true).len() == 1, "and nothing panics");
    }
}
