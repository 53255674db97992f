//! Decoding: the bytes of a picture file to RGB, as Pillow's `Image.open(..).convert("RGB")`.
//!
//! in   a whole PNG, JPEG, WebP or BMP file
//! out  `[3, width, height]` RGB bytes
//!
//! Grey is replicated, palettes are looked up and alpha is dropped, without blending. A 16-bit
//! sample becomes its high byte; for 16-bit grey without alpha Pillow 10.4 cuts off at 255
//! instead, which leaves a white picture, and there we part from it. 16-bit BMP may be one level
//! off. Neither the EXIF orientation nor a colour profile is applied, as in Pillow.
//!
//! JPEG goes through libjpeg-turbo, which Pillow uses too: other decoders are off by some levels.

use std::io::Cursor;

use image::{ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};
use turbojpeg::{Colorspace, DecompressHeader, Decompressor, Image, PixelFormat};

use crate::{Error, Result};

/// The longest side of a picture, in pixels. Bounds what resizing it may cost.
pub const MAX_SIDE: u32 = 16_384;
/// The most pixels a file may hold. Pillow warns of a decompression bomb at a third more.
const MAX_PIXELS: u32 = 1 << 26;
/// What a decoder may need for itself, in bytes: 16-bit RGBA of [`MAX_PIXELS`].
const MAX_BYTES: u64 = 8 * MAX_PIXELS as u64;
/// Scans of a progressive JPEG. Encoders write about ten; each costs a pass over the picture.
const MAX_SCANS: u32 = 100;
/// libjpeg's warning of bytes between the last pixel and the end mark. Cheap cameras write them
/// and the pixels are whole, so we go on, as Pillow does. Other warnings mean lost pixels.
const PADDED_END: &str = "extraneous bytes before marker 0xd9";

/// Decodes a picture file to RGB, `[3, width, height]`.
///
/// # Errors
///
/// [`Error::Image`] if the file is damaged, cut off or of another format, if a side is not in
/// `1..=16384`, or if there are more than 2²⁶ pixels. Sizes are checked before pixels are
/// read.
pub fn decode(bytes: &[u8]) -> Result<RgbImage> {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg(bytes),
        Ok(format @ (ImageFormat::Png | ImageFormat::WebP | ImageFormat::Bmp)) => {
            other(bytes, format)
        }
        Ok(format) => Err(refused(format!("it is {format:?}"))),
        Err(_) if bytes.is_empty() => Err(refused("it is empty")),
        Err(_) => Err(refused("its first bytes are of no known format")),
    }
}

/// PNG, WebP and BMP.
fn other(bytes: &[u8], format: ImageFormat) -> Result<RgbImage> {
    let failed = |error| refused(format!("decoding it as {format:?} failed: {error}"));
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    check_size(width, height)?;
    let channels = usize::from(decoder.color_type().channel_count());
    let deep = usize::from(decoder.color_type().bytes_per_pixel()) == 2 * channels;
    let mut samples = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut samples).map_err(failed)?;
    if deep {
        let high = |pair: &[u8]| u16::from_ne_bytes([pair[0], pair[1]]).to_be_bytes()[0];
        samples = samples.chunks_exact(2).map(high).collect();
    }
    Ok(rgb(width, height, &samples, channels, |pixel| match *pixel {
        [r, g, b] | [r, g, b, _] => [r, g, b],
        _ => [pixel[0]; 3],
    }))
}

/// JPEG, with the accurate inverse DCT and smooth upsampling, as Pillow has libjpeg-turbo do it.
fn jpeg(bytes: &[u8]) -> Result<RgbImage> {
    let failed = |error| refused(format!("decoding it as JPEG failed: {error}"));
    let mut decoder = Decompressor::new().map_err(failed)?;
    decoder.set_scan_limit(MAX_SCANS).map_err(failed)?;
    let DecompressHeader { width, height, colorspace, .. } =
        decoder.read_header(bytes).map_err(failed)?;
    let sides = (width as u32, height as u32); // JPEG has 16 bits for each
    check_size(sides.0, sides.1)?;
    let format = match colorspace {
        Colorspace::CMYK | Colorspace::YCCK => PixelFormat::CMYK,
        _ => PixelFormat::RGB,
    };
    let pitch = width * format.size();
    let mut samples = vec![0; pitch * height];
    let image = Image { pixels: samples.as_mut_slice(), width, pitch, height, format };
    match decoder.decompress(bytes, image) {
        Err(turbojpeg::Error::TurboJpegError(why)) if why.contains(PADDED_END) => {}
        decoded => decoded.map_err(failed)?,
    }
    Ok(rgb(sides.0, sides.1, &samples, format.size(), |pixel| match *pixel {
        [c, m, y, k] => [c, m, y].map(|ink| over_black(ink, k)),
        _ => [pixel[0], pixel[1], pixel[2]],
    }))
}

/// One channel of a CMYK pixel. Ink is stored inverted, as Adobe does: 255 is none.
///
/// ref: Pillow `Convert.c` `cmyk2rgb`, whose division by 255 rounds
fn over_black(ink: u8, black: u8) -> u8 {
    let product = u32::from(255 - ink) * u32::from(black) + 128;
    black - (((product >> 8) + product) >> 8) as u8
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

/// No more pixels than we care to decode.
fn check_size(width: u32, height: u32) -> Result<()> {
    check_sides(width, height)?;
    if width * height <= MAX_PIXELS {
        return Ok(());
    }
    let why = format!("it is {width} x {height} pixels; {MAX_PIXELS} in all may be decoded");
    Err(Error::Image { why })
}

/// Not a picture that can be read.
fn refused(why: impl std::fmt::Display) -> Error {
    Error::Image { why: format!("{why}; PNG, JPEG, WebP and BMP are read") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{DynamicImage, GrayAlphaImage, GrayImage, ImageBuffer, RgbaImage};
    use image::{Luma, LumaA, Rgb, Rgba};

    fn file(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        image.into().write_to(&mut file, format).unwrap();
        file.into_inner()
    }

    fn picture() -> RgbImage {
        RgbImage::from_fn(19, 7, |x, y| Rgb([x * 13, y * 30, x ^ y].map(|v| v as u8)))
    }

    /// A JPEG of 21 x 13 pixels with 4:2:0 chroma, of 3 or 4 channels.
    fn jpeg_file(format: PixelFormat) -> Vec<u8> {
        let pitch = 21 * format.size();
        let pixels: Vec<u8> = (0..13 * pitch).map(|i| (i * i / 40 + 9 * (i % 4)) as u8).collect();
        let image = Image { pixels: pixels.as_slice(), width: 21, pitch, height: 13, format };
        turbojpeg::compress(image, 75, turbojpeg::Subsamp::Sub2x2).unwrap().to_vec()
    }

    fn why(bytes: &[u8]) -> String {
        decode(bytes).unwrap_err().to_string()
    }

    #[test]
    fn lossless_formats_come_back_as_they_were() {
        for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp] {
            assert!(decode(&file(picture(), format)).unwrap() == picture(), "{format:?}");
        }
    }

    #[test]
    fn grey_is_replicated_alpha_dropped_and_the_high_byte_kept() {
        let check = |image: DynamicImage, want: [u8; 3]| {
            let got = decode(&file(image, ImageFormat::Png)).unwrap();
            assert_eq!(got.into_raw(), want);
        };
        check(GrayImage::from_pixel(1, 1, Luma([9])).into(), [9, 9, 9]);
        check(GrayAlphaImage::from_pixel(1, 1, LumaA([9, 0])).into(), [9, 9, 9]);
        check(RgbaImage::from_pixel(1, 1, Rgba([1, 2, 3, 0])).into(), [1, 2, 3]);
        let [r, g, b] = [0x12FF_u16, 0xFE80, 0x00FF];
        check(ImageBuffer::from_pixel(1, 1, Luma([r])).into(), [0x12; 3]);
        check(ImageBuffer::from_pixel(1, 1, LumaA([r, 0])).into(), [0x12; 3]);
        check(ImageBuffer::from_pixel(1, 1, Rgb([r, g, b])).into(), [0x12, 0xFE, 0]);
        check(ImageBuffer::from_pixel(1, 1, Rgba([r, g, b, 0])).into(), [0x12, 0xFE, 0]);
    }

    #[test]
    fn a_palette_is_looked_up_even_where_it_is_transparent() {
        // Written by Pillow: 3 x 2 pixels, 2 bits each, alpha 0, 128 and 255.
        let file =
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x03\0\0\0\x02\x02\x03\0\0\0\xe0\x1a\x8e\x89\
            \0\0\0\tPLTE\xfa\x01\x02\x03\xf0\x05\x06\x07\xe6\x20\x55\xce\x8a\
            \0\0\0\x03tRNS\0\x80\xff\xec\xf7\xb3\x18\
            \0\0\0\x0cIDAT\x78\xda\x63\x90\x60\x98\0\0\0\xdc\0\xa9\x52\x1a\x13\x8f\
            \0\0\0\0IEND\xae\x42\x60\x82";
        let [a, b, c] = [[250, 1, 2], [3, 240, 5], [6, 7, 230]];
        assert_eq!(decode(file).unwrap().into_raw(), [a, b, c, c, b, a].concat());
    }

    /// What Pillow 10.4 reads: the first pixels, and the sum of all bytes times their place.
    #[test]
    fn jpeg_equals_pillow() {
        let colour = (PixelFormat::RGB, [2, 15, 8, 0, 5, 5], 41_422_644);
        let print = (PixelFormat::CMYK, [0, 1, 4, 0, 1, 0], 19_099_069);
        for (format, first, want) in [colour, print] {
            let image = decode(&jpeg_file(format)).unwrap();
            assert_eq!(image.as_raw()[..6], first, "{format:?}");
            let sum: u64 = (1..).zip(image.as_raw()).map(|(i, v)| i * u64::from(*v)).sum();
            assert_eq!(sum, want, "{format:?}");
        }
    }

    #[test]
    fn padding_before_the_end_mark_is_ignored_and_a_cut_is_not() {
        let whole = jpeg_file(PixelFormat::RGB);
        let body = &whole[..whole.len() - 2];
        let padded = [body, &[0; 5], &[0xFF, 0xD9]].concat();
        assert!(decode(&padded).unwrap() == decode(&whole).unwrap());
        assert!(why(body).contains("JPEG failed"), "{}", why(body));
    }

    #[test]
    fn a_file_that_is_cut_off_is_an_error() {
        let files = [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp]
            .map(|format| file(picture(), format));
        for file in files.iter().chain([&jpeg_file(PixelFormat::RGB)]) {
            for length in 0..file.len() * 3 / 4 {
                assert!(decode(&file[..length]).is_err(), "{length} of {} bytes", file.len());
            }
        }
    }

    #[test]
    fn what_is_no_picture_is_named() {
        assert!(why(b"").contains("it is empty; PNG, JPEG, WebP and BMP are read"));
        assert!(why(b"GIF89a").contains("it is Gif"));
        assert!(why(b"hello").contains("no known format"));
    }

    #[test]
    fn sizes_are_refused_before_pixels_are_read() {
        let wide = file(RgbImage::new(16_385, 1), ImageFormat::Png);
        assert!(why(&wide).contains("16385 x 1 pixels; each side may be 1 to 16384"));
        let mut large = file(RgbImage::new(1, 1), ImageFormat::Bmp);
        large[18..26].copy_from_slice(&[0, 0x40, 0, 0, 0, 0x40, 0, 0]); // both sides 2¹⁴
        assert!(why(&large).contains("16384 x 16384 pixels; 67108864 in all"), "{}", why(&large));
        let mut bomb = jpeg_file(PixelFormat::RGB);
        let frame = bomb.windows(2).position(|mark| mark == [0xFF, 0xC0]).unwrap();
        bomb[frame + 5..frame + 9].fill(0x80);
        assert!(why(&bomb).contains("32896 x 32896 pixels"), "{}", why(&bomb));
    }
}
