//! A picture file of any format, with the limit that a server has: words or a picture of the header's size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use openvla::{Error, Header};

const MAX_PIXELS: usize = 1 << 20;

fuzz_target!(|file: &[u8]| {
    let header = Header::read(file);
    match openvla::decode_within(file, MAX_PIXELS) {
        Ok(image) => {
            header.expect("what is decoded has a header");
            assert!(image.width() as usize * image.height() as usize <= MAX_PIXELS);
        }
        Err(Error::Decoder { why }) => panic!("a decoder panicked: {why}"),
        Err(_) => {}
    }
});
