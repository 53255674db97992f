//! A file of safetensors, or a header alone before as many bytes as the input says, which the header's numbers must
//! agree with: words, or tensors that are in the file.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla_convert::tensors::Tensors;

static PATH: LazyLock<PathBuf> =
    LazyLock::new(|| common::folder("safetensors", &[]).join("model.safetensors"));

fuzz_target!(|input: &[u8]| {
    let Some(([whole, low, high], bytes)) = input.split_first_chunk() else { return };
    let file = if whole % 2 == 1 {
        bytes.to_vec()
    } else {
        let data = vec![0x3c; u16::from_le_bytes([*low, *high]).into()];
        [&(bytes.len() as u64).to_le_bytes(), bytes, &data].concat()
    };
    std::fs::write(&*PATH, &file).expect("memory");
    let mut tensors = Tensors::default();
    if tensors.add(&PATH).is_err() {
        return;
    }
    for name in tensors.entries().keys().filter(|name| tensors.check_type(name).is_ok()) {
        if let Ok(matrix) = tensors.matrix(name) {
            let n = matrix.row * matrix.n_row;
            assert!(n > 0 && n <= file.len());
            matrix.read(0, &mut vec![0.0; n]);
        }
    }
});
