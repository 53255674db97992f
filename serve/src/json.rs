//! JSON as Python's `json.loads` reads it: in UTF-8, 16 or 32, and with NaN and Infinity.

use std::borrow::Cow;

use crate::error::{Code, Error};

/// The same JSON in UTF-8 and without Python's additions to it.
///
/// NaN and Infinity, which `json.dumps` writes, become `false`. Where nothing reads them they do no harm; no field
/// that is read takes a boolean.
///
/// # Errors
/// [`Code::BadJson`] if it is not text in the encoding that its first bytes show.
pub fn standard(body: &[u8]) -> Result<Cow<'_, [u8]>, Error> {
    let wrong = || Error::new(Code::BadJson, "the body is not JSON: it is not UTF-8, 16 or 32");
    let text = utf8(body).ok_or_else(wrong)?;
    Ok(match without_nan(&text) {
        Some(text) => Cow::Owned(text),
        None => text,
    })
}

/// ref: `json.detect_encoding`
fn utf8(body: &[u8]) -> Option<Cow<'_, [u8]>> {
    let (text, width, is_big_endian) = match body {
        [0xef, 0xbb, 0xbf, text @ ..] => return Some(text.into()),
        [0, 0, 0xfe, 0xff, text @ ..] => (text, 4, true),
        [0xff, 0xfe, 0, 0, text @ ..] => (text, 4, false),
        [0xfe, 0xff, text @ ..] => (text, 2, true),
        [0xff, 0xfe, text @ ..] => (text, 2, false),
        [0, 0, _, _, ..] => (body, 4, true),
        [_, 0, 0, 0, ..] => (body, 4, false),
        [0, _] | [0, _, _, _, ..] => (body, 2, true),
        [_, 0] | [_, 0, _, _, ..] => (body, 2, false),
        _ => return Some(body.into()),
    };
    if text.len() % width != 0 {
        return None;
    }
    let units = text.chunks_exact(width).map(|unit| {
        let append = |number: u32, byte: &u8| (number << 8) | u32::from(*byte);
        if is_big_endian { unit.iter().fold(0, append) } else { unit.iter().rev().fold(0, append) }
    });
    let text: Option<String> = match width {
        2 => char::decode_utf16(units.map(|unit| unit as u16)).collect::<Result<_, _>>().ok(),
        _ => units.map(char::from_u32).collect(),
    };
    text.map(|text| text.into_bytes().into())
}

/// The text with another number for each NaN and Infinity, if there are any.
fn without_nan(text: &[u8]) -> Option<Vec<u8>> {
    let (mut out, mut copied, mut at) = (Vec::new(), 0, 0);
    while let Some(byte) = text.get(at) {
        if *byte == b'"' {
            at = end_of_string(text, at + 1);
            continue;
        }
        let words: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
        match words.iter().find(|word| text[at..].starts_with(word)) {
            Some(word) => {
                out.extend_from_slice(&text[copied..at]);
                out.extend_from_slice(b" false "); // the spaces keep `1NaN` from being a number
                at += word.len();
                copied = at;
            }
            None => at += 1,
        }
    }
    if copied == 0 {
        return None;
    }
    out.extend_from_slice(&text[copied..]);
    Some(out)
}

/// Where what follows the string begins, of whose characters the first is at `at`.
fn end_of_string(text: &[u8], mut at: usize) -> usize {
    let is_special = |byte: &u8| matches!(byte, b'"' | b'\\');
    while let Some(next) = text.get(at..).and_then(|rest| rest.iter().position(is_special)) {
        at += next;
        if text[at] == b'"' {
            return at + 1;
        }
        at += 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_encoding_of_pythons_is_read() {
        let text = r#"{"é": "抓 🤖"}"#;
        let wide = |order: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(order).collect();
        let wider =
            |order: fn(u32) -> [u8; 4]| text.chars().flat_map(|c| order(c as u32)).collect();
        let forms: [(&[u8], Vec<u8>); 5] = [
            (b"\xef\xbb\xbf", text.into()),
            (b"\xff\xfe", wide(u16::to_le_bytes)),
            (b"\xfe\xff", wide(u16::to_be_bytes)),
            (b"\xff\xfe\0\0", wider(u32::to_le_bytes)),
            (b"\0\0\xfe\xff", wider(u32::to_be_bytes)),
        ];
        for (mark, bytes) in forms {
            assert_eq!(standard(&bytes).unwrap(), text.as_bytes(), "without a mark");
            assert_eq!(standard(&[mark, &bytes].concat()).unwrap(), text.as_bytes(), "{mark:?}");
        }
        for short in ["", "1", "{}", "[1]"] {
            assert_eq!(standard(short.as_bytes()).unwrap(), short.as_bytes());
            let wide: Vec<u8> = short.encode_utf16().flat_map(u16::to_le_bytes).collect();
            assert_eq!(standard(&wide).unwrap(), short.as_bytes());
        }
        for wrong in [&b"\xff\xfe{"[..], b"\xff\xfe\0\xd8", b"\0\0\xfe\xff\0\x11\0\0"] {
            assert_eq!(standard(wrong).unwrap_err().code, Code::BadJson, "{wrong:?}");
        }
    }

    #[test]
    fn nan_and_infinity_are_numbers_and_texts_stay_as_they_are() {
        let standard = |text: &str| {
            let standard = standard(text.as_bytes()).unwrap().into_owned();
            serde_json::from_slice::<serde_json::Value>(&standard)
        };
        let read = standard(r#"[NaN, -Infinity,Infinity, "NaN", "\"NaN", "\\", {"NaN":NaN}]"#);
        let no = false;
        let want = serde_json::json!([no, no, no, "NaN", "\"NaN", "\\", { "NaN": no }]);
        assert_eq!(read.unwrap(), want);
        for wrong in ["[1NaN]", "[-NaN]", "[NaN1]", "[nan]", "[Inf]", "[\"NaN", "[\"\\"] {
            assert!(standard(wrong).is_err(), "{wrong}");
        }
    }
}
