//! Metadata values: kinds, numbers of kinds, bytes, and the cursor that reads them.

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of one kind. Kinds that no model file here needs are kept by kind and length only.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    I32(Vec<i32>),
    U32(Vec<u32>),
    F32(Vec<f32>),
    String(Vec<String>),
    /// ggml's number of the element kind, and how many there are.
    Other(u32, usize),
}

/// Maps a kind of value to its number in the file, and converts from and to Rust's type.
macro_rules! value {
    ($($kind:ident($type:ty) = $words:literal;)*) => {
        $(
            impl From<$type> for Value {
                fn from(value: $type) -> Self {
                    Self::$kind(value)
                }
            }
            impl TryFrom<Value> for $type {
                type Error = &'static str;
                fn try_from(value: Value) -> std::result::Result<Self, &'static str> {
                    match value {
                        Value::$kind(value) => Ok(value),
                        _ => Err($words),
                    }
                }
            }
        )*
    };
}

value! {
    U32(u32) = "a 32-bit unsigned integer";
    F32(f32) = "a 32-bit float";
    Bool(bool) = "true or false";
    String(String) = "a string";
}

/// The same for arrays.
macro_rules! array {
    ($($kind:ident($type:ty) = $words:literal;)*) => {
        $(
            impl From<Vec<$type>> for Value {
                fn from(value: Vec<$type>) -> Self {
                    Self::Array(Array::$kind(value))
                }
            }
            impl TryFrom<Value> for Vec<$type> {
                type Error = &'static str;
                fn try_from(value: Value) -> std::result::Result<Self, &'static str> {
                    match value {
                        Value::Array(Array::$kind(value)) => Ok(value),
                        _ => Err($words),
                    }
                }
            }
        )*
    };
}

array! {
    I32(i32) = "an array of 32-bit integers";
    F32(f32) = "an array of 32-bit floats";
    String(String) = "an array of strings";
}

const KIND_U32: u32 = 4;
const KIND_I32: u32 = 5;
const KIND_F32: u32 = 6;
const KIND_STRING: u32 = 8;
const KIND_ARRAY: u32 = 9;

impl Value {
    pub(crate) fn kind(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => KIND_U32,
            Self::I32(_) => KIND_I32,
            Self::F32(_) => KIND_F32,
            Self::Bool(_) => 7,
            Self::String(_) => KIND_STRING,
            Self::Array(_) => KIND_ARRAY,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    pub(crate) fn kind_name(&self) -> String {
        match self {
            Self::String(_) => "a string".to_owned(),
            Self::Array(_) => "an array".to_owned(),
            Self::Bool(_) => "true or false".to_owned(),
            other => format!("a number ({other:?})"),
        }
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => out.extend(v.to_le_bytes()),
            Self::I8(v) => out.extend(v.to_le_bytes()),
            Self::U16(v) => out.extend(v.to_le_bytes()),
            Self::I16(v) => out.extend(v.to_le_bytes()),
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::I32(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push(u8::from(*v)),
            Self::String(v) => write_string(v, out),
            Self::Array(v) => v.write(out),
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::I64(v) => out.extend(v.to_le_bytes()),
            Self::F64(v) => out.extend(v.to_le_bytes()),
        }
    }

    pub(crate) fn read(kind: u32, from: &mut Cursor<'_>) -> Parsed<Self> {
        Ok(match kind {
            0 => Self::U8(u8::from_le_bytes(from.array()?)),
            1 => Self::I8(i8::from_le_bytes(from.array()?)),
            2 => Self::U16(u16::from_le_bytes(from.array()?)),
            3 => Self::I16(i16::from_le_bytes(from.array()?)),
            KIND_U32 => Self::U32(from.u32()?),
            KIND_I32 => Self::I32(i32::from_le_bytes(from.array()?)),
            KIND_F32 => Self::F32(f32::from_le_bytes(from.array()?)),
            7 => Self::Bool(from.array::<1>()? != [0]),
            KIND_STRING => Self::String(from.string()?),
            KIND_ARRAY => Self::Array(Array::read(from)?),
            10 => Self::U64(from.u64()?),
            11 => Self::I64(i64::from_le_bytes(from.array()?)),
            12 => Self::F64(f64::from_le_bytes(from.array()?)),
            _ => return Err(format!("has a value of kind {kind}; GGUF knows 0 to 12")),
        })
    }
}

impl Array {
    fn write(&self, out: &mut Vec<u8>) {
        let mut head = |kind: u32, n: usize| {
            out.extend(kind.to_le_bytes());
            out.extend((n as u64).to_le_bytes());
        };
        match self {
            Self::U32(v) => {
                head(KIND_U32, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::I32(v) => {
                head(KIND_I32, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::F32(v) => {
                head(KIND_F32, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::String(v) => {
                head(KIND_STRING, v.len());
                v.iter().for_each(|v| write_string(v, out));
            }
            Self::Other(..) => unreachable!("only the reader makes these"),
        }
    }

    fn read(from: &mut Cursor<'_>) -> Parsed<Self> {
        let kind = from.u32()?;
        let n = from.u64()?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            KIND_U32 | KIND_I32 | KIND_F32 => 4,
            10..=12 => 8,
            KIND_STRING => return from.strings(n).map(Self::String),
            KIND_ARRAY => return Err("has an array of arrays, which no model file needs".into()),
            _ => return Err(format!("has an array of kind {kind}; GGUF knows 0 to 12")),
        };
        let length = usize::try_from(n).ok().and_then(|n| n.checked_mul(size));
        let bytes = from.take(length.ok_or_else(|| format!("has an array of {n} elements"))?)?;
        let (words, _) = bytes.as_chunks();
        Ok(match kind {
            KIND_U32 => Self::U32(words.iter().map(|b| u32::from_le_bytes(*b)).collect()),
            KIND_I32 => Self::I32(words.iter().map(|b| i32::from_le_bytes(*b)).collect()),
            KIND_F32 => Self::F32(words.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            _ => Self::Other(kind, bytes.len() / size),
        })
    }
}

pub(crate) fn write_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A result whose error is the reason alone; the caller knows the file.
pub(crate) type Parsed<T> = std::result::Result<T, String>;

/// What is left of the header.
pub(crate) struct Cursor<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        if n > left {
            return Err(format!("its header ends too early: {n} bytes wanted, {left} are left"));
        }
        self.at += n;
        Ok(&self.bytes[self.at - n..self.at])
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        Ok(*self.take(N)?.first_chunk().expect("took N bytes"))
    }

    pub fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn string(&mut self) -> Parsed<String> {
        let n = self.u64()?;
        let bytes = self.take(usize::try_from(n).unwrap_or(usize::MAX))?;
        let text = std::str::from_utf8(bytes).map_err(|_| "has a string that is not UTF-8")?;
        Ok(text.to_owned())
    }

    /// Grows with what is really there, whatever the count says.
    fn strings(&mut self, n: u64) -> Parsed<Vec<String>> {
        let mut strings = Vec::new();
        for _ in 0..n {
            strings.push(self.string()?);
        }
        Ok(strings)
    }
}
