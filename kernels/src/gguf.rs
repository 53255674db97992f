//! GGUF: one file of metadata and tensors. A reader that trusts nothing, and the header's writer.
//!
//! ```text
//! "GGUF" u32 version  u64 n_tensor  u64 n_key
//! n_key    × string key, u32 kind, value          string: u64 length, bytes
//! n_tensor × string name, u32 n_dim, n_dim × u64 size, u32 type, u64 offset in the data section
//! padding to the alignment, then the data section, each tensor padded to the alignment
//! ```
//!
//! All little-endian. ref: `docs/gguf.md` of ggml, version 3 (2 has the same layout).
//!
//! The reader compares every count and length with the bytes that are left before it allocates,
//! so a file cannot make it use more memory than a small multiple of the file's own size.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::{DType, Error, Mapped, Result, Shape};

/// Tensor data starts at multiples of this many bytes: ggml's default, and its CPU's need.
pub const ALIGNMENT: usize = 32;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const MAX_KEYS: u64 = 100_000;
/// ggml keeps names in 64 bytes, the last one zero.
const MAX_TENSOR_NAME: usize = 63;

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

/// Where a tensor lies, and how to read it. Checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, at most 63 bytes.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sizes, fastest first.
    pub shape: Shape,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// A GGUF file whose header has been read and checked.
#[derive(Debug, Clone)]
pub struct Gguf {
    file: String,
    bytes: Bytes,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorInfo>,
}

#[derive(Debug, Clone)]
enum Bytes {
    Mapped(Arc<Mapped>),
    BuiltIn(&'static [u8]),
}

impl Gguf {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be mapped, [`Error::Format`] if it is not a sound GGUF file.
    pub fn open(path: &Path) -> Result<Self> {
        let mapped = Arc::new(Mapped::open(path)?);
        Self::parse(path.display().to_string(), Bytes::Mapped(mapped))
    }

    /// Reads a file that is part of the program. `name` stands for its path in messages.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not a sound GGUF file.
    pub fn built_in(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::parse(name.to_owned(), Bytes::BuiltIn(bytes))
    }

    fn parse(file: String, bytes: Bytes) -> Result<Self> {
        match read_header(bytes.as_slice()) {
            Ok((metadata, tensors)) => Ok(Self { file, bytes, metadata, tensors }),
            Err(why) => Err(Error::Format { file, why }),
        }
    }

    /// The path, or the built-in file's name: what messages call it.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// The value of `key` as `T`.
    ///
    /// # Errors
    /// [`Error::Key`] if it is missing or of another kind.
    pub fn get<T>(&self, key: &str) -> Result<T>
    where
        T: TryFrom<Value, Error = &'static str>,
    {
        let error = |why: String| Error::Key { file: self.file.clone(), key: key.to_owned(), why };
        let value = self.metadata.get(key).ok_or_else(|| error("is missing".to_owned()))?;
        let found = value.kind_name();
        T::try_from(value.clone()).map_err(|wanted| error(format!("is {found}, not {wanted}")))
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(mapped) => mapped,
            Self::BuiltIn(bytes) => bytes,
        }
    }
}

/// Gives a kind of value its number in the file, and conversions from and to Rust's type.
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
    fn kind(&self) -> u32 {
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

    fn kind_name(&self) -> String {
        match self {
            Self::String(_) => "a string".to_owned(),
            Self::Array(_) => "an array".to_owned(),
            Self::Bool(_) => "true or false".to_owned(),
            other => format!("a number ({other:?})"),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
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

    fn read(kind: u32, from: &mut Cursor<'_>) -> Parsed<Self> {
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

fn write_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A result whose error is the reason alone; the caller knows the file.
type Parsed<T> = std::result::Result<T, String>;

/// What is left of the header.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
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

    fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Parsed<String> {
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

fn read_header(bytes: &[u8]) -> Parsed<(BTreeMap<String, Value>, Vec<TensorInfo>)> {
    let mut from = Cursor { bytes, at: 0 };
    if bytes.get(..4) != Some(MAGIC) {
        let start = &bytes[..bytes.len().min(4)];
        return Err(format!("it starts with \"{}\", not \"GGUF\"", start.escape_ascii()));
    }
    from.at = 4;
    let version = from.u32()?;
    if !(2..=VERSION).contains(&version) {
        return Err(format!("it is version {version}; versions 2 and 3 (little-endian) are read"));
    }
    let (n_tensor, n_key) = (from.u64()?, from.u64()?);
    if n_key > MAX_KEYS {
        return Err(format!("it claims {n_key} metadata keys; at most {MAX_KEYS} are read"));
    }
    let metadata = read_metadata(&mut from, n_key)?;
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::U32(n)) if n.is_power_of_two() && *n as usize >= ALIGNMENT => *n as usize,
        Some(other) => return Err(format!("its alignment is {other:?}; 32 or more is needed")),
    };
    // The shortest tensor entry has a name of one byte and one dimension: 33 bytes.
    if n_tensor > (bytes.len() / 33) as u64 {
        return Err(format!("it claims {n_tensor} tensors, more than it has room for"));
    }
    let mut tensors: Vec<TensorInfo> = Vec::new();
    for _ in 0..n_tensor {
        tensors.push(read_tensor(&mut from, alignment)?);
    }
    place(&mut tensors, from.at.next_multiple_of(alignment), bytes.len())?;
    Ok((metadata, tensors))
}

fn read_metadata(from: &mut Cursor<'_>, n_key: u64) -> Parsed<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for _ in 0..n_key {
        let key = from.string()?;
        let kind = from.u32()?;
        let value = Value::read(kind, from).map_err(|why| format!("key `{key}`: {why}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("it has the key `{key}` twice"));
        }
    }
    Ok(metadata)
}

/// Reads one tensor entry; its range still counts from the data section.
fn read_tensor(from: &mut Cursor<'_>, alignment: usize) -> Parsed<TensorInfo> {
    let name = from.string()?;
    if name.is_empty() || name.len() > MAX_TENSOR_NAME || name.contains('\0') {
        let shown: String = name.chars().take(80).collect();
        return Err(format!("tensor `{shown}`: names are 1 to {MAX_TENSOR_NAME} bytes"));
    }
    let wrong = |why: String| format!("tensor `{name}` {why}");
    let n_dim = from.u32()?;
    if !(1..=4).contains(&n_dim) {
        return Err(wrong(format!("has {n_dim} dimensions; 1 to 4 are possible")));
    }
    let mut shape = [1; 4];
    for size in &mut shape[..n_dim as usize] {
        let n = from.u64()?;
        // ggml counts in 64-bit signed integers.
        *size =
            usize::try_from(n).ok().filter(|n| (1..=i64::MAX as usize).contains(n)).ok_or_else(
                || wrong(format!("has a dimension of {n}; 1 or more, and not absurd, is needed")),
            )?;
    }
    let number = from.u32()?;
    let dtype = DType::from_number(number).ok_or_else(|| {
        wrong(format!("has element type {number}; this version reads {:?}", DType::ALL))
    })?;
    let offset = from.u64()?;
    let start = usize::try_from(offset).ok().filter(|start| start.is_multiple_of(alignment));
    let start =
        start.ok_or_else(|| wrong(format!("starts at {offset}, no multiple of {alignment}")))?;
    let rows = shape[1].checked_mul(shape[2]).and_then(|n| n.checked_mul(shape[3]));
    let length = dtype.row_bytes(shape[0]).zip(rows).and_then(|(row, n)| row.checked_mul(n));
    let end = length.and_then(|length| start.checked_add(length)).ok_or_else(|| {
        wrong(format!("of shape {shape:?} has rows that {dtype} cannot hold, or is too large"))
    })?;
    Ok(TensorInfo { name, dtype, shape, range: start..end })
}

/// Moves ranges to count from the start of the file, and checks that they lie inside it.
fn place(tensors: &mut [TensorInfo], data: usize, length: usize) -> Parsed<()> {
    let mut names = std::collections::BTreeSet::new();
    for tensor in tensors {
        let Range { start, end } = tensor.range;
        let moved = data.checked_add(start).zip(data.checked_add(end));
        let inside = moved.filter(|(_, end)| *end <= length);
        let Some((start, end)) = inside else {
            let name = &tensor.name;
            return Err(format!(
                "tensor `{name}` ends {end} bytes into the data, which has {}; the file was cut off",
                length.saturating_sub(data)
            ));
        };
        tensor.range = start..end;
        if !names.insert(&tensor.name) {
            return Err(format!("it has the tensor `{}` twice", tensor.name));
        }
    }
    Ok(())
}

/// What stands before the data section of a file to be written.
#[derive(Debug, Clone, Default)]
pub struct Header {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, DType, Shape)>,
}

impl Header {
    /// Adds a metadata key.
    ///
    /// # Panics
    /// If it is there already.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        assert!(self.metadata.iter().all(|(other, _)| other != key), "`{key}` is set twice");
        self.metadata.push((key.to_owned(), value.into()));
    }

    /// Adds a tensor. Its data follows those of the tensors before it, each padded with zeros to
    /// [`ALIGNMENT`].
    ///
    /// # Panics
    /// If the name is too long or there already, or rows are no whole number of blocks.
    pub fn tensor(&mut self, name: &str, dtype: DType, shape: Shape) {
        assert!((1..=MAX_TENSOR_NAME).contains(&name.len()), "`{name}`: 1 to 63 bytes");
        assert!(self.tensors.iter().all(|(other, ..)| other != name), "`{name}` is added twice");
        assert!(dtype.row_bytes(shape[0]).is_some(), "`{name}`: no {dtype} rows of {}", shape[0]);
        self.tensors.push((name.to_owned(), dtype, shape));
    }

    /// The bytes before the data section, padded.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            write_string(key, &mut out);
            out.extend(value.kind().to_le_bytes());
            value.write(&mut out);
        }
        let mut offset = 0;
        for (name, dtype, shape) in &self.tensors {
            write_string(name, &mut out);
            let n_dim = shape.iter().rposition(|n| *n != 1).map_or(1, |last| last + 1);
            out.extend((n_dim as u32).to_le_bytes());
            shape[..n_dim].iter().for_each(|n| out.extend((*n as u64).to_le_bytes()));
            out.extend(dtype.number().to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += (bytes_of(*dtype, shape)).next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }

    /// Bytes of the data section.
    pub fn data_bytes(&self) -> usize {
        let padded = |(_, dtype, shape): &(String, DType, Shape)| {
            bytes_of(*dtype, shape).next_multiple_of(ALIGNMENT)
        };
        self.tensors.iter().map(padded).sum()
    }
}

fn bytes_of(dtype: DType, shape: &Shape) -> usize {
    dtype.row_bytes(shape[0]).expect("checked when it was added") * shape[1] * shape[2] * shape[3]
}
