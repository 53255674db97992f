//! Pictures that the tests write themselves, and what Pillow 10.4 makes of them.

use super::*;
use image::{DynamicImage, GrayAlphaImage, GrayImage, ImageBuffer, RgbaImage};
use image::{Luma, LumaA, Rgb, Rgba};
use turbojpeg::{Image, PixelFormat};

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
    let file = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x03\0\0\0\x02\x02\x03\0\0\0\xe0\x1a\x8e\x89\
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
    let color = (PixelFormat::RGB, [2, 15, 8, 0, 5, 5], 41_422_644);
    let print = (PixelFormat::CMYK, [0, 1, 4, 0, 1, 0], 19_099_069);
    for (format, first, want) in [color, print] {
        let image = decode(&jpeg_file(format)).unwrap();
        assert_eq!(image.as_raw()[..6], first, "{format:?}");
        let sum: u64 = (1..).zip(image.as_raw()).map(|(i, v)| i * u64::from(*v)).sum();
        assert_eq!(sum, want, "{format:?}");
    }
}

#[test]
fn padding_before_the_end_marker_is_ignored_and_a_cut_is_not() {
    let whole = jpeg_file(PixelFormat::RGB);
    let body = &whole[..whole.len() - 2];
    let padded = [body, &[0; 5], &[0xFF, 0xD9]].concat();
    assert!(decode(&padded).unwrap() == decode(&whole).unwrap());
    assert!(why(body).contains("JPEG that is cut off"), "{}", why(body));
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

/// The place of a marker's code in a JPEG.
fn marker(file: &[u8], code: u8) -> usize {
    file.windows(2).position(|pair| pair == [0xFF, code]).unwrap() + 1
}

/// What libjpeg only warns of, Pillow reads. These do not touch the pixels.
#[test]
fn a_jpeg_with_odd_headers_has_the_same_pixels() {
    let whole = jpeg_file(PixelFormat::RGB);
    let same = |name: &str, file: &[u8]| {
        let got = decode(file).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(got == decode(&whole).unwrap(), "{name}");
    };
    let scan = marker(&whole, 0xDA);
    for spectrum in [[0, 0, 0], [1, 63, 0], [0, 63, 0x10], [0, 63, 1], [9, 9, 0x99]] {
        let mut file = whole.clone();
        file[scan + 10..scan + 13].copy_from_slice(&spectrum);
        same(&format!("{spectrum:?}"), &file);
    }
    let mut version = whole.clone();
    version[marker(&whole, 0xE0) + 8] = 7;
    same("a JFIF of the future", &version);
    let tables = marker(&whole, 0xDB) - 1;
    let insert = |at: usize, more: &[u8]| [&whole[..at], more, &whole[at..]].concat();
    same("fill bytes after the start", &insert(2, &[0xFF; 3]));
    same("fill bytes between markers", &insert(tables, &[0xFF; 2]));
    same("bytes between markers", &insert(tables, b"abc"));
    same("a damaged profile", &insert(2, b"\xFF\xE2\0\x10ICC_PROFILE\0\x09\x03"));
    same("bytes after the end", &insert(whole.len(), b"abc"));
    let fields = marker(&whole, 0xE0) - 1;
    for transform in [1, 2, 7] {
        let adobe = [b"\xFF\xEE\0\x0EAdobe\0\x64\0\0\0\0".as_slice(), &[transform]].concat();
        let file = [&whole[..fields], &adobe, &whole[tables..]].concat();
        same(&format!("color transform {transform}"), &file);
    }
}

#[test]
fn a_jpeg_whose_pixels_end_early_is_read_as_far_as_it_goes() {
    let whole = jpeg_file(PixelFormat::RGB);
    let cut = whole.len() - 8;
    let got = decode(&[&whole[..cut], &[0xFF, 0xD9]].concat()).unwrap();
    let want = decode(&whole).unwrap();
    assert!(got.as_raw()[..24] == want.as_raw()[..24], "the first pixels are there");
    assert!(got != want);
}

/// A progressive JPEG of one gray component whose scans are all empty.
fn empty_scans(side: u16, n: usize) -> Vec<u8> {
    let [high, low] = side.to_be_bytes();
    let frame = [0xFF, 0xCA, 0, 11, 8, high, low, high, low, 1, 1, 0x11, 0];
    let scan = [0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 0, 0];
    let table = [&[0xFF, 0xDB, 0, 67, 0][..], &[1; 64]].concat();
    [&[0xFF, 0xD8], &table[..], &frame, &scan.repeat(n), &[0xFF, 0xD9]].concat()
}

#[test]
fn scans_times_pixels_are_bounded_before_any_is_decoded() {
    assert!(decode(&empty_scans(64, 99)).is_ok(), "a small picture may have many");
    let six = Header::read(&empty_scans(4096, 6)).unwrap();
    assert_eq!(six.samples, 6 << 24);
    assert!(six.check(1 << 24).is_ok(), "as many as encoders write");
    let error = why(&empty_scans(16_000, 99));
    assert!(error.contains("16000 x 16000 pixels"), "{error}");
    let error = why(&empty_scans(4096, 99));
    assert!(error.contains("its scans pass over 1660944384 samples"), "{error}");
    assert!(why(&empty_scans(16, 101)).contains("101 scans; 100 may be read"));
}

#[test]
fn a_jpeg_without_pixels_is_named() {
    for file in [&b"\xFF\xD8\xFF\xD9"[..], b"\xFF\xD8\xFF\xC0\0\x02\xFF\xDA\0\x02\xFF\xD9"] {
        assert!(why(file).contains("JPEG without pixels"), "{}", why(file));
    }
}

#[test]
fn the_limit_is_the_callers() {
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp] {
        let file = file(picture(), format);
        assert!(decode_within(&file, 19 * 7).is_ok());
        let error = decode_within(&file, 19 * 7 - 1).unwrap_err().to_string();
        assert!(error.contains("19 x 7 pixels; 132 in all"), "{error}");
    }
    let file = jpeg_file(PixelFormat::RGB);
    let filled = [&file[..2], &[0xFF; 2], &file[2..]].concat();
    for file in [file, filled] {
        assert!(decode_within(&file, 21 * 13).is_ok());
        assert!(decode_within(&file, 21 * 13 - 1).is_err());
    }
}

fn chunk(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
    let length = content.len() as u32;
    let padding = vec![0; content.len() % 2];
    [&name[..], &length.to_le_bytes(), content, &padding].concat()
}

fn webp_of(chunks: &[Vec<u8>]) -> Vec<u8> {
    chunk(b"RIFF", &[&b"WEBP"[..], &chunks.concat()].concat())
}

/// A lossy bitstream that claims to be of this size, and is all zeros.
fn lossy(width: u8, height: u8) -> Vec<u8> {
    let head = [0x10, 0, 0, 0x9D, 1, 0x2A, width, 0, height, 0];
    chunk(b"VP8 ", &[&head[..], &[0; 64]].concat())
}

#[test]
fn a_webp_whose_bitstream_is_of_another_size_is_refused_before_it_is_decoded() {
    let canvas = |flags| chunk(b"VP8X", &[flags, 0, 0, 0, 1, 0, 0, 1, 0, 0]);
    let alpha = chunk(b"ALPH", &[0; 5]);
    let lossless = chunk(b"VP8L", &[0x2F, 19, 0xC0, 4, 0, 0]);
    let frame = |chunks: &[Vec<u8>]| {
        let place = [0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        chunk(b"ANMF", &[&place[..], &chunks.concat()].concat())
    };
    let animation =
        |chunks: &[Vec<u8>]| webp_of(&[canvas(0x12), chunk(b"ANIM", &[0; 6]), frame(chunks)]);
    let other = "bitstream of 20 x 20 pixels is in a frame of 2 x 2";
    for (file, word) in [
        (animation(&[alpha.clone(), lossy(20, 20)]), other),
        (animation(&[lossy(20, 20)]), other),
        (animation(std::slice::from_ref(&lossless)), other),
        (animation(&[alpha.clone(), chunk(b"none", &lossy(20, 20)[8..])]), "without pixels"),
        (animation(std::slice::from_ref(&alpha)), "without pixels"),
        (animation(&[chunk(b"VP8 ", &[0; 9])]), "cut off"),
        (webp_of(&[canvas(0x10), alpha, lossy(20, 20)]), other),
        (webp_of(&[canvas(0), lossless]), other),
        (webp_of(&[canvas(0)]), "decoding it as WebP failed"),
        (webp_of(&[]), "WebP without pixels"),
    ] {
        assert!(why(&file).contains(word), "{word:?} is missing in {}", why(&file));
    }
}

/// A BMP of 3 x 2 pixels with this header and these rows of 24 bits.
fn bmp(header: &[u8], rows: [[u8; 12]; 2]) -> Vec<u8> {
    let offset = 14 + header.len() as u32;
    let head = [&b"BM"[..], &[0; 8], &offset.to_le_bytes()].concat();
    [&head[..], header, rows.as_flattened()].concat()
}

#[test]
fn a_bmp_has_its_size_where_its_header_says() {
    let rows =
        [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0], [10, 11, 12, 13, 14, 15, 16, 17, 18, 0, 0, 0]];
    let pixels = |row: [u8; 12]| [2, 1, 0, 5, 4, 3, 8, 7, 6].map(|i: usize| row[i]);
    let os2 = [12, 0, 0, 0, 3, 0, 2, 0, 1, 0, 24, 0];
    let windows = |height: i32| {
        let sides = [3_i32.to_le_bytes(), height.to_le_bytes()];
        [&[40, 0, 0, 0], sides.as_flattened(), &[1, 0, 24, 0], &[0; 24]].concat()
    };
    for (header, order) in [(os2.to_vec(), [1, 0]), (windows(2), [1, 0]), (windows(-2), [0, 1])] {
        let file = bmp(&header, rows);
        assert_eq!(Header::read(&file).unwrap(), Header::of_pixels(3, 2));
        let want = order.map(|i| pixels(rows[i])).concat();
        assert_eq!(decode_within(&file, 6).unwrap().into_raw(), want);
    }
}

/// Sides are refused as such, and no number made of them overflows.
#[test]
fn the_largest_sides_that_a_png_can_claim_are_refused_in_words() {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    png.extend([0xff; 8]);
    png.extend([8, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(Header::read(&png), Err(Error::Image { .. })));
    assert!(matches!(decode(&png), Err(Error::Image { .. })));
}
