//! numpy's arrays on the wire: in JSON as json_numpy has them, in msgpack as openpi has them.
//!
//! JSON     `{"__numpy__": base64, "dtype": "|u1", "shape": [2, 3, 3]}`
//! msgpack  `{b"__ndarray__": true, b"data": bytes, b"dtype": "|u1", b"shape": [2, 3, 3]}`
//!
//! Bytes are in C order: the last dimension changes fastest.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use openvla::image::RgbImage;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_bytes::Bytes;

use crate::error::Error;

/// An array of any type and shape, whose bytes are borrowed from the message where they can be.
#[derive(Debug, Clone, PartialEq)]
pub struct Ndarray<'a> {
    /// numpy's name of the type: `|u1`, `<f8`.
    pub dtype: Cow<'a, str>,
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Cow<'a, [u8]>,
}

/// Where the channels of an image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[height, width]` or `[height, width, channels]`, as Pillow's `fromarray` takes it.
    ChannelsLast,
    /// That, or `[3, height, width]`, as openpi's clients may send it.
    ChannelsAnywhere,
}

/// An element of an array.
#[derive(Debug, Clone, PartialEq)]
pub enum Element {
    /// Text.
    Text(String),
    /// A whole number.
    Integer(i128),
    /// Another number.
    Float(f64),
}

impl Ndarray<'static> {
    /// Doubles of a shape.
    pub fn of_f64(numbers: &[f64], shape: Vec<usize>) -> Self {
        let data = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: "<f8".into(), shape, data: Cow::Owned(data) }
    }
}

impl Ndarray<'_> {
    /// The element of an array that has one, as `.item()` in Python, if it is text or a number.
    pub fn element(&self) -> Option<Element> {
        let dtype = self.dtype.trim_start_matches(['<', '|', '=']);
        let (kind, size) = dtype.trim_start_matches('>').split_at_checked(1)?;
        let size: usize = size.parse().ok()?;
        let bytes = if kind == "U" { size.checked_mul(4)? } else { size };
        if self.shape.iter().any(|n| *n != 1) || bytes != self.data.len() {
            return None;
        }
        let append = |number: u64, byte: &u8| (number << 8) | u64::from(*byte);
        let number = |bytes: &[u8]| match dtype.starts_with('>') {
            true => bytes.iter().fold(0, append),
            false => bytes.iter().rev().fold(0, append),
        };
        match (kind, size) {
            ("U", _) => {
                let chars = self.data.chunks_exact(4).map(|c| char::from_u32(number(c) as u32));
                let text: String = chars.collect::<Option<_>>()?;
                Some(Element::Text(text.trim_end_matches('\0').into())) // padding
            }
            ("u", 1 | 2 | 4 | 8) => Some(Element::Integer(number(&self.data).into())),
            ("i", 1 | 2 | 4 | 8) => {
                let unused = 64 - 8 * size;
                let signed = (number(&self.data) << unused) as i64 >> unused;
                Some(Element::Integer(signed.into()))
            }
            ("f", 4) => Some(Element::Float(f32::from_bits(number(&self.data) as u32).into())),
            ("f", 8) => Some(Element::Float(f64::from_bits(number(&self.data)))),
            _ => None,
        }
    }

    /// The picture that it is: bytes; grey is replicated, alpha dropped, as Pillow does.
    ///
    /// # Errors
    /// [`crate::error::Code::BadImage`] if it is none, or has more than `max_pixels`.
    pub fn image(self, layout: Layout, max_pixels: usize) -> Result<RgbImage, Error> {
        let (dtype, shape) = (&self.dtype, &self.shape);
        if !matches!(&**dtype, "|u1" | "u1" | "uint8") {
            return Err(Error::bad_image(format!("its dtype is `{dtype}`; uint8 is wanted")));
        }
        let wrong = || {
            let shape = format!("its shape is {shape:?}; [height, width, 3] is wanted");
            Error::bad_image(shape)
        };
        let (planar, [height, width, channels]) = match *shape.as_slice() {
            [height, width] => (false, [height, width, 1]),
            [3, height, width]
                if layout == Layout::ChannelsAnywhere && !(1..=4).contains(&width) =>
            {
                (true, [height, width, 3])
            }
            [height, width, channels @ 1..=4] => (false, [height, width, channels]),
            _ => return Err(wrong()),
        };
        let pixels = height.checked_mul(width).ok_or_else(wrong)?;
        check_pixels(width, height, max_pixels)?;
        if pixels.checked_mul(channels) != Some(self.data.len()) {
            let found = format!("shape {shape:?} needs other than its {} bytes", self.data.len());
            return Err(Error::bad_image(found));
        }
        let rgb: Vec<u8> = match (planar, channels) {
            (true, _) => (0..3 * pixels).map(|i| self.data[i % 3 * pixels + i / 3]).collect(),
            (false, 3) => self.data.into_owned(),
            (false, 4) => self.data.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
            (false, n) => self.data.chunks_exact(n).flat_map(|p| [p[0]; 3]).collect(),
        };
        let image = RgbImage::from_raw(width as u32, height as u32, rgb);
        image.ok_or_else(|| Error::bad_image("its bytes are too few"))
    }
}

/// Whether a picture of these sides may be looked at, in whatever form it comes.
///
/// # Errors
/// [`crate::error::Code::BadImage`] if a side is 0 or they make more than `max_pixels`.
pub fn check_pixels(width: usize, height: usize, max_pixels: usize) -> Result<(), Error> {
    match width.checked_mul(height) {
        Some(1..) if width.saturating_mul(height) <= max_pixels => Ok(()),
        _ => Err(Error::bad_image(format!(
            "it is {width} x {height} pixels; 1 to {max_pixels} in all are taken here"
        ))),
    }
}

/// An array as json_numpy has it.
#[derive(Debug)]
pub struct Json<'a>(pub Ndarray<'a>);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(3))?;
        map.serialize_entry("__numpy__", &STANDARD.encode(&self.0.data))?;
        map.serialize_entry("dtype", &self.0.dtype)?;
        map.serialize_entry("shape", &self.0.shape)?;
        map.end()
    }
}

/// An array as openpi's msgpack has it.
#[derive(Debug)]
pub struct Msgpack<'a>(pub Ndarray<'a>);

impl Serialize for Msgpack<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(4))?;
        map.serialize_entry(Bytes::new(b"__ndarray__"), &true)?;
        map.serialize_entry(Bytes::new(b"data"), Bytes::new(&self.0.data))?;
        map.serialize_entry(Bytes::new(b"dtype"), &self.0.dtype)?;
        map.serialize_entry(Bytes::new(b"shape"), &self.0.shape)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::Field;

    fn bytes(shape: &[usize], n: usize) -> Ndarray<'static> {
        let data = (0..n).map(|i| i as u8).collect::<Vec<u8>>();
        Ndarray { dtype: "|u1".into(), shape: shape.into(), data: data.into() }
    }

    fn pixels(array: Ndarray<'_>, layout: Layout) -> Vec<u8> {
        array.image(layout, 1 << 20).unwrap().into_raw()
    }

    #[test]
    fn pictures_are_read_as_pillow_reads_them() {
        let last = Layout::ChannelsLast;
        assert_eq!(pixels(bytes(&[1, 2, 3], 6), last), [0, 1, 2, 3, 4, 5]);
        assert_eq!(pixels(bytes(&[1, 2], 2), last), [0, 0, 0, 1, 1, 1]);
        assert_eq!(pixels(bytes(&[1, 2, 2], 4), last), [0, 0, 0, 2, 2, 2]);
        assert_eq!(pixels(bytes(&[1, 2, 4], 8), last), [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn planes_are_interleaved_where_they_may_be() {
        let planes = [0, 5, 10, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14];
        let anywhere = Layout::ChannelsAnywhere;
        assert_eq!(pixels(bytes(&[3, 1, 5], 15), anywhere), planes);
        assert_eq!(pixels(bytes(&[3, 1, 3], 9), anywhere), pixels(bytes(&[3, 1, 3], 9), anywhere));
        assert!(bytes(&[3, 1, 5], 15).image(Layout::ChannelsLast, 99).is_err());
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let image = |array: Ndarray<'static>| array.image(Layout::ChannelsAnywhere, 100);
        let mut float = bytes(&[1, 1, 3], 3);
        float.dtype = "<f4".into();
        for (array, word) in [
            (float, "`<f4`; uint8"),
            (bytes(&[2, 3, 3], 17), "17 bytes"),
            (bytes(&[3], 3), "[height, width, 3]"),
            (bytes(&[1, 1, 5], 5), "[height, width, 3]"),
            (bytes(&[0, 4, 3], 0), "0 pixels"),
            (bytes(&[11, 10, 3], 330), "1 to 100"),
            (bytes(&[usize::MAX, usize::MAX, 3], 1), "[height, width, 3]"),
            (bytes(&[usize::MAX, 1, 3], 1), "1 to 100"),
        ] {
            let error = image(array).unwrap_err().to_string();
            assert!(error.contains(word), "{word:?} is missing in {error}");
        }
    }

    #[test]
    fn an_array_of_one_is_its_element() {
        let element = |dtype: &str, shape: &[usize], data: &[u8]| {
            Ndarray { dtype: dtype.into(), shape: shape.into(), data: data.into() }.element()
        };
        let text = |text: &str| Some(Element::Text(text.into()));
        assert_eq!(element("<U3", &[], b"a\0\0\0\x93\x62\0\0\0\0\0\0"), text("a抓"));
        assert_eq!(element(">U1", &[1], b"\0\0\0a"), text("a"));
        assert_eq!(element("<U0", &[], b""), text(""));
        let integer = |number| Some(Element::Integer(number));
        assert_eq!(element("<i8", &[], &(-3_i64).to_le_bytes()), integer(-3));
        assert_eq!(element(">i2", &[], &(-3_i16).to_be_bytes()), integer(-3));
        assert_eq!(element("|i1", &[1, 1], &[0x80]), integer(-128));
        assert_eq!(element("<u8", &[], &u64::MAX.to_le_bytes()), integer(u64::MAX.into()));
        let half = Some(Element::Float(0.5));
        assert_eq!(element("<f4", &[], &0.5_f32.to_le_bytes()), half);
        assert_eq!(element(">f8", &[], &0.5_f64.to_be_bytes()), half);
        for (dtype, shape, data) in [
            ("<i8", &[2][..], &[0; 16][..]),
            ("<i8", &[], &[0; 4]),
            ("<i16", &[], &[0; 16]),
            ("<U1", &[], b"\0\0\x11\0"),
            ("<U4611686018427387904", &[], b""),
            ("é1", &[], b"x"),
            ("", &[], b""),
            ("|O", &[], b"x"),
        ] {
            assert_eq!(element(dtype, shape, data), None, "{dtype}");
        }
    }

    #[test]
    fn both_forms_come_back_as_they_went() {
        let array = Ndarray::of_f64(&[1.5, -2.0], vec![1, 2]);
        let text = serde_json::to_string(&Json(array.clone())).unwrap();
        assert_eq!(text, r#"{"__numpy__":"AAAAAAAA+D8AAAAAAAAAwA==","dtype":"<f8","shape":[1,2]}"#);
        let read: Field<'_> = serde_json::from_str(&text).unwrap();
        assert_eq!(read.array("x").unwrap(), array);
        let packed = rmp_serde::to_vec(&Msgpack(array.clone())).unwrap();
        assert_eq!(packed[..14], *b"\x84\xc4\x0b__ndarray__", "the keys are bytes");
        let read: Field<'_> = rmp_serde::from_slice(&packed).unwrap();
        assert_eq!(read.array("x").unwrap(), array);
    }
}
