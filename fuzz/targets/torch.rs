//! A file by `torch.save`, or its pickle alone, whose reader would else be reached by sound archives only: words, or
//! tensors that are in the file.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use openvla_convert::torch::{self, pickle};

fuzz_target!(|file: &[u8]| {
    if let Ok(tensors) = torch::read(Cursor::new(file)) {
        for tensor in tensors.values() {
            let end = tensor.offset.checked_add(tensor.length as u64).expect("an end");
            assert!(tensor.length > 0 && end <= file.len() as u64);
        }
    }
    if let Ok(views) = pickle::state_dict(file) {
        for (_, view) in views {
            assert_eq!(view.shape.iter().product::<usize>() as u64, view.numel);
        }
    }
});
