//! A JPEG round trip, as TensorFlow's `encode_jpeg` and `decode_image` make it: quality 95, 4:2:0, and
//! back with the fast inverse DCT.

use image::RgbImage;
use openvla_kernels::decode_jpeg_fast;
use turbojpeg::{Image, PixelFormat, Subsamp};

/// ref: TensorFlow 2.15 `encode_jpeg_op.cc`, whose quality is 95 and whose colors are 4:2:0 unless told
/// otherwise; `jpeg_mem.cc`, whose decoder takes `JDCT_IFAST` unless told otherwise
pub fn round_trip(image: &RgbImage) -> Result<RgbImage, String> {
    let (width, height) = image.dimensions();
    let [across, down] = [width, height].map(|side| side as usize);
    let format = PixelFormat::RGB;
    let pixels = image.as_raw().as_slice();
    let samples = Image { pixels, width: across, pitch: 3 * across, height: down, format };
    let failed = |why: &dyn std::fmt::Display| format!("its JPEG round trip failed: {why}");
    let file = turbojpeg::compress(samples, 95, Subsamp::Sub2x2).map_err(|why| failed(&why))?;
    let pixels = decode_jpeg_fast(&file, across, down).map_err(|why| failed(&why))?;
    Ok(RgbImage::from_raw(width, height, pixels).expect("a decoder fills every pixel"))
}
