//! GGUF: one file of metadata and tensors. A reader that trusts nothing; `header` writes.
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

use crate::header::{MAGIC, VERSION, bytes_of};
use crate::value::{Cursor, Parsed};
use crate::{ALIGNMENT, DType, Error, Header, MAX_TENSOR_NAME, Mapped, Result, Shape, Value};

const MAX_KEYS: u64 = 100_000;

/// Where a tensor is, and how to read it. Checked against the file.
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

    /// Reads a file that is part of the program. `name` is shown as its path in messages.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not a sound GGUF file.
    pub fn built_in(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::parse(name.to_owned(), Bytes::BuiltIn(bytes))
    }

    /// A file that exists only in memory. `name` is shown as its path in messages; `fill` writes
    /// the data section, which is zeros before.
    ///
    /// # Errors
    /// If the system has no room for it, or what `fill` says.
    ///
    /// # Panics
    /// If the header says what a reader would refuse.
    pub fn in_memory<E: From<std::io::Error>>(
        name: &str,
        header: &Header,
        fill: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let start = header.encode();
        let mapped = Mapped::filled(start.len() + header.data_bytes(), |bytes| {
            let (to, data) = bytes.split_at_mut(start.len());
            to.copy_from_slice(&start);
            fill(data)
        })?;
        let file = Self::parse(name.to_owned(), Bytes::Mapped(Arc::new(mapped)));
        Ok(file.expect("our own header is valid"))
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

    /// The tensor of that name, if there is one.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Whether others can change its bytes: they are mapped from a file.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(&self.bytes, Bytes::Mapped(mapped) if mapped.is_file())
    }

    /// Releases the memory of a range of the file for now.
    pub(crate) fn forget(&self, range: Range<usize>) {
        if let Bytes::Mapped(mapped) = &self.bytes {
            mapped.forget(range);
        }
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

fn read_header(bytes: &[u8]) -> Parsed<(BTreeMap<String, Value>, Vec<TensorInfo>)> {
    let mut from = Cursor { bytes, at: 0 };
    if bytes.get(..4) != Some(MAGIC) {
        return Err(not_gguf(bytes));
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

/// What a file is that does not start as a GGUF file does, as far as its first bytes tell.
fn not_gguf(bytes: &[u8]) -> String {
    const GIT_LFS: &str = "it is a git-lfs pointer, not the file itself; run `git lfs pull` in its \
         folder, or download it again";
    const PAGE: &str = "it is a web page, not the file itself; from huggingface.co, download \
         /resolve/main/… in place of /blob/main/…";
    const COMPRESSED: &str = "it is compressed or an archive; unpack it first";
    const PICKLED: &str = "it is a zip archive or a checkpoint of PyTorch; unpack it, or convert the \
         checkpoint first: openvla-convert FOLDER --q4";
    const SAFETENSORS: &str = "it is a safetensors file; convert its checkpoint first: \
         openvla-convert FOLDER --q4";
    const ZEROS: &str =
        "it starts with zeros, as a download that did not finish; download it again";
    const KNOWN: [(&[u8], &str); 8] = [
        (b"version https://git-lfs", GIT_LFS),
        (b"<", PAGE),
        (b"\x1f\x8b", COMPRESSED),         // gzip
        (b"BZh", COMPRESSED),              // bzip2
        (b"\xfd7zXZ\0", COMPRESSED),       // xz
        (b"\x28\xb5\x2f\xfd", COMPRESSED), // Zstandard
        (b"PK\x03\x04", PICKLED),
        (&[0; 8], ZEROS),
    ];
    let text = bytes.trim_ascii_start();
    if let Some((_, what)) = KNOWN.iter().find(|(start, _)| text.starts_with(start)) {
        return (*what).to_owned();
    }
    // The length of a header in JSON, then the header.
    if bytes.get(8..10) == Some(b"{\"") {
        return SAFETENSORS.to_owned();
    }
    // Servers answer in words where they do not send a file.
    let words = bytes.iter().take(60).take_while(|b| b.is_ascii_graphic() || **b == b' ').count();
    let start = &bytes[..bytes.len().min(words.max(4))];
    format!("it starts with \"{}\", not \"GGUF\"", start.escape_ascii())
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
    let end =
        bytes_of(dtype, &shape).and_then(|length| start.checked_add(length)).ok_or_else(|| {
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
