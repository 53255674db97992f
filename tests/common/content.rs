//! What a model file says and holds, but for the hashes of the files that it was made of: checkpoints that are written
//! otherwise and say the same become the same model.

use std::collections::BTreeMap;
use std::path::Path;

use openvla_kernels::{DType, Gguf, Shape, Value};

/// Settings, and tensors in the file's order.
#[derive(PartialEq)]
pub struct Content {
    settings: BTreeMap<String, Value>,
    tensors: Vec<(String, DType, Shape, Vec<u8>)>,
}

impl Content {
    pub fn of(model: &Path) -> Self {
        let file = Gguf::open(model).unwrap();
        let mut settings = file.metadata().clone();
        settings.remove("openvla.source.sha256").expect("it says what it was made of");
        let tensors = file.tensors().iter();
        let tensors = tensors.map(|tensor| {
            let bytes = file.bytes()[tensor.range.clone()].to_vec();
            (tensor.name.clone(), tensor.dtype, tensor.shape, bytes)
        });
        Self { settings, tensors: tensors.collect() }
    }
}
