//! GGUF files: what `Header` writes, `Gguf` and ggml's own reader read back.

mod common;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::path::Path;

use common::{cases, data_bytes, file, read};
use llama_cpp_sys_2 as sys;
use openvla_kernels::{ALIGNMENT, Array, DType, Gguf, Header, Shape, Value};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

type Metadata = BTreeMap<String, Value>;
type Tensors = BTreeMap<String, (DType, Shape)>;

fn value() -> impl Strategy<Value = Value> {
    let array = prop_oneof![
        vec(any::<i32>(), 0..9).prop_map(Array::I32),
        vec(any::<u32>(), 0..9).prop_map(Array::U32),
        vec(any::<f32>(), 0..9).prop_map(Array::F32),
        vec(".{0,12}", 0..9).prop_map(Array::String),
    ];
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        ".{0,40}".prop_map(Value::String),
        array.prop_map(Value::Array),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
    ]
}

fn tensor() -> impl Strategy<Value = (DType, Shape)> {
    let dtype = prop::sample::select(DType::ALL.to_vec());
    (dtype, 1..4_usize, 1..4_usize, 1..4_usize, 1..4_usize)
        .prop_map(|(dtype, a, b, c, d)| (dtype, [a * dtype.block(), b, c, d]))
}

fn contents() -> impl Strategy<Value = (Metadata, Tensors)> {
    (btree_map("[a-z.\u{e9}]{1,30}", value(), 0..9), btree_map("[a-z.0-9]{1,63}", tensor(), 1..9))
}

fn header(metadata: &Metadata, tensors: &Tensors) -> Header {
    let mut header = Header::default();
    metadata.iter().for_each(|(key, value)| header.set(key, value.clone()));
    tensors.iter().for_each(|(name, (dtype, shape))| header.tensor(name, *dtype, *shape));
    header
}

/// Where each tensor's data starts in the data section, by the format's rule.
fn offsets(tensors: &Tensors) -> Vec<usize> {
    let start = |next: &mut usize, (dtype, shape): &(DType, Shape)| {
        let start = *next;
        *next = (start + data_bytes(*dtype, *shape)).next_multiple_of(ALIGNMENT);
        Some(start)
    };
    tensors.values().scan(0, start).collect()
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn what_is_written_is_read_back((metadata, tensors) in contents()) {
        let header = header(&metadata, &tensors);
        let (bytes, start) = (file(&header), header.encode().len());
        let gguf = read(&bytes).unwrap();
        prop_assert_eq!(gguf.metadata(), &metadata);
        prop_assert_eq!(gguf.tensors().len(), tensors.len());
        let wanted = tensors.iter().zip(offsets(&tensors));
        for (info, ((name, (dtype, shape)), offset)) in gguf.tensors().iter().zip(wanted) {
            prop_assert_eq!((&info.name, info.dtype, info.shape), (name, *dtype, *shape));
            let data = start + offset..start + offset + data_bytes(*dtype, *shape);
            prop_assert_eq!(&info.range, &data);
        }
        prop_assert_eq!(header.data_bytes(), gguf.bytes().len() - start);
    }

    #[test]
    fn ggml_reads_what_is_written((metadata, tensors) in contents()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let header = header(&metadata, &tensors);
        std::fs::write(&path, file(&header)).unwrap();
        let ggml = Ggml::open(&path);
        prop_assert_eq!(ggml.data_offset(), header.encode().len());
        let kinds: BTreeMap<_, _> =
            metadata.iter().map(|(key, value)| (key.clone(), kind(value))).collect();
        prop_assert_eq!(ggml.keys(), kinds);
        let wanted: Vec<_> = tensors
            .iter()
            .zip(offsets(&tensors))
            .map(|((name, (dtype, shape)), at)| (name.clone(), dtype.number(), *shape, at))
            .collect();
        prop_assert_eq!(ggml.tensors(), wanted);
    }
}

#[test]
fn values_keep_their_meaning_in_ggml() {
    let mut header = Header::default();
    header.set("n", 4_000_000_000_u32);
    header.set("x", 1.5e-6_f32);
    header.set("yes", true);
    header.set("text", "▁naïve".to_owned());
    header.set("pieces", vec!["a".to_owned(), String::new(), "ç".to_owned()]);
    header.tensor("t", DType::F32, [1, 1, 1, 1]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, file(&header)).unwrap();
    let ggml = Ggml::open(&path);
    let [n, x, yes, text, pieces] = ["n", "x", "yes", "text", "pieces"].map(|key| ggml.find(key));
    // SAFETY: the context is live, and each index is that of a key of the asked kind.
    unsafe {
        assert_eq!(sys::gguf_get_val_u32(ggml.0, n), 4_000_000_000);
        assert_eq!(sys::gguf_get_val_f32(ggml.0, x), 1.5e-6);
        assert!(sys::gguf_get_val_bool(ggml.0, yes));
        assert_eq!(CStr::from_ptr(sys::gguf_get_val_str(ggml.0, text)).to_str(), Ok("▁naïve"));
        let piece = |i| CStr::from_ptr(sys::gguf_get_arr_str(ggml.0, pieces, i)).to_str();
        assert_eq!([0, 1, 2].map(piece), [Ok("a"), Ok(""), Ok("ç")]);
    }
}

#[test]
fn a_path_and_built_in_bytes_read_alike() {
    let mut header = Header::default();
    header.set("general.architecture", "test".to_owned());
    header.tensor("t", DType::Q8_0, [64, 2, 1, 1]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, file(&header)).unwrap();
    let (opened, built_in) = (Gguf::open(&path).unwrap(), read(&file(&header)).unwrap());
    assert_eq!(opened.metadata(), built_in.metadata());
    assert_eq!(opened.tensors(), built_in.tensors());
    assert_eq!(opened.bytes(), built_in.bytes());
    assert_eq!(opened.file(), path.display().to_string());
}

#[test]
fn a_key_is_read_as_its_kind_or_named() {
    let mut header = Header::default();
    header.set("n", 7_u32);
    header.set("ids", vec![1_i32, -2]);
    let gguf = read(&header.encode()).unwrap();
    assert_eq!(gguf.get::<u32>("n").unwrap(), 7);
    assert_eq!(gguf.get::<Vec<i32>>("ids").unwrap(), [1, -2]);
    for (error, wanted) in [
        (gguf.get::<u32>("m").unwrap_err(), "test.gguf: metadata key `m` is missing"),
        (gguf.get::<f32>("n").unwrap_err(), "`n` is a number (U32(7)), not a 32-bit float"),
        (gguf.get::<u32>("ids").unwrap_err(), "`ids` is an array, not a 32-bit unsigned integer"),
        (gguf.get::<Vec<f32>>("ids").unwrap_err(), "not an array of 32-bit floats"),
        (gguf.get::<String>("n").unwrap_err(), "not a string"),
    ] {
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

/// ggml's number of a value's kind, and for arrays that of their elements and how many there are.
fn kind(value: &Value) -> (u32, Option<(u32, usize)>) {
    let array = |element, n| (sys::GGUF_TYPE_ARRAY, Some((element, n)));
    match value {
        Value::U8(_) => (sys::GGUF_TYPE_UINT8, None),
        Value::I8(_) => (sys::GGUF_TYPE_INT8, None),
        Value::U16(_) => (sys::GGUF_TYPE_UINT16, None),
        Value::I16(_) => (sys::GGUF_TYPE_INT16, None),
        Value::U32(_) => (sys::GGUF_TYPE_UINT32, None),
        Value::I32(_) => (sys::GGUF_TYPE_INT32, None),
        Value::F32(_) => (sys::GGUF_TYPE_FLOAT32, None),
        Value::Bool(_) => (sys::GGUF_TYPE_BOOL, None),
        Value::String(_) => (sys::GGUF_TYPE_STRING, None),
        Value::U64(_) => (sys::GGUF_TYPE_UINT64, None),
        Value::I64(_) => (sys::GGUF_TYPE_INT64, None),
        Value::F64(_) => (sys::GGUF_TYPE_FLOAT64, None),
        Value::Array(Array::I32(v)) => array(sys::GGUF_TYPE_INT32, v.len()),
        Value::Array(Array::U32(v)) => array(sys::GGUF_TYPE_UINT32, v.len()),
        Value::Array(Array::F32(v)) => array(sys::GGUF_TYPE_FLOAT32, v.len()),
        Value::Array(Array::String(v)) => array(sys::GGUF_TYPE_STRING, v.len()),
        Value::Array(Array::Other(kind, n)) => array(*kind, *n),
    }
}

/// A file as ggml's own reader sees it.
struct Ggml(*mut sys::gguf_context);

impl Ggml {
    fn open(path: &Path) -> Self {
        let name = CString::new(path.to_str().unwrap()).unwrap();
        let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
        // SAFETY: a C string, and parameters that ask for the header only.
        let context = unsafe { sys::gguf_init_from_file(name.as_ptr(), params) };
        assert!(!context.is_null(), "ggml refuses {}", path.display());
        Self(context)
    }

    fn find(&self, key: &str) -> i64 {
        let key = CString::new(key).unwrap();
        // SAFETY: a live context and a C string.
        unsafe { sys::gguf_find_key(self.0, key.as_ptr()) }
    }

    fn data_offset(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::gguf_get_data_offset(self.0) }
    }

    fn keys(&self) -> BTreeMap<String, (u32, Option<(u32, usize)>)> {
        // SAFETY: a live context; indices are below its number of keys; names are C strings; only
        // arrays are asked for their elements.
        let key = |i| unsafe {
            let name = CStr::from_ptr(sys::gguf_get_key(self.0, i)).to_str().unwrap().to_owned();
            let kind = sys::gguf_get_kv_type(self.0, i);
            let array = || (sys::gguf_get_arr_type(self.0, i), sys::gguf_get_arr_n(self.0, i));
            (name, (kind, (kind == sys::GGUF_TYPE_ARRAY).then(array)))
        };
        // SAFETY: a live context.
        (0..unsafe { sys::gguf_get_n_kv(self.0) }).map(key).collect()
    }

    fn tensors(&self) -> Vec<(String, u32, Shape, usize)> {
        // SAFETY: a live context; indices are below its number of tensors; names are C strings and
        // sizes four numbers.
        let tensor = |i| unsafe {
            let name = CStr::from_ptr(sys::gguf_get_tensor_name(self.0, i)).to_str().unwrap();
            let shape: [i64; 4] = *sys::gguf_get_tensor_ne(self.0, i).cast();
            let offset = sys::gguf_get_tensor_offset(self.0, i);
            (name.to_owned(), sys::gguf_get_tensor_type(self.0, i), shape.map(|n| n as _), offset)
        };
        // SAFETY: a live context.
        (0..unsafe { sys::gguf_get_n_tensors(self.0) }).map(tensor).collect()
    }
}

impl Drop for Ggml {
    fn drop(&mut self) {
        // SAFETY: a live context that nothing else refers to.
        unsafe { sys::gguf_free(self.0) }
    }
}
