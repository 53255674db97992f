//! Profiles: what is done to a camera's picture before the model's own image processor.
//!
//! in   `[3, width, height]`  RGB bytes
//! out  `[3, width, height]` of the picture, or `[3, size, size]`
//!
//! OpenVLA's evaluations in simulation, and OpenVLA-OFT's policy, prepare pictures with TensorFlow, as
//! its training data were: a JPEG round trip, a Lanczos resize, and a center crop. A model that was
//! trained on such pictures does worse on others. What comes out has the model's size, so that
//! [`Preprocess`](crate::Preprocess) only normalizes it.
//!
//! Bit-exact with TensorFlow 2.15 on x86.
//!
//! ref: openvla `experiments/robot/libero/libero_utils.py` `get_libero_image`, `resize_image`;
//! `experiments/robot/openvla_utils.py` `crop_and_resize`, `get_vla_action`; openvla-oft
//! `experiments/robot/openvla_utils.py` `resize_image_for_policy`, `center_crop_image`,
//! `prepare_images_for_vla`

mod crop;
mod jpeg;
mod lanczos;

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use image::{RgbImage, imageops};

use crate::decode::check_sides;
use crate::{Error, Result};

/// Sides of the square that towers see, in pixels: from one patch to beyond any tower there is.
pub(crate) const SIZES: std::ops::RangeInclusive<u32> = 14..=1024;

/// Where pictures come from, and what the reference does to them before the image processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// `raw`: a camera, as OpenVLA's server has it. Nothing is done; the image processor resizes.
    #[default]
    Raw,
    /// `oft`: a camera, as OpenVLA-OFT's policy and server have it. A picture that is not of the
    /// model's size makes a JPEG round trip and is resized.
    Oft,
    /// `libero`: frames of LIBERO's simulator as it renders them, upside down. They are rotated by
    /// 180°, make a JPEG round trip whatever their size, and are resized, as the evaluations of
    /// OpenVLA and of OpenVLA-OFT do it. Pictures that a client rotated already are `oft`.
    Libero,
}

impl Profile {
    /// All profiles.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Oft, Self::Libero];

    /// Its name, on command lines and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Oft => "oft",
            Self::Libero => "libero",
        }
    }

    /// Prepares a picture for a model of `size` pixels a side. `center_crop` cuts out the middle nine
    /// tenths of its area, at last, and makes that `size` pixels wide and high: models that were trained
    /// with random crops (`image_aug`) expect it.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] if a side is not in 1 to 16384 pixels, or `size` not in 14 to 1024.
    pub fn prepare(
        self,
        image: &RgbImage,
        size: u32,
        center_crop: bool,
    ) -> Result<Cow<'_, RgbImage>> {
        check_sides(image.width(), image.height())?;
        check_size(size)?;
        let has_size = image.dimensions() == (size, size);
        let image = match self {
            Self::Libero => Cow::Owned(resize(&imageops::rotate180(image), size)?),
            Self::Oft if !has_size => Cow::Owned(resize(image, size)?),
            Self::Oft | Self::Raw => Cow::Borrowed(image),
        };
        Ok(if center_crop { Cow::Owned(crop::center(&image, size)) } else { image })
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|profile| profile.name() == name);
        found.ok_or_else(|| format!("{} is wanted", Self::ALL.map(Self::name).join(", or ")))
    }
}

/// A square that a tower may want.
pub(crate) fn check_size(size: u32) -> Result<()> {
    if SIZES.contains(&size) {
        return Ok(());
    }
    let (least, most) = (SIZES.start(), SIZES.end());
    let why = format!("the model wants it {size} pixels wide, not {least} to {most}");
    Err(Error::Image { why })
}

/// A JPEG round trip and a resize, whatever the picture's shape.
///
/// ref: `resize_image`, `resize_image_for_policy`
fn resize(image: &RgbImage, size: u32) -> Result<RgbImage> {
    let image = jpeg::round_trip(image).map_err(|why| Error::Image { why })?;
    Ok(lanczos::resize(&image, size))
}
