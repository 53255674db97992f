//! A sound checkpoint folder, to be damaged.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use openvla::{OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, Spec, Variant};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

use crate::content::Content;

/// Contents by name.
type Files = BTreeMap<String, Vec<u8>>;

pub const SHARD: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// The example checkpoint's files, made once for each variant and number of shards.
fn files(variant: Variant, shards: usize) -> Files {
    static MADE: Mutex<BTreeMap<(bool, usize), Files>> = Mutex::new(BTreeMap::new());
    let make = || {
        let dir = tempfile::tempdir().unwrap();
        openvla_example::write(dir.path(), &Spec { variant, shards, ..COMMITTED }).unwrap();
        contents(dir.path())
    };
    let mut made = MADE.lock().unwrap();
    made.entry((variant == Variant::V01, shards)).or_insert_with(make).clone()
}

pub fn contents(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// A tensor of a shard: type, shape, bytes.
pub type Tensor = (Dtype, Vec<usize>, Vec<u8>);

pub struct Checkpoint(TempDir);

impl Checkpoint {
    /// In a folder of the published model's name, which goes into the file.
    pub fn new(variant: Variant, shards: usize) -> Self {
        let checkpoint = Self(tempfile::tempdir().unwrap());
        fs::create_dir(checkpoint.path()).unwrap();
        let files = files(variant, shards);
        files.iter().for_each(|(name, bytes)| checkpoint.write(name, bytes));
        checkpoint
    }

    /// Two towers in one shard.
    pub fn plain() -> Self {
        Self::new(Variant::OpenVla, 1)
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().join("openvla-7b")
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join(name)).unwrap()
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path().join(name), bytes).unwrap();
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path().join(name)).unwrap();
    }

    /// Changes a JSON file.
    pub fn json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&self.read(name)).unwrap();
        change(&mut value);
        self.write(name, value.to_string().as_bytes());
    }

    /// Sets one place of a JSON file, given as a pointer; what is not there yet is added.
    pub fn set(&self, name: &str, pointer: &str, to: Value) {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.json(name, |json| {
            let parent = json.pointer_mut(parent).expect(pointer);
            match parent {
                Value::Array(list) => list[key.parse::<usize>().unwrap()] = to,
                object => object[key] = to,
            }
        });
    }

    /// Changes a shard's tensors and writes it anew.
    pub fn tensors(&self, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
        let bytes = self.read(SHARD);
        let shard = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = shard.iter();
        let mut tensors = tensors
            .map(|(name, t)| (name.into(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
            .collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, (dtype, shape, data))| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        self.write(SHARD, &safetensors::serialize(views, None).unwrap());
    }

    /// Changes a shard's header and leaves its data.
    pub fn header(&self, change: impl FnOnce(&mut Value)) {
        let bytes = self.read(SHARD);
        let n = usize::try_from(u64::from_le_bytes(*bytes.first_chunk().unwrap())).unwrap();
        let mut header = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
        change(&mut header);
        self.write(SHARD, &shard(&header.to_string(), &bytes[8 + n..]));
    }

    /// What the folder becomes, or the reason why not. Then nothing was left behind, and
    /// a file that was there is as it was.
    pub fn convert(&self) -> Result<Content, String> {
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("model.gguf");
        fs::write(&path, b"as it was").unwrap();
        let result = convert(&self.path(), &path);
        let mut left = contents(out.path());
        assert_eq!(left.len(), 1, "left behind: {:?}", left.keys());
        let file = left.remove("model.gguf").unwrap();
        match result {
            Ok(()) => {
                let opened = OpenVla::open(&path, &Options::default()).map(drop);
                opened.expect("what is written can be opened");
                Ok(Content::of(&path))
            }
            Err(why) => {
                assert_eq!(file, b"as it was", "{why}");
                Err(why)
            }
        }
    }

    /// The folder must be refused, for a reason that says all that is `wanted`.
    pub fn refused(&self, wanted: &[&str]) {
        let Err(why) = self.convert() else { panic!("converted, not refused: {wanted:?}") };
        assert!(wanted.iter().all(|wanted| why.contains(wanted)), "{why}\nwanted: {wanted:?}");
    }
}

/// A safetensors file of that header, whatever it says.
pub fn shard(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// What `openvla-convert` does, with its message.
pub fn convert(checkpoint: &Path, out: &Path) -> Result<(), String> {
    Conversion::new(checkpoint, &Encoding::default().into())
        .and_then(|conversion| conversion.write(out, &indicatif::ProgressBar::hidden()))
        .map_err(|error| format!("{error:#}"))
}
