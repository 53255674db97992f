//! Model files of a size and type whose weights are zeros that take no room on a disk: without
//! numbers, shapes are all that counts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_example::{COMMITTED, Size, Spec};
use openvla_kernels::Header;
use tempfile::TempDir;

/// Files that were written so far; they go with it.
pub struct Models {
    folder: TempDir,
    written: Mutex<BTreeMap<String, PathBuf>>,
}

impl Models {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), written: Mutex::default() }
    }

    pub fn get(&self, size: Size, encoding: &str) -> PathBuf {
        let name = format!("{size:?}-{encoding}.gguf");
        let mut written = self.written.lock().unwrap();
        let write = || write(&self.folder.path().join(&name), size, encoding.parse().unwrap());
        written.entry(name.clone()).or_insert_with(write).clone()
    }
}

fn write(path: &Path, size: Size, encoding: Encoding) -> PathBuf {
    let model = Conversion::random(&Spec { size, ..COMMITTED }, encoding, 1).unwrap();
    let mut header = Header::default();
    model.config.write(&mut header);
    for planned in &model.plan {
        header.tensor(&planned.tensor.name, planned.dtype, planned.tensor.shape);
    }
    let start = header.encode();
    let mut file = File::create(path).unwrap();
    file.write_all(&start).unwrap();
    file.set_len((start.len() + header.data_bytes()) as u64).unwrap();
    path.to_owned()
}
