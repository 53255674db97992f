//! A picture that was decoded, of any size, through each way of making it the model's square.
#![no_main]

use libfuzzer_sys::fuzz_target;
use openvla::{Preprocess, Profile, Resize};

const SIZE: u32 = 28;

fuzz_target!(|input: (u8, &[u8])| {
    let (how, file) = input;
    let resize = match how % 3 {
        0 => Resize::Naive,
        1 => Resize::Crop,
        _ => Resize::Letterbox { fill: [how; 3] },
    };
    let Ok(image) = openvla::decode_within(file, 1 << 16) else { return };
    let (profile, center_crop) = (Profile::ALL[usize::from(how / 3 % 3)], how >= 128);
    let preprocess = Preprocess { size: SIZE, resize, profile, center_crop, towers: Vec::new() };
    if let Ok(square) = preprocess.square(&image) {
        assert_eq!(square.dimensions(), (SIZE, SIZE));
    }
});
