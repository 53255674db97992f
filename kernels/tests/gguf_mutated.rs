//! Mutated GGUF files: `Gguf` says yes or no, never panics, and allocates no more than a small
//! multiple of the file's size. One test, since it counts every allocation of the process.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::{backend, cases, file};
use openvla_kernels::{Array, DType, Gguf, Header, Result, Value, Weights};
use proptest::collection::vec;
use proptest::prelude::*;

/// What reading may hold at most, in sizes of the file. Measured on files that are made of the
/// smallest things: 7.4 for empty strings, 6.8 for keys, whose lists double as they grow.
const MULTIPLE: usize = 10;
/// A message, whatever the file's size.
const MESSAGE: usize = 4096;

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; the counters are beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(held, Relaxed);
        // SAFETY: the caller's promises about the layout are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `at` came from `alloc` with this layout, so from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Reads a file, holding that at no moment more was allocated than the file allows. Growing a
/// vector counts its old and its new place.
fn read(bytes: &[u8]) -> Result<Gguf> {
    let bytes: &'static [u8] = Box::leak(bytes.into());
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = Gguf::built_in("test.gguf", bytes);
    let most = PEAK.load(Relaxed) - before;
    let limit = MULTIPLE * bytes.len() + MESSAGE;
    assert!(most <= limit, "{most} bytes allocated for a file of {}", bytes.len());
    result
}

/// What a sound file promises is there, and ggml takes it.
fn check(gguf: &Gguf) {
    for tensor in gguf.tensors() {
        assert!(tensor.range.end <= gguf.bytes().len() && !tensor.range.is_empty());
        assert_eq!(tensor.range.len(), common::data_bytes(tensor.dtype, tensor.shape));
    }
    if let Ok(mut weights) = Weights::load(gguf, backend()) {
        for tensor in gguf.tensors() {
            let taken = weights.take(&tensor.name, tensor.shape);
            assert_eq!(taken.is_ok(), tensor.dtype.is_float(), "{}", tensor.name);
        }
    }
}

/// A file with a bit of everything, and where its header ends.
fn model() -> (Vec<u8>, usize) {
    let mut header = Header::default();
    header.set("general.architecture", "openvla".to_owned());
    header.set("openvla.block_count", 2_u32);
    header.set("openvla.eps", 1e-6_f32);
    header.set("flag", true);
    header.set("count", Value::U64(7));
    header.set("pieces", ["a", "b c", "▁"].map(str::to_owned).to_vec());
    header.set("scores", vec![0.0_f32, -1.0, -2.0]);
    header.set("types", vec![1_i32, 2, 3]);
    header.set("more", Value::Array(Array::U32(vec![4, 5])));
    header.tensor("blk.0.weight", DType::Q8_0, [64, 2, 1, 1]);
    header.tensor("blk.0.bias", DType::F32, [2, 1, 1, 1]);
    header.tensor("ids", DType::I32, [3, 1, 1, 1]);
    header.tensor("patch", DType::F16, [2, 2, 3, 4]);
    (file(&header), header.encode().len())
}

#[derive(Debug, Clone)]
enum Mutation {
    Flip { at: usize, bit: u8 },
    Write { at: usize, bytes: Vec<u8> },
    Insert { at: usize, bytes: Vec<u8> },
    Remove { at: usize, n: usize },
    Cut { at: usize },
}

fn mutation(length: usize) -> impl Strategy<Value = Mutation> {
    let numbers = [0, 1, 2, 3, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 62, 1 << 63, u64::MAX - 31];
    let number = prop::sample::select([&numbers[..], &[u64::MAX]].concat());
    let bytes = (number, prop::sample::select(vec![1_usize, 4, 8]))
        .prop_map(|(number, n)| number.to_le_bytes()[..n].to_vec());
    prop_oneof![
        4 => (0..length, 0..8_u8).prop_map(|(at, bit)| Mutation::Flip { at, bit }),
        4 => (0..length, bytes).prop_map(|(at, bytes)| Mutation::Write { at, bytes }),
        2 => (0..length, vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Mutation::Insert { at, bytes }),
        2 => (0..length, 1..9_usize).prop_map(|(at, n)| Mutation::Remove { at, n }),
        1 => (0..length).prop_map(|at| Mutation::Cut { at }),
    ]
}

impl Mutation {
    fn apply(&self, file: &mut Vec<u8>) {
        let place = |at: usize| at.min(file.len());
        match self {
            Self::Flip { at, bit } if *at < file.len() => file[*at] ^= 1 << bit,
            Self::Flip { .. } => {}
            Self::Write { at, bytes } => {
                let (start, end) = (place(*at), place(at + bytes.len()));
                file.splice(start..end, bytes.iter().copied());
            }
            Self::Insert { at, bytes } => {
                let at = place(*at);
                file.splice(at..at, bytes.iter().copied());
            }
            Self::Remove { at, n } => drop(file.drain(place(*at)..place(at + n))),
            Self::Cut { at } => file.truncate(*at),
        }
    }
}

/// The sound files that make a reader allocate most: many of the smallest things.
fn crowded() -> [Vec<u8>; 4] {
    let mut strings = Header::default();
    strings.set("a", vec![String::new(); 20_000]);
    let mut keys = Header::default();
    (0..4_000).for_each(|i| keys.set(&format!("{i:x}"), Value::U8(0)));
    let mut tensors = Header::default();
    (0..4_000).for_each(|i| tensors.tensor(&format!("{i:x}"), DType::F32, [1; 4]));
    // The same with all data in one place, which `Header` would not write.
    let mut overlapping = b"GGUF\x03\0\0\0".to_vec();
    overlapping.extend([4_000_u64, 0].map(u64::to_le_bytes).concat());
    for name in (0..4_000).map(|i| format!("{i:x}")) {
        overlapping.extend((name.len() as u64).to_le_bytes());
        overlapping.extend(name.as_bytes());
        overlapping.extend([1, 1, 0, DType::F32.number(), 0, 0].map(u32::to_le_bytes).concat());
    }
    overlapping.resize(overlapping.len().next_multiple_of(32) + 4, 0);
    let [strings, keys, tensors] = [strings, keys, tensors].map(|header| file(&header));
    [strings, keys, tensors, overlapping]
}

#[test]
fn no_file_makes_the_reader_panic_or_allocate_much() {
    backend();
    let (model, header) = model();
    check(&read(&model).unwrap());
    for file in crowded() {
        assert!(read(&file).is_ok());
    }
    proptest!(cases(4096), |(mutations in vec(mutation(header), 1..5))| {
        let mut file = model.clone();
        mutations.iter().for_each(|mutation| mutation.apply(&mut file));
        if let Ok(gguf) = read(&file) {
            check(&gguf);
        }
    });
}
