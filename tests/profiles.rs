//! Pictures prepared as the reference's evaluations do it with TensorFlow, to the bit.

mod common;

use common::{committed, json, picture};
use openvla::Profile;
use openvla::image::{Rgb, RgbImage, imageops};
use sha2::{Digest, Sha256};

fn prepare(profile: Profile, image: &RgbImage, center_crop: bool) -> RgbImage {
    profile.prepare(image, 224, center_crop).unwrap().into_owned()
}

/// Eleven pictures, from one pixel to 320 x 240, gray and with alpha too, by every profile.
#[test]
fn every_profile_is_tensorflows() {
    let dir = committed();
    let cases = json(&dir.join("profiles.json"))["cases"].take();
    assert_eq!(cases.as_array().unwrap().len(), 11 * 3 * 2);
    for case in cases.as_array().unwrap() {
        let image = picture(&dir.join(case["picture"].as_str().unwrap()));
        let profile = case["profile"].as_str().unwrap().parse().unwrap();
        let center_crop = case["center_crop"].as_bool().unwrap();
        let prepared = Profile::prepare(profile, &image, 224, center_crop).unwrap();
        let hash: String =
            Sha256::digest(prepared.as_raw()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hash, case["u8_sha256"].as_str().unwrap(), "{case}");
    }
}

fn noise(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([x * 37 + y * 11, x * x * 5 + y, x * y].map(|v| v as u8))
    })
}

#[test]
fn oft_codes_only_pictures_of_another_size() {
    let square = noise(224, 224);
    assert!(prepare(Profile::Oft, &square, false) == square);
    assert!(prepare(Profile::Raw, &square, false) == square);
    assert!(prepare(Profile::Raw, &noise(31, 500), false) == noise(31, 500));
    // LIBERO's frames are coded whatever their size, and rotated before.
    let frame = prepare(Profile::Libero, &square, false);
    assert!(frame != square && frame != imageops::rotate180(&square));
    let (rotated, upright) = (imageops::rotate180(&noise(256, 256)), noise(256, 256));
    assert!(prepare(Profile::Oft, &rotated, true) == prepare(Profile::Libero, &upright, true));
    assert!(prepare(Profile::Oft, &upright, true) != prepare(Profile::Libero, &upright, true));
}

/// A ramp of one level a pixel, of which the crop keeps sqrt(0.9): 0.026 of its width are cut at each side.
#[test]
fn the_crop_keeps_nine_tenths_of_the_area() {
    let ramp = RgbImage::from_fn(241, 241, |x, y| Rgb([x as u8, y as u8, 0]));
    let cropped = prepare(Profile::Raw, &ramp, true);
    assert_eq!(cropped[(0, 0)].0, [6, 6, 0]); // 6.158, cut off
    assert_eq!(cropped[(223, 223)].0, [234, 234, 0]); // 233.842 * 255.5 / 255 = 234.3
    assert_eq!(cropped[(223, 0)].0, [234, 6, 0]);
}

#[test]
fn one_color_stays_one_color() {
    for (width, height) in [(1, 1), (1, 16_384), (16_384, 1), (333, 20), (224, 224)] {
        for level in [0, 128, 255] {
            let image = RgbImage::from_pixel(width, height, Rgb([level; 3]));
            for profile in Profile::ALL {
                let prepared = prepare(profile, &image, true);
                assert_eq!(prepared.dimensions(), (224, 224));
                let one = prepared.pixels().all(|pixel| pixel.0 == [level; 3]);
                assert!(one, "{width} x {height}, {level}, {profile}");
            }
        }
    }
}

#[test]
fn sizes_out_of_bounds_are_errors() {
    for profile in Profile::ALL {
        let why = |size, width, height| {
            profile.prepare(&RgbImage::new(width, height), size, true).unwrap_err().to_string()
        };
        assert!(why(224, 0, 5).contains("0 x 5 pixels; each side may be 1 to 16384"));
        assert!(why(224, 1, 16_385).contains("1 x 16385 pixels"));
        assert!(why(0, 5, 5).contains("0 pixels wide, not 14 to 1024"));
        assert!(why(u32::MAX, 5, 5).contains("4294967295 pixels wide"));
    }
}

#[test]
fn profiles_have_names() {
    for profile in Profile::ALL {
        assert_eq!(profile.to_string().parse(), Ok(profile));
    }
    let error = "Libero".parse::<Profile>().unwrap_err();
    assert_eq!(error, "raw, or oft, or libero is wanted");
}

mod shared {
    use std::path::Path;

    use openvla::libero;
    use safetensors::SafeTensors;
    use serde_json::Value;

    use super::*;

    fn text(value: &Value) -> &str {
        value.as_str().unwrap()
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn liberos_frames_are_tensorflows() {
        let dir = common::shared().join("preprocess/libero_tf");
        let cases = json(&dir.join("index.json"))["cases"].take();
        for case in cases.as_array().unwrap() {
            let of = |name: &str| picture(&dir.join(text(&case[name])));
            let image = of("input");
            assert!(prepare(Profile::Libero, &image, false) == of("lanczos224"), "{case}");
            assert!(prepare(Profile::Libero, &image, true) == of("center_crop"), "{case}");
        }
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn pictures_of_oft_are_its_policys() {
        let dir = common::shared().join("oft");
        let cases = json(&dir.join("cases.json"))["cases"].take();
        let mut n = 0;
        for case in cases.as_array().unwrap() {
            let id = text(&case["id"]);
            let center_crop = case["center_crop"].as_bool().unwrap();
            let wanted = case["images_in_order"].as_array().unwrap().iter();
            for (key, u8s) in wanted.zip(case["model_u8"].as_array().unwrap()) {
                let observed = case["observation"].as_array().unwrap().iter();
                let observed = observed.into_iter().find(|seen| seen["key"] == *key).unwrap();
                let image = picture(&dir.join(text(&observed["image"])));
                let resized = case["policy_images"].get(text(key));
                let resized = resized.map(|path| picture(&dir.join(text(path))));
                let model = picture(&dir.join(text(u8s)));
                let profile = match text(&case["pipeline"]) {
                    "libero_env" => Profile::Libero,
                    _ => Profile::Oft,
                };
                let want = resized.as_ref().unwrap_or(&image);
                assert!(prepare(profile, &image, false) == *want, "{id} {key}: resized");
                assert!(prepare(profile, &image, center_crop) == model, "{id} {key}");
                // A picture that the client has prepared is not prepared again.
                assert!(prepare(Profile::Oft, want, center_crop) == model, "{id} {key}: again");
                n += 1;
            }
        }
        assert!(n > 20, "{n} pictures");
    }

    fn doubles(file: &Path, name: &str) -> Vec<f64> {
        let bytes = std::fs::read(file).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (numbers, _) = file.tensor(name).unwrap().data().as_chunks();
        numbers.iter().map(|number| f64::from_le_bytes(*number)).collect()
    }

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn liberos_gripper_is_its_clients() {
        for case in ["a01_env", "c01_one_image"] {
            let path = common::shared().join(format!("oft/cases/{case}.safetensors"));
            let (mut motions, wanted) = (doubles(&path, "actions"), doubles(&path, "env_actions"));
            for motion in motions.chunks_exact_mut(7) {
                motion[6] = libero::gripper(motion[6]);
            }
            assert_eq!(motions, wanted, "{case}");
        }
    }
}
