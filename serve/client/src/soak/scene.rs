//! Pictures that a policy answers differently.

use std::io::Cursor;

use anyhow::Result;
use openvla::image::{ImageFormat, Rgb, RgbImage};

/// What a robot sees and is asked, and what it must be told.
pub struct Scene {
    pub png: Vec<u8>,
    /// Red, green, blue, row by row.
    pub pixels: Vec<u8>,
    /// Pixels along the square picture.
    pub side: usize,
    pub instruction: String,
    /// What the model chose while nothing else ran.
    pub tokens: Vec<u32>,
    /// The same as a motion. Not all protocols have more digits.
    pub action: Vec<f32>,
}

const TASKS: [&str; 4] =
    ["put eggplant into pot", "put carrot on plate", "open the drawer", "move the cup left"];

/// Patchworks of sixteen colors, on which a model has no habit to fall back: each is answered differently, or nearly.
pub fn scenes() -> Result<Vec<Scene>> {
    let mut rng = fastrand::Rng::with_seed(7);
    (0..12)
        .map(|i| {
            let side = 128 + 16 * (i % 4);
            let colors: [[u8; 3]; 16] = std::array::from_fn(|_| [(); 3].map(|()| rng.u8(..)));
            let patch = |x: u32, y: u32| (4 * x / side + 4 * (4 * y / side)) as usize;
            let image = RgbImage::from_fn(side, side, |x, y| Rgb(colors[patch(x, y)]));
            let mut png = Cursor::new(Vec::new());
            image.write_to(&mut png, ImageFormat::Png)?;
            Ok(Scene {
                png: png.into_inner(),
                side: side as usize,
                pixels: image.into_raw(),
                instruction: TASKS[i as usize % TASKS.len()].to_owned(),
                tokens: Vec::new(),
                action: Vec::new(),
            })
        })
        .collect()
}
