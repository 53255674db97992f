//! One of a tokenizer's files, with `tokenizer.json` there or `tokenizer.model` alone: words, or a piece for each row and
//! a tokenizer that takes any text.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla::tokenizer::Tokenizer;
use openvla_convert::tokenizer::{self, FILES};

const ROWS: usize = 768;

/// With both kinds, and with the second alone.
static FOLDERS: LazyLock<[PathBuf; 2]> = LazyLock::new(|| {
    let files = FILES.map(|name| common::example("openvla-example").join(name));
    let files = files.each_ref().map(PathBuf::as_path);
    let folders = [common::folder("both", &files), common::folder("model", &files[1..])];
    for folder in &folders {
        tokenizer::read(folder, ROWS).expect("the example's");
    }
    folders
});

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let which = usize::from(*which);
    let folder = &FOLDERS[which / FILES.len() % 2];
    common::with_file(&folder.join(FILES[which % FILES.len()]), bytes, || {
        let Ok(vocabulary) = tokenizer::read(folder, ROWS) else { return };
        assert_eq!(vocabulary.tokens.len(), ROWS);
        let tokenizer = Tokenizer::new(&vocabulary).expect("`read` tries it");
        for text in ["put the carrot into the pot", &String::from_utf8_lossy(bytes)] {
            if let Ok(ids) = tokenizer.encode(text) {
                assert!(ids.iter().all(|id| (*id as usize) < ROWS));
            }
        }
    });
});
