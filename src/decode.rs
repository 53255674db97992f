//! Decoding: the bytes of a picture file to RGB, as Pillow's `Image.open(..).convert("RGB")`.
//!
//! in   a whole PNG, JPEG, WebP or BMP file
//! out  `[3, width, height]` RGB bytes
//!
//! Gray is replicated, palettes are looked up and alpha is dropped, without blending. A 16-bit
//! sample becomes its high byte; for 16-bit gray without alpha Pillow 10.4 cuts off at 255
//! instead, which leaves a white picture, and there we part from it. 16-bit BMP may be one level
//! off. Neither the EXIF orientation nor a color profile is applied, as in Pillow. A JPEG with
//! damaged pixels is read as far as libjpeg makes sense of it, as Pillow does.
//!
//! Files come from strangers. [`Header::read`] looks at what a file says of itself before anything
//! is decoded, and a decoder that panics has refused the file.

mod contained;
mod jpeg;
mod webp;

use std::io::Cursor;

use image::codecs::bmp::BmpDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ImageDecoder, ImageFormat, Limits, RgbImage};

use crate::{Error, Result};
use contained::contained;
use jpeg::Jpeg;

/// The longest side of a picture, in pixels. Bounds what resizing it may cost.
pub const MAX_SIDE: u32 = 16_384;
/// The most pixels a file may hold. Pillow warns of a decompression bomb at a third more.
pub const MAX_PIXELS: usize = 1 << 26;
/// What may come out of a PNG's texts and profiles, in bytes. Pillow allows as much.
const MAX_ANCILLARY: u64 = 1 << 26;

/// What a picture file says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The picture's width, in pixels.
    pub width: u32,
    /// The picture's height, in pixels.
    pub height: u32,
    /// What decoding costs: samples of pixels, as often as the decoder passes over them.
    pub samples: u64,
    /// How often decoding may pass over the pixels, in all components.
    passes: u64,
}

impl Header {
    /// Reads what a file says of itself, without decoding any of its pixels.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] if it is not a file that [`decode`] reads, if it contradicts itself, or if a
    /// side is not in `1..=16384`.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        contained(|| File::read(bytes)).map(|file| file.header)
    }

    /// That of a file whose pixels are passed over once.
    fn of_pixels(width: u32, height: u32) -> Self {
        let samples = (u64::from(width) * u64::from(height)).saturating_mul(3);
        Self { width, height, samples, passes: 3 }
    }

    /// Whether the picture may be decoded where it may have `max_pixels`, and be as costly as a
    /// picture of so many is.
    fn check(&self, max_pixels: usize) -> Result<()> {
        let Self { width, height, samples, passes } = *self;
        let max_pixels = max_pixels.min(MAX_PIXELS) as u64;
        if u64::from(width) * u64::from(height) > max_pixels {
            let why =
                format!("it is {width} x {height} pixels; {max_pixels} in all may be decoded");
            return Err(Error::Image { why });
        }
        if samples > passes * max_pixels {
            let why = format!(
                "its scans pass over {samples} samples; {} in all may be decoded",
                passes * max_pixels
            );
            return Err(Error::Image { why });
        }
        Ok(())
    }
}

/// Decodes a picture file to RGB, `[3, width, height]`.
///
/// # Errors
///
/// [`Error::Image`] if the file is damaged, cut off or of another format, if a side is not in
/// `1..=16384`, or if there are more than 2²⁶ pixels. What the file says of itself is looked at
/// before pixels are read. [`Error::Decoder`] if the decoder panics.
pub fn decode(bytes: &[u8]) -> Result<RgbImage> {
    decode_within(bytes, MAX_PIXELS)
}

/// Decodes a picture file of at most `max_pixels` to RGB, `[3, width, height]`. No file costs more
/// than a picture of so many pixels does.
///
/// # Errors
///
/// Those of [`decode`].
pub fn decode_within(bytes: &[u8], max_pixels: usize) -> Result<RgbImage> {
    contained(|| {
        let file = File::read(bytes)?;
        file.header.check(max_pixels)?;
        file.decode()
    })
}

/// A file whose header has been read.
struct File<'a> {
    header: Header,
    content: Content<'a>,
}

enum Content<'a> {
    Jpeg(Jpeg),
    Png(&'a [u8]),
    WebP(&'a [u8]),
    Bmp(BmpDecoder<Cursor<&'a [u8]>>),
}

impl<'a> File<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self> {
        let (header, content) = match image::guess_format(bytes) {
            Ok(ImageFormat::Jpeg) => {
                let jpeg = Jpeg::read(bytes);
                (jpeg.header()?, Content::Jpeg(jpeg))
            }
            Ok(ImageFormat::Png) => (png_header(bytes)?, Content::Png(bytes)),
            Ok(ImageFormat::WebP) => (webp::header(bytes)?, Content::WebP(bytes)),
            Ok(ImageFormat::Bmp) => {
                let decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(failed("BMP"))?;
                let (width, height) = decoder.dimensions();
                (Header::of_pixels(width, height), Content::Bmp(decoder))
            }
            Ok(format) => return Err(refused(format!("it is {format:?}"))),
            Err(_) if bytes.is_empty() => return Err(refused("it is empty")),
            Err(_) => return Err(refused("its first bytes are of no known format")),
        };
        check_sides(header.width, header.height)?;
        Ok(Self { header, content })
    }

    fn decode(self) -> Result<RgbImage> {
        match self.content {
            Content::Jpeg(jpeg) => jpeg.decode(),
            Content::Png(bytes) => {
                let mut limits = Limits::no_limits();
                limits.max_alloc = Some(MAX_ANCILLARY);
                let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits);
                pixels(decoder.map_err(failed("PNG"))?, "PNG")
            }
            Content::WebP(bytes) => {
                let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(failed("WebP"))?;
                pixels(decoder, "WebP")
            }
            Content::Bmp(decoder) => pixels(decoder, "BMP"),
        }
    }
}

/// The sides in a PNG's first chunk.
fn png_header(bytes: &[u8]) -> Result<Header> {
    let sides = bytes.get(12..24).and_then(|chunk| chunk.strip_prefix(b"IHDR"));
    let Some(&[w3, w2, w1, w0, h3, h2, h1, h0]) = sides.and_then(<[u8]>::first_chunk) else {
        return Err(refused("it is a PNG without a header"));
    };
    let (width, height) = ([w3, w2, w1, w0], [h3, h2, h1, h0]);
    Ok(Header::of_pixels(u32::from_be_bytes(width), u32::from_be_bytes(height)))
}

/// The pixels of a decoder for PNG, WebP or BMP.
fn pixels(decoder: impl ImageDecoder, format: &'static str) -> Result<RgbImage> {
    let (width, height) = decoder.dimensions();
    let channels = usize::from(decoder.color_type().channel_count());
    let deep = usize::from(decoder.color_type().bytes_per_pixel()) == 2 * channels;
    let mut samples = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut samples).map_err(failed(format))?;
    if deep {
        let high = |pair: &[u8]| u16::from_ne_bytes([pair[0], pair[1]]).to_be_bytes()[0];
        samples = samples.chunks_exact(2).map(high).collect();
    }
    Ok(rgb(width, height, &samples, channels, |pixel| match *pixel {
        [r, g, b] | [r, g, b, _] => [r, g, b],
        _ => [pixel[0]; 3],
    }))
}

/// An image of `channels` samples a pixel, each pixel turned into RGB.
fn rgb(
    width: u32,
    height: u32,
    samples: &[u8],
    channels: usize,
    pixel: impl Fn(&[u8]) -> [u8; 3],
) -> RgbImage {
    let bytes = samples.chunks_exact(channels).flat_map(pixel).collect();
    RgbImage::from_raw(width, height, bytes).expect("decoders fill every pixel")
}

/// A picture that can be looked at: some pixels, and no side too long.
pub(crate) fn check_sides(width: u32, height: u32) -> Result<()> {
    if [width, height].iter().all(|side| (1..=MAX_SIDE).contains(side)) {
        return Ok(());
    }
    let why = format!("it is {width} x {height} pixels; each side may be 1 to {MAX_SIDE}");
    Err(Error::Image { why })
}

/// Not a picture that can be read.
fn refused(why: impl std::fmt::Display) -> Error {
    Error::Image { why: format!("{why}; PNG, JPEG, WebP and BMP are read") }
}

fn failed<E: std::fmt::Display>(format: &'static str) -> impl FnOnce(E) -> Error {
    move |error| refused(format!("decoding it as {format} failed: {error}"))
}

#[cfg(test)]
mod tests;
