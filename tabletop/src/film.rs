//! Films: an episode as a GIF.

use std::path::Path;

use anyhow::Result;
use image::codecs::gif::{GifEncoder, Repeat};
use image::{Delay, Frame, GenericImage, RgbaImage};
use openvla::cli::write;
use openvla::image::{DynamicImage, RgbImage};

use crate::episode::{Outcome, Pace, Policy, run};
use crate::render::{picture, wrist_picture};
use crate::world::World;

/// Milliseconds that a step is shown, and the last.
const SHOWN: u32 = 200;
const LAST: u32 = 1500;

/// Runs an episode and writes what the policy's cameras see, each `size` pixels square: the front
/// camera's on the left.
///
/// # Errors
/// Those of the policy, or if the file cannot be written.
pub fn film(
    out: &Path,
    world: World,
    policy: &mut dyn Policy,
    steps: usize,
    size: u32,
) -> Result<Outcome> {
    let mut pictures: Vec<RgbaImage> = Vec::new();
    let sees_wrist = policy.sees_wrist();
    let outcome = run(world, policy, Pace::Blocking, steps, &mut |world| {
        let front = picture(world, size);
        let frame =
            if sees_wrist { side_by_side(&front, &wrist_picture(world, size)) } else { front };
        pictures.push(DynamicImage::from(frame).into_rgba8());
    })?;
    let last = pictures.len() - 1;
    let frames = pictures.into_iter().enumerate().map(|(i, picture)| {
        let shown = if i == last { LAST } else { SHOWN };
        Frame::from_parts(picture, 0, 0, Delay::from_numer_denom_ms(shown, 1))
    });
    let mut film = Vec::new();
    let mut encoder = GifEncoder::new_with_speed(&mut film, 10);
    encoder.set_repeat(Repeat::Infinite)?;
    encoder.encode_frames(frames)?;
    drop(encoder);
    write(out, &film)?;
    Ok(outcome)
}

fn side_by_side(left: &RgbImage, right: &RgbImage) -> RgbImage {
    let mut both = RgbImage::new(left.width() + right.width(), left.height());
    both.copy_from(left, 0, 0).expect("it fits");
    both.copy_from(right, left.width(), 0).expect("it fits");
    both
}
