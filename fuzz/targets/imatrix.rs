//! An importance matrix, any bytes or a sound one with some changed: words, or numbers that every type can be
//! quantized with.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla_convert::imatrix::{COUNTS, ImportanceMatrix, SUMS, TYPE};
use openvla_convert::plan::PlannedTensor;
use openvla_convert::{Conversion, Options};
use openvla_kernels::{ALIGNMENT, DType, Header, MAX_TENSOR_NAME, shape};

static PATH: LazyLock<PathBuf> =
    LazyLock::new(|| common::folder("imatrix", &[]).join("imatrix.gguf"));

const ROW: usize = 256;

/// Some of the example's matrices, whose rows are short.
static PLAN: LazyLock<Vec<PlannedTensor>> = LazyLock::new(|| {
    let conversion = Conversion::new(&common::example("openvla-example"), &Options::default());
    let mut plan = conversion.expect("an example").plan;
    plan.retain(|planned| planned.dtype.is_quantized() && planned.n_row() > 1);
    plan.retain(|planned| planned.tensor.name.len() + SUMS.len() <= MAX_TENSOR_NAME);
    plan.truncate(4);
    plan
});

static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut header = Header::default();
    header.set("general.type", TYPE.to_owned());
    let mut data = Vec::new();
    for PlannedTensor { tensor, .. } in &*PLAN {
        for (suffix, n) in [(SUMS, tensor.shape[0]), (COUNTS, 1)] {
            header.tensor(&format!("{}{suffix}", tensor.name), DType::F32, shape(&[n]));
            data.extend((1..=n).flat_map(|i| (i as f32).to_le_bytes()));
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
    }
    [header.encode(), data].concat()
});

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let changed;
    let bytes = if which % 2 == 0 {
        bytes
    } else {
        changed = common::edited(&SOUND, bytes);
        &changed
    };
    std::fs::write(&*PATH, bytes).expect("memory");
    let Ok(importance) = ImportanceMatrix::open(&PATH, &PLAN) else { return };
    for columns in PLAN.iter().filter_map(|planned| importance.get(&planned.tensor.name)) {
        // As long as the largest block.
        let columns: Vec<f32> = columns.iter().copied().cycle().take(ROW).collect();
        let row: Vec<f32> = (0..ROW).map(|i| (i as f32).sin()).collect();
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
            let mut out = vec![0; dtype.row_bytes(ROW).expect("whole blocks")];
            dtype.encode(&row, ROW, Some(&columns), &mut out);
            assert!(dtype.decode(&out).iter().all(|x| x.is_finite()), "{dtype}");
        }
    }
});
