//! Sound files with bytes changed: an error in words, or tensors that are in the file.

use std::io::{Cursor, Read, Seek, SeekFrom};

use openvla_convert::torch::{self, pickle};
use proptest::prelude::*;

use super::*;

/// A file that checks how much is read at once, which is what its reader has allocated.
struct Watched<'a>(Cursor<&'a [u8]>);

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        // A name's length has 16 bits, and a header is read before it is known to be there.
        let most = self.0.get_ref().len().max(usize::from(u16::MAX));
        assert!(buffer.len() <= most, "{} bytes for a file of {most}", buffer.len());
        self.0.read(buffer)
    }
}

impl Seek for Watched<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}

fn sound() -> (Vec<u8>, Vec<u8>) {
    let pickle = state_dict(&[
        ("module.a", tensor("Float", "0", &[2, 3])),
        ("module.b", view(storage("Float", "0", 6), 2, &[2, 2], &[2, 1])),
        ("module.c", tensor("BFloat16", "1", &[5])),
    ]);
    let mut entries = entries(pickle.clone(), &[("0", floats(6)), ("1", vec![7; 10])]);
    entries[2].wide = true;
    (pickle, zip(&entries, true))
}

/// Reads a file and checks that its tensors are inside it.
fn check(file: &[u8]) {
    if let Ok(tensors) = torch::read(Watched(Cursor::new(file))) {
        for (name, tensor) in tensors {
            let end = tensor.offset + tensor.length as u64;
            assert!(tensor.length > 0 && end <= file.len() as u64, "{name}: {tensor:?}");
            let numel: usize = tensor.shape.iter().product();
            assert_eq!(numel * tensor.dtype.bitsize() / 8, tensor.length, "{name}");
        }
    }
}

/// Bytes that mean something, in a pickle or as a number.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![
        any::<u8>(),
        prop::sample::select(
            b"\x00\x01\xFF\x7F(.)NKMJXtsuqrhjcQRb}\x80\x85\x86\x87\x88\x8A".to_vec()
        )
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_file_is_refused_or_read(
        changes in prop::collection::vec((any::<prop::sample::Index>(), byte()), 1..6)
    ) {
        let (_, mut file) = sound();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        check(&file);
    }

    /// The archive is sound, so that every change reaches the pickle's reader.
    #[test]
    fn a_changed_pickle_is_refused_or_read(
        changes in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::option::of(byte()), byte()), 1..6)
    ) {
        let (mut pickle, _) = sound();
        for (at, replaced, byte) in changes {
            let at = 2 + at.index(pickle.len() - 3); // after the protocol
            match replaced {
                Some(replaced) => pickle[at] = replaced,
                None => pickle.insert(at, byte),
            }
        }
        check(&super::file(pickle, &[("0", floats(6)), ("1", vec![7; 10])]));
    }

    #[test]
    fn bytes_that_are_no_pickle_are_refused(code in prop::collection::vec(byte(), 0..200)) {
        let pickle = [b"\x80\x02", &code[..]].concat();
        let Ok(views) = pickle::state_dict(&pickle) else { return Ok(()) };
        prop_assert!(views.len() < code.len());
    }
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let (_, file) = sound();
    check(&file);
    torch::read(Cursor::new(&file[..])).unwrap();
    for length in 0..file.len() {
        assert!(torch::read(Watched(Cursor::new(&file[..length]))).is_err(), "{length} bytes");
    }
}
