//! Fields of messages as clients write them, in JSON and in msgpack. Nearly everything is read, so
//! that what is wrong with a field can be said in words.

use std::borrow::Cow;
use std::fmt;

use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{DecodeError, Engine};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::Error;
use crate::numpy::{Element, Ndarray};

/// The most numbers of a list: far more than any arm has joints.
const MAX_NUMBERS: usize = 1024;

/// What a field holds. Integers of numpy are integers, and arrays of one element what that is.
#[derive(Debug)]
pub enum Field<'a> {
    /// Text.
    Text(Cow<'a, str>),
    /// Bytes of msgpack.
    Bytes(Cow<'a, [u8]>),
    /// A whole number.
    Integer(i128),
    /// Another number.
    Float(f64),
    /// A list of numbers.
    Numbers(Vec<f64>),
    /// An array of json_numpy, or of openpi's or vla-eval's msgpack.
    Array(Ndarray<'a>),
    /// A picture file in vla-eval's msgpack.
    Picture(Cow<'a, [u8]>),
    /// Nothing of use, in words: "a list".
    Other(Cow<'static, str>),
}

impl<'a> Field<'a> {
    /// The text, such as an instruction.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] names the field and what it is.
    pub fn text(self, name: &str) -> Result<String, Error> {
        match self.unwrapped() {
            Self::Text(text) => Ok(text.into_owned()),
            Self::Bytes(bytes) => String::from_utf8(bytes.into_owned())
                .map_err(|_| Error::bad_request(format!("`{name}` is not UTF-8"))),
            other => Err(other.wrong(name, "text")),
        }
    }

    /// The whole number, such as a count.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] names the field and what it is.
    pub fn integer(self, name: &str) -> Result<u64, Error> {
        match self.unwrapped() {
            Self::Integer(number) => u64::try_from(number).map_err(|_| {
                Error::bad_request(format!("`{name}` is {number}; 0 or more is wanted"))
            }),
            other => Err(other.wrong(name, "a whole number")),
        }
    }

    /// The number, such as a time.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] names the field and what it is.
    pub fn float(self, name: &str) -> Result<f64, Error> {
        match self.unwrapped() {
            Self::Integer(number) => Ok(number as f64),
            Self::Float(number) => Ok(number),
            other => Err(other.wrong(name, "a number")),
        }
    }

    /// The numbers of a list or of an array of one dimension, such as the arm's state.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] names the field and what it is.
    pub fn numbers(self, name: &str) -> Result<Vec<f64>, Error> {
        let numbers = match &self {
            Self::Numbers(numbers) => Some(numbers.clone()),
            Self::Array(array) => array.numbers(),
            _ => None,
        };
        numbers.ok_or_else(|| self.wrong(name, "a list of numbers"))
    }

    /// The array, such as an image.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] names the field and what it is.
    pub fn array(self, name: &str) -> Result<Ndarray<'a>, Error> {
        match self {
            Self::Array(array) => Ok(array),
            other => Err(other.wrong(name, "an array of numpy")),
        }
    }

    /// The file whose bytes are here in base64, or in a `data:` URL of such.
    ///
    /// # Errors
    /// [`crate::error::Code::BadRequest`] names the field and what it is.
    pub fn file(self, name: &str) -> Result<Vec<u8>, Error> {
        let Self::Text(text) = self else {
            return Err(self.wrong(name, "base64 of a PNG or JPEG file"));
        };
        let base64 = match text.trim_start().strip_prefix("data:").map(|url| url.split_once(',')) {
            None => &text,
            Some(Some((kind, base64))) if kind.ends_with(";base64") => base64,
            Some(_) => {
                let message = format!("`{name}` is a data: URL without base64");
                return Err(Error::bad_request(message));
            }
        };
        let wrong = |why| Error::bad_request(format!("`{name}` is not base64: {why}"));
        from_base64(base64).map_err(wrong)
    }

    /// An array of one element is that element, as Python's `.item()` has it.
    fn unwrapped(self) -> Self {
        let Self::Array(array) = &self else { return self };
        match array.element() {
            Some(Element::Text(text)) => Self::Text(text.into()),
            Some(Element::Integer(number)) => Self::Integer(number),
            Some(Element::Float(number)) => Self::Float(number),
            None => self,
        }
    }

    fn wrong(&self, name: &str, wanted: &str) -> Error {
        let found: Cow<'_, str> = match self {
            Self::Text(_) => "text".into(),
            Self::Bytes(_) => "bytes".into(),
            Self::Integer(_) => "a whole number".into(),
            Self::Float(_) => "a number".into(),
            Self::Numbers(_) => "a list".into(),
            Self::Array(Ndarray { dtype, shape, .. }) => {
                format!("an array of {} of shape {shape:?}", dtype.escape_debug()).into()
            }
            Self::Picture(_) => "a picture file".into(),
            Self::Other(what) => what.as_ref().into(),
        };
        Error::bad_request(format!("`{name}` is {found}; {wanted} is wanted"))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Field<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(AnyField { reads_maps: true })
    }
}

/// A field that is part of another.
struct Part<'a>(Field<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for Part<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // Maps within maps within maps could go on until the stack ends.
        from.deserialize_any(AnyField { reads_maps: false }).map(Self)
    }
}

struct AnyField {
    reads_maps: bool,
}

impl<'de> Visitor<'de> for AnyField {
    type Value = Field<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text, a number or an array")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Field<'de>, E> {
        Ok(Field::Text(text.into()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Field<'de>, E> {
        Ok(Field::Text(text.to_owned().into()))
    }

    fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Field<'de>, E> {
        Ok(Field::Bytes(bytes.into()))
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Field<'de>, E> {
        Ok(Field::Bytes(bytes.to_owned().into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Field<'de>, E> {
        Ok(Field::Integer(number.into()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Field<'de>, E> {
        Ok(Field::Integer(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Field<'de>, E> {
        Ok(Field::Float(number))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Field<'de>, E> {
        Ok(Field::Other("a boolean, or NaN".into()))
    }

    fn visit_unit<E>(self) -> Result<Field<'de>, E> {
        Ok(Field::Other("null".into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Field<'de>, A::Error> {
        if !self.reads_maps {
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(Field::Other("a list".into()));
        }
        let mut numbers = Some(Vec::new());
        while let Some(Part(field)) = list.next_element()? {
            let number = match field {
                Field::Integer(number) => Some(number as f64),
                Field::Float(number) => Some(number),
                _ => None,
            };
            numbers = numbers.zip(number).and_then(|(mut numbers, number)| {
                numbers.push(number);
                (numbers.len() <= MAX_NUMBERS).then_some(numbers)
            });
        }
        Ok(numbers
            .map_or(Field::Other("a list of other things than numbers".into()), Field::Numbers))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field<'de>, A::Error> {
        if !self.reads_maps {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Field::Other("a map".into()));
        }
        let map = Map::deserialize(MapAccessDeserializer::new(map))?;
        Ok(map.field().unwrap_or_else(|what| Field::Other(what.into())))
    }
}

/// What json_numpy, and openpi's and vla-eval's msgpack, make of numpy's arrays and scalars.
#[derive(Deserialize)]
struct Map<'a> {
    #[serde(borrow, rename = "__numpy__")]
    base64: Option<Part<'a>>,
    #[serde(rename = "__ndarray__")]
    is_array: Option<IgnoredAny>,
    #[serde(rename = "__npgeneric__")]
    is_scalar: Option<IgnoredAny>,
    #[serde(rename = "__image__")]
    is_image: Option<IgnoredAny>,
    #[serde(borrow)]
    format: Option<Part<'a>>,
    #[serde(borrow)]
    data: Option<Part<'a>>,
    #[serde(borrow)]
    dtype: Option<Part<'a>>,
    shape: Option<Vec<usize>>,
}

impl<'a> Map<'a> {
    /// The array or scalar, or what it is instead, in words.
    fn field(self) -> Result<Field<'a>, String> {
        if self.is_scalar.is_some() {
            return self
                .data
                .map(|Part(data)| data)
                .ok_or_else(|| "a scalar without `data`".into());
        }
        let is_file = match (self.is_image, self.format) {
            (None, _) => false,
            (Some(_), Some(Part(Field::Text(format)))) => format != "raw",
            (Some(_), _) => return Err("an image without a `format` that is text".into()),
        };
        let is_array = self.is_array.or(self.is_image);
        let data = match (self.base64, is_array, self.data) {
            (Some(Part(Field::Text(text))), ..) => {
                let wrong = |why| format!("an array whose `__numpy__` is not base64 ({why})");
                Cow::Owned(from_base64(&text).map_err(wrong)?)
            }
            (Some(_), ..) => return Err("an array whose `__numpy__` is not text".into()),
            (None, Some(_), Some(Part(Field::Bytes(file)))) if is_file => {
                return Ok(Field::Picture(file));
            }
            (None, Some(_), Some(Part(Field::Bytes(bytes)))) => bytes,
            (None, Some(_), _) => return Err("an array whose `data` is not bytes".into()),
            (None, None, _) => return Err("a map".into()),
        };
        match (self.dtype, self.shape) {
            (Some(Part(Field::Text(dtype))), Some(shape)) => {
                Ok(Field::Array(Ndarray { dtype, shape, data }))
            }
            (Some(Part(Field::Text(_))), None) => Err("an array without `shape`".into()),
            _ => Err("an array without a `dtype` that is text".into()),
        }
    }
}

/// Takes what Python's `b64encode`, `encodebytes` and `urlsafe_b64encode` and the program `base64`
/// write, padded or not, and says what else it found.
fn from_base64(text: &str) -> Result<Vec<u8>, String> {
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &STANDARD,
        GeneralPurposeConfig::new()
            .with_decode_padding_mode(DecodePaddingMode::Indifferent)
            .with_decode_allow_trailing_bits(true),
    );
    if let Ok(bytes) = LENIENT.decode(text) {
        return Ok(bytes);
    }
    let unwrapped = text.chars().filter(|c| !c.is_ascii_whitespace());
    let standard: String = unwrapped
        .map(|c| match c {
            '-' => '+',
            '_' => '/',
            c => c,
        })
        .collect();
    LENIENT.decode(&standard).map_err(|why| match why {
        _ if standard.starts_with("b'") || standard.starts_with("b\"") => {
            "it is Python's b'…' as text; bytes.decode() makes text of bytes".into()
        }
        _ if standard.starts_with("data:") => {
            "it is a data: URL; only what follows its comma is wanted".into()
        }
        DecodeError::InvalidByte(at, _) => {
            let c = standard.get(at..).and_then(|rest| rest.chars().next()).unwrap_or_default();
            format!("{c:?} is not a character of it")
        }
        DecodeError::InvalidLength(n) | DecodeError::InvalidLastSymbol(n, _) => {
            format!("it breaks off after {n} characters")
        }
        DecodeError::InvalidPadding => "its padding is wrong".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(json: &str) -> Field<'_> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn base64_is_read_in_every_form_that_is_in_use() {
        // Its base64 is +/+/7w==, so it shows which alphabet is read.
        let bytes = b"\xfb\xff\xbf\xef";
        for text in [
            "+/+/7w==",
            "-_-_7w==",
            "+/+/7w",
            "+/+/\\n7w==\\n",
            " +/+/\\r\\n7w==",
            "data:image/png;base64,+/+/7w==",
            "data:;base64,-_-_7w",
        ] {
            assert_eq!(field(&format!("\"{text}\"")).file("image").unwrap(), bytes, "{text}");
        }
        for text in ["+/+/\\n7w==", "-_-_7w", "+/+/7w=="] {
            let json = format!(r#"{{"__numpy__": "{text}", "dtype": "|u1", "shape": [4]}}"#);
            assert_eq!(&*field(&json).array("image").unwrap().data, bytes, "{text}");
        }
    }

    #[test]
    fn what_is_not_base64_is_said() {
        for (text, word) in [
            ("table.png", "'.' is not a character"),
            ("b'+/+/'", "Python's b'…' as text"),
            ("data:image/png,x", "a data: URL without base64"),
            ("data:image/png;base64", "a data: URL without base64"),
            ("é", "'é' is not a character"),
            ("+/+/7", "breaks off after 5 characters"),
        ] {
            let error = field(&format!("\"{text}\"")).file("image").unwrap_err().message;
            assert!(error.starts_with("`image` is ") && error.contains(word), "{error}");
        }
        let json = r#"{"__numpy__": "data:,AAAA", "dtype": "|u1", "shape": [3]}"#;
        let error = field(json).array("image").unwrap_err().message;
        assert!(error.contains("`__numpy__` is not base64 (it is a data: URL"), "{error}");
    }

    #[test]
    fn what_a_field_is_instead_is_said() {
        for (json, found) in [
            ("[[1, 2], {}]", "a list of other things than numbers"),
            ("[1, 2.5]", "a list"),
            ("true", "a boolean, or NaN"),
            ("null", "null"),
            ("1.5", "a number"),
            (r#"{"a": {"b": []}}"#, "a map"),
            (r#"{"__numpy__": 3}"#, "an array whose `__numpy__` is not text"),
            (r#"{"__numpy__": "", "shape": []}"#, "an array without a `dtype` that is text"),
            (r#"{"__ndarray__": true, "data": [1]}"#, "an array whose `data` is not bytes"),
            (
                r#"{"__numpy__": "AAA=", "dtype": "<u1", "shape": [2]}"#,
                "an array of <u1 of shape [2]",
            ),
        ] {
            let error = field(json).text("prompt").unwrap_err().message;
            assert_eq!(error, format!("`prompt` is {found}; text is wanted"));
        }
        assert!(field("-1").integer("seq").unwrap_err().message.contains("`seq` is -1"));
        assert!(field("1.5").integer("seq").is_err() && field("\"1\"").float("timestamp").is_err());
        assert_eq!(field("3").float("timestamp").unwrap(), 3.0);
    }

    #[test]
    fn maps_within_maps_do_not_fill_the_stack() {
        let depth = 1000;
        let frame = [b"\x81\xa4data".repeat(depth), vec![0xc0]].concat();
        let field: Field<'_> = rmp_serde::from_slice(&frame).unwrap();
        assert!(matches!(field, Field::Other(_)));
    }
}
