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

/// Whose rules say which arrays are images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convention {
    /// Bytes, `[height, width]` or `[height, width, channels]`, as `Image.fromarray` takes them.
    Pillow,
    /// Bytes, `[height, width, 3]` and nothing else.
    ///
    /// ref: openvla-oft `check_image_format`
    Rgb,
    /// As `Pillow`, also `[3, height, width]`, and also floats from 0 to 1.
    ///
    /// ref: openpi `_parse_image`, in the policies of LIBERO and DROID
    OpenPi,
}

impl Convention {
    /// The types of an image's elements, for people.
    fn wanted(self) -> &'static str {
        match self {
            Self::Pillow | Self::Rgb => "uint8",
            Self::OpenPi => "uint8, or float32 or float64 from 0 to 1,",
        }
    }
}

/// Types that an image's elements may have.
#[derive(Debug, Clone, Copy)]
enum Sample {
    U8,
    F32,
    F64,
}

impl Sample {
    /// The type of this name.
    fn named(dtype: &str, convention: Convention) -> Option<Self> {
        match (dtype, convention) {
            ("|u1" | "u1" | "uint8", _) => Some(Self::U8),
            ("<f4" | "f4" | "float32", Convention::OpenPi) => Some(Self::F32),
            ("<f8" | "f8" | "float64", Convention::OpenPi) => Some(Self::F64),
            _ => None,
        }
    }

    /// Bytes of an element.
    fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The elements as bytes. Floats are scaled in their own precision and cut off, as in openpi.
    fn bytes(self, data: Cow<'_, [u8]>) -> Result<Cow<'_, [u8]>, Error> {
        let convert: fn(&[u8]) -> Result<u8, Error> = match self {
            Self::U8 => return Ok(data),
            Self::F32 => |bytes| {
                let x = f32::from_le_bytes(bytes.try_into().expect("four"));
                check_fraction(x.into()).map(|()| (255.0 * x) as u8)
            },
            Self::F64 => |bytes| {
                let x = f64::from_le_bytes(bytes.try_into().expect("eight"));
                check_fraction(x).map(|()| (255.0 * x) as u8)
            },
        };
        let bytes: Result<_, _> = data.chunks_exact(self.size()).map(convert).collect();
        bytes.map(Cow::Owned)
    }
}

/// Refuses what openpi would turn into a byte that has nothing to do with the picture.
fn check_fraction(x: f64) -> Result<(), Error> {
    if (0.0..=1.0).contains(&x) {
        return Ok(());
    }
    let error = Error::bad_image(format!("it holds {x}; floats are from 0 to 1"));
    Err(error.hint("send the bytes of the picture as uint8, before anything is normalized"))
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
        let number = |bytes: &[u8]| {
            if dtype.starts_with('>') {
                bytes.iter().fold(0, append)
            } else {
                bytes.iter().rev().fold(0, append)
            }
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

    /// The numbers of an array of one dimension.
    pub fn numbers(&self) -> Option<Vec<f64>> {
        let [n] = *self.shape.as_slice() else { return None };
        if n == 0 || n > self.data.len() || !self.data.len().is_multiple_of(n) {
            return None;
        }
        let number = |bytes| {
            let one = Ndarray {
                dtype: self.dtype.as_ref().into(),
                shape: vec![],
                data: Cow::Borrowed(bytes),
            };
            match one.element()? {
                Element::Integer(number) => Some(number as f64),
                Element::Float(number) => Some(number),
                Element::Text(_) => None,
            }
        };
        self.data.chunks_exact(self.data.len() / n).map(number).collect()
    }

    /// The picture that it is. Gray is replicated and alpha dropped, as Pillow does.
    ///
    /// # Errors
    /// [`crate::error::Code::BadImage`] if it is none, or has more than `max_pixels`.
    pub fn image(self, convention: Convention, max_pixels: usize) -> Result<RgbImage, Error> {
        let (dtype, shape) = (&self.dtype, &self.shape);
        let sample = Sample::named(dtype, convention).ok_or_else(|| {
            let wanted = convention.wanted();
            Error::bad_image(format!("its dtype is `{dtype}`; {wanted} is wanted"))
        })?;
        let wrong = || {
            let shape = format!("its shape is {shape:?}; [height, width, 3] is wanted");
            Error::bad_image(shape)
        };
        let (planar, [height, width, channels]) = match *shape.as_slice() {
            [height, width] if convention != Convention::Rgb => (false, [height, width, 1]),
            [3, height, width] if convention == Convention::OpenPi && !(1..=4).contains(&width) => {
                (true, [height, width, 3])
            }
            [height, width, channels @ 1..=4] if channels == 3 || convention != Convention::Rgb => {
                (false, [height, width, channels])
            }
            _ => return Err(wrong()),
        };
        let pixels = height.checked_mul(width).ok_or_else(wrong)?;
        check_pixels(width, height, max_pixels)?;
        let size = pixels.checked_mul(channels).and_then(|n| n.checked_mul(sample.size()));
        if size != Some(self.data.len()) {
            let found = format!("shape {shape:?} needs other than its {} bytes", self.data.len());
            return Err(Error::bad_image(found));
        }
        let data = sample.bytes(self.data)?;
        let rgb: Vec<u8> = match (planar, channels) {
            (true, _) => (0..3 * pixels).map(|i| data[i % 3 * pixels + i / 3]).collect(),
            (false, 3) => data.into_owned(),
            (false, 4) => data.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
            (false, n) => data.chunks_exact(n).flat_map(|p| [p[0]; 3]).collect(),
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

    fn pixels(array: Ndarray<'_>, convention: Convention) -> Vec<u8> {
        array.image(convention, 1 << 20).unwrap().into_raw()
    }

    #[test]
    fn pictures_are_read_as_pillow_reads_them() {
        let pillow = Convention::Pillow;
        assert_eq!(pixels(bytes(&[1, 2, 3], 6), pillow), [0, 1, 2, 3, 4, 5]);
        assert_eq!(pixels(bytes(&[1, 2], 2), pillow), [0, 0, 0, 1, 1, 1]);
        assert_eq!(pixels(bytes(&[1, 2, 2], 4), pillow), [0, 0, 0, 2, 2, 2]);
        assert_eq!(pixels(bytes(&[1, 2, 4], 8), pillow), [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn planes_are_interleaved_where_they_may_be() {
        let planes = [0, 5, 10, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14];
        assert_eq!(pixels(bytes(&[3, 1, 5], 15), Convention::OpenPi), planes);
        assert!(bytes(&[3, 1, 5], 15).image(Convention::Pillow, 99).is_err());
    }

    #[test]
    fn where_only_rgb_is_taken_gray_and_alpha_are_not() {
        assert_eq!(pixels(bytes(&[1, 2, 3], 6), Convention::Rgb), [0, 1, 2, 3, 4, 5]);
        for (shape, n) in [(&[1, 2][..], 2), (&[1, 2, 4], 8), (&[1, 2, 1], 2), (&[3, 1, 5], 15)] {
            assert!(bytes(shape, n).image(Convention::Rgb, 99).is_err(), "{shape:?}");
        }
    }

    #[test]
    fn arrays_of_one_dimension_are_their_numbers() {
        assert_eq!(f32s(&[2], &[0.5, -1.0]).numbers().unwrap(), [0.5, -1.0]);
        assert_eq!(Ndarray::of_f64(&[1.5], vec![1]).numbers().unwrap(), [1.5]);
        assert_eq!(bytes(&[3], 3).numbers().unwrap(), [0.0, 1.0, 2.0]);
        for (shape, n) in [(&[2, 1][..], 2), (&[], 1), (&[0], 0), (&[3], 5), (&[9], 3)] {
            assert_eq!(bytes(shape, n).numbers(), None, "{shape:?}");
        }
    }

    fn f32s(shape: &[usize], numbers: &[f32]) -> Ndarray<'static> {
        let data: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ndarray { dtype: "<f4".into(), shape: shape.into(), data: data.into() }
    }

    #[test]
    fn floats_are_cut_off_in_their_own_precision() {
        let openpi = Convention::OpenPi;
        // `(255 * np.array(x, dtype)).astype(np.uint8)`, in numpy 2.4: the fifth is a little less than
        // 31 / 255, and 31 / 255 in single precision.
        let numbers = [0.0, -0.0, 1.0, 0.5, 0.121_568_627_45, 0.999];
        let doubles = Ndarray::of_f64(&numbers, vec![1, 2, 3]);
        assert_eq!(pixels(doubles, openpi), [0, 0, 255, 127, 30, 254]);
        let floats = f32s(&[1, 2, 3], &numbers.map(|x| x as f32));
        assert_eq!(pixels(floats, openpi), [0, 0, 255, 127, 31, 254]);
        let planes: Vec<f32> = (0..15).map(|i| i as f32 / 255.0).collect();
        let planes = pixels(f32s(&[3, 1, 5], &planes), openpi);
        assert_eq!(planes, pixels(bytes(&[3, 1, 5], 15), openpi));
    }

    #[test]
    fn floats_that_are_no_fractions_are_refused() {
        for wrong in [f32::NAN, f32::INFINITY, -1e-6, 1.000_001, 255.0] {
            let image = f32s(&[1, 1, 3], &[0.0, wrong, 1.0]).image(Convention::OpenPi, 9);
            let error = image.unwrap_err();
            assert!(error.message.contains("floats are from 0 to 1"), "{error}");
            assert!(error.hint.is_some());
        }
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let image = |array: Ndarray<'static>| array.image(Convention::OpenPi, 100);
        let error = f32s(&[1, 1, 3], &[0.0; 3]).image(Convention::Pillow, 100).unwrap_err();
        assert!(error.message.contains("`<f4`; uint8 is wanted"), "{error}");
        let mut half = bytes(&[1, 1, 3], 6);
        half.dtype = "<f2".into();
        for (array, word) in [
            (half, "`<f2`; uint8, or float32"),
            (f32s(&[1, 1, 3], &[0.0; 2]), "8 bytes"),
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
