//! Damaged GGUF files, each kind of damage by hand: an error that says what is wrong.

mod common;

use common::read;
use openvla_kernels::{DType, Gguf, Header};

const U8: u32 = 0;
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const F32: u32 = 0;
const Q8_0: u32 = 8;

/// The parts of a file, to be put together however wrong they are.
struct Raw {
    version: u32,
    n_tensor: u64,
    n_key: u64,
    keys: Vec<u8>,
    tensors: Vec<u8>,
    data: usize,
}

impl Raw {
    /// A sound file with one key and one tensor.
    fn new() -> Self {
        let (keys, tensors) = (key("n", U32, &[1, 0, 0, 0]), tensor("t", &[8, 2], F32, 0));
        Self { version: 3, n_tensor: 1, n_key: 1, keys, tensors, data: 64 }
    }

    fn keys(keys: &[Vec<u8>]) -> Self {
        Self { n_key: keys.len() as u64, keys: keys.concat(), ..Self::new() }
    }

    fn tensors(tensors: &[Vec<u8>]) -> Self {
        Self { n_tensor: tensors.len() as u64, tensors: tensors.concat(), ..Self::new() }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.n_tensor.to_le_bytes());
        bytes.extend(self.n_key.to_le_bytes());
        bytes.extend([self.keys.as_slice(), &self.tensors].concat());
        bytes.resize(bytes.len().next_multiple_of(32) + self.data, 0);
        bytes
    }
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(name.as_bytes()), kind.to_le_bytes().as_slice(), value].concat()
}

fn array(kind: u32, n: u64, elements: &[u8]) -> Vec<u8> {
    key("a", ARRAY, &[&kind.to_le_bytes(), n.to_le_bytes().as_slice(), elements].concat())
}

fn alignment(n: u32) -> Vec<u8> {
    key("general.alignment", U32, &n.to_le_bytes())
}

fn tensor(name: &str, dims: &[u64], dtype: u32, offset: u64) -> Vec<u8> {
    let dims_bytes: Vec<u8> = dims.iter().flat_map(|n| n.to_le_bytes()).collect();
    let n_dim = (dims.len() as u32).to_le_bytes();
    let (dtype, offset) = (dtype.to_le_bytes(), offset.to_le_bytes());
    [&string(name.as_bytes()), n_dim.as_slice(), &dims_bytes, &dtype, &offset].concat()
}

/// Every file is refused as `test.gguf is not a usable GGUF file`, and for the reason wanted.
fn refused(cases: &[(Raw, &str)]) {
    for (raw, wanted) in cases {
        let error = read(&raw.bytes()).expect_err(wanted).to_string();
        assert!(error.starts_with("test.gguf is not a usable GGUF file: "), "{error}");
        assert!(error.contains(wanted), "{error}\nwanted: {wanted}");
        assert!(error.len() < 400, "{} bytes of message", error.len());
    }
}

#[test]
fn the_sound_file_is_read() {
    let gguf = read(&Raw::new().bytes()).unwrap();
    assert_eq!((gguf.metadata().len(), gguf.tensors()[0].range.len()), (1, 64));
    assert!(read(&Raw { version: 2, ..Raw::new() }.bytes()).is_ok(), "2 has the same layout");
}

#[test]
fn other_files_are_refused() {
    for (bytes, wanted) in [
        (b"".as_slice(), "it starts with \"\", not \"GGUF\""),
        (b"GG", "it starts with \"GG\""),
        (b"\x7fELF\x02\x01\x01\0", "it starts with \"\\x7fELF\""),
        (b"FUGG\0\0\0\x03", "it starts with \"FUGG\""),
        (b"GGUF", "its header ends too early: 4 bytes wanted, 0 are left"),
        (b"Entry not found", "it starts with \"Entry not found\", not \"GGUF\""),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "git lfs pull"),
        (b"<!doctype html><html>Sign in</html>", "in place of /blob/main/"),
        (b"\r\n<HTML>", "it is a web page"),
        (b"\x1f\x8b\x08\0\0\0", "it is compressed"),
        (b"PK\x03\x04\x14\0", "it is a zip archive or a checkpoint of PyTorch"),
        (b"\x10\0\0\0\0\0\0\0{\"a\":{\"dtype\"", "openvla-convert FOLDER --q4"),
        (&[0; 4096], "download it again"),
    ] {
        let error = read(bytes).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    refused(&[
        (Raw { version: 1, ..Raw::new() }, "version 1; versions 2 and 3 (little-endian)"),
        (Raw { version: 4, ..Raw::new() }, "version 4;"),
        (Raw { version: 3_u32.swap_bytes(), ..Raw::new() }, "(little-endian)"),
    ]);
}

#[test]
fn paths_that_are_no_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let [missing, empty, pipe] =
        ["missing.gguf", "empty.gguf", "pipe.gguf"].map(|name| dir.path().join(name));
    std::fs::write(&empty, b"").unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
    for (path, wanted) in [
        (&missing, "No such file"),
        (&dir.path().to_owned(), "it is not a regular file"),
        (&pipe, "it is not a regular file"),
        (&empty, "not a usable GGUF file"),
    ] {
        let error = Gguf::open(path).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    for n in [100_001, u64::from(u32::MAX), 1 << 63, u64::MAX] {
        refused(&[(Raw { n_key: n, ..Raw::new() }, &format!("it claims {n} metadata keys"))]);
    }
    for n in [1 << 20, 1 << 63, u64::MAX] {
        refused(&[
            (Raw { n_tensor: n, ..Raw::new() }, &format!("it claims {n} tensors")),
            (Raw::keys(&[array(U8, n, b"")]), "key `a`: "),
            (Raw::keys(&[array(U32, n, b"")]), "key `a`: "),
            (Raw::keys(&[array(12, n, b"")]), "key `a`: "),
            (Raw::keys(&[array(STRING, n, b"")]), "key `a`: "),
            (
                Raw::keys(&[key("s", STRING, &n.to_le_bytes())]),
                "key `s`: its header ends too early",
            ),
            (Raw::keys(&[n.to_le_bytes().to_vec()]), "its header ends too early"),
            (Raw { tensors: n.to_le_bytes().to_vec(), ..Raw::new() }, "its header ends too early"),
        ]);
    }
    // One more than there are: what follows is read as a key or tensor, and is none.
    refused(&[
        (Raw { n_key: 2, ..Raw::new() }, "its header ends too early"),
        (Raw { n_tensor: 2, ..Raw::new() }, "names are 1 to 63 bytes"),
    ]);
}

#[test]
fn unsound_metadata_is_refused() {
    let n = || key("n", U32, &[1, 0, 0, 0]);
    refused(&[
        (Raw::keys(&[n(), n()]), "it has the key `n` twice"),
        (Raw::keys(&[key("k", 13, &[])]), "key `k`: has a value of kind 13"),
        (Raw::keys(&[key("k", u32::MAX, &[])]), "kind 4294967295"),
        (Raw::keys(&[array(13, 1, &[])]), "key `a`: has an array of kind 13"),
        (Raw::keys(&[array(ARRAY, 1, &array(U8, 1, &[1])[9..])]), "an array of arrays"),
        (Raw::keys(&[key("s", STRING, &string(b"\xff\xfe"))]), "key `s`: has a string that is not"),
        (Raw::keys(&[array(STRING, 1, &string(b"\xc3"))]), "key `a`: has a string that is not"),
        (Raw::keys(&[string(b"\xff")]), "not UTF-8"),
        (Raw::keys(&[alignment(0)]), "its alignment is U32(0); 32 or more is needed"),
        (Raw::keys(&[alignment(3)]), "its alignment is U32(3)"),
        (Raw::keys(&[alignment(16)]), "its alignment is U32(16)"),
        (Raw::keys(&[alignment(48)]), "its alignment is U32(48)"),
        (Raw::keys(&[alignment(1 << 31)]), "tensor `t` ends 64 bytes into the data, which has 0"),
        (Raw::keys(&[key("general.alignment", STRING, &string(b"32"))]), "its alignment is String"),
    ]);
}

#[test]
fn unsound_tensors_are_refused() {
    let one = |dims: &[u64], dtype| Raw::tensors(&[tensor("t", dims, dtype, 0)]);
    let at = |offset| Raw::tensors(&[tensor("t", &[8], F32, offset)]);
    let named = |name: &str| Raw::tensors(&[tensor(name, &[8], F32, 0)]);
    let t = || tensor("t", &[8], F32, 0);
    refused(&[
        (one(&[], F32), "tensor `t` has 0 dimensions; 1 to 4"),
        (one(&[1, 1, 1, 1, 1], F32), "tensor `t` has 5 dimensions"),
        (one(&[0], F32), "tensor `t` has a dimension of 0"),
        (one(&[8, 0], F32), "tensor `t` has a dimension of 0"),
        (one(&[1 << 63], F32), "tensor `t` has a dimension of 9223372036854775808"),
        (one(&[u64::MAX, 2], F32), "tensor `t` has a dimension of 18446744073709551615"),
        (one(&[1 << 32, 1 << 32], F32), "tensor `t` of shape [4294967296, 4294967296, 1, 1]"),
        (one(&[1 << 62, 1 << 62, 1 << 62, 1 << 62], F32), "or is too large"),
        (one(&[1 << 62], F32), "or is too large"),
        (one(&[1 << 40], F32), "the file was cut off"),
        (one(&[17], F32), "tensor `t` ends 68 bytes into the data, which has 64"),
        (one(&[33], Q8_0), "has rows that Q8_0 cannot hold"),
        (one(&[32, 1 << 59], Q8_0), "or is too large"),
        (one(&[8], 4), "tensor `t` has element type 4; this version reads [F32, F16"),
        (one(&[8], u32::MAX), "element type 4294967295"),
        (at(96), "tensor `t` ends 128 bytes into the data"),
        (at(1), "tensor `t` starts at 1, no multiple of 32"),
        (at(u64::MAX), "tensor `t` starts at 18446744073709551615"),
        (at(u64::MAX - 31), "or is too large"),
        (at(1 << 62), "the file was cut off"),
        (named(""), "tensor ``: names are 1 to 63 bytes"),
        (named(&"x".repeat(64)), "names are 1 to 63 bytes"),
        (named("a\0b"), "names are 1 to 63 bytes"),
        (Raw::tensors(&[t(), t()]), "it has the tensor `t` twice"),
    ]);
    assert!(read(&at(32).bytes()).is_ok(), "32 of 64 bytes from 32 on are inside");
    assert!(read(&named(&"x".repeat(63)).bytes()).is_ok());
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let mut header = Header::default();
    header.set("name", "text".to_owned());
    header.set("pieces", vec!["a".to_owned(), "b".to_owned()]);
    header.set("scores", vec![1.0_f32, 2.0]);
    header.tensor("first", DType::F32, [8, 2, 1, 1]);
    header.tensor("last", DType::Q8_0, [32, 3, 1, 1]);
    let (bytes, last) = (common::file(&header), 64 + 3 * 34);
    let whole = header.encode().len() + last; // the padding after the last tensor may go
    assert!(read(&bytes[..whole]).is_ok());
    for length in 0..whole {
        let error = read(&bytes[..length]).expect_err("cut off").to_string();
        assert!(error.contains("test.gguf is not a usable GGUF file"), "{length}: {error}");
    }
    let error = read(&bytes[..whole - 1]).unwrap_err().to_string();
    assert!(error.contains("tensor `last` ends 166 bytes into the data, which has 165"), "{error}");
}

#[test]
fn the_writer_refuses_what_no_reader_would_take() {
    let writes = |fill: fn(&mut Header)| {
        std::panic::catch_unwind(|| {
            let mut header = Header::default();
            fill(&mut header);
            header.encode()
        })
    };
    assert!(writes(|h| h.tensor("t", DType::Q8_0, [32, 1, 1, 1])).is_ok());
    for fill in [
        (|h| h.tensor("", DType::F32, [1; 4])) as fn(&mut Header),
        |h| h.tensor(&"x".repeat(64), DType::F32, [1; 4]),
        |h| h.tensor("a\0b", DType::F32, [1; 4]),
        |h| h.tensor("t", DType::Q8_0, [33, 1, 1, 1]),
        |h| h.tensor("t", DType::F32, [8, 0, 1, 1]),
        |h| h.tensor("t", DType::F32, [1 << 62, 1 << 62, 1, 1]),
        |h| (0..2).for_each(|_| h.tensor("t", DType::F32, [1; 4])),
        |h| (0..2).for_each(|_| h.set("k", 1_u32)),
        |h| h.set("", 1_u32),
        |h| h.set("general.alignment", 64_u32),
    ] {
        assert!(writes(fill).is_err());
    }
}
