//! The fast inverse DCT, on sound and damaged files.

use openvla_kernels::decode_jpeg_fast;
use proptest::prelude::*;
use turbojpeg::{Image, PixelFormat, Subsamp};

const SIDES: [usize; 2] = [37, 21];

fn file() -> Vec<u8> {
    let [width, height] = SIDES;
    let pixels: Vec<_> = (0..3 * width * height).map(|i| (i * i / 7) as u8).collect();
    let image =
        Image { pixels: &pixels[..], width, pitch: 3 * width, height, format: PixelFormat::RGB };
    turbojpeg::compress(image, 95, Subsamp::Sub2x2).unwrap().to_vec()
}

#[test]
fn it_is_near_the_default_and_not_the_same() {
    let fast = decode_jpeg_fast(&file(), SIDES[0], SIDES[1]).unwrap();
    let default = turbojpeg::decompress(&file(), PixelFormat::RGB).unwrap();
    let differences = fast.iter().zip(&default.pixels).map(|(a, b)| a.abs_diff(*b));
    let (n, most) = (differences.clone().filter(|by| *by > 0).count(), differences.max());
    assert_eq!(fast.len(), default.pixels.len());
    assert!(n > fast.len() / 4 && most < Some(20), "{n} of {} differ, by {most:?}", fast.len());
}

#[test]
fn files_of_another_size_or_kind_are_refused() {
    let [width, height] = SIDES;
    for (file, sides, words) in [
        (file(), [height, width], "it has [37, 21] pixels, not 21 x 37"),
        (file(), [0, 0], "pixels, not 0 x 0"),
        (file(), [65_535, 65_535], "pixels, not 65535 x 65535"),
        (file()[..100].to_vec(), SIDES, ""),
        (b"\x89PNG".to_vec(), SIDES, ""),
        (Vec::new(), SIDES, ""),
    ] {
        let why = decode_jpeg_fast(&file, sides[0], sides[1]).unwrap_err();
        assert!(!why.is_empty() && why.contains(words), "{why}");
    }
}

proptest! {
    #[test]
    fn damaged_files_are_refused_or_decoded(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let mut file = file();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(pixels) = decode_jpeg_fast(&file, SIDES[0], SIDES[1]) {
            prop_assert_eq!(pixels.len(), 3 * SIDES[0] * SIDES[1]);
        }
    }
}
