//! A key of minisign, a signature, a server's token, or those of its clients, as files: words, or a signature that is the key's and covers its
//! comment.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla::cli::signature;
use openvla_serve::tokens::Tokens;

const KEY: &str =
    "untrusted comment: a key\nRWRvcGVudmxhAJLzgdmY3NP4x7X/gDkVgYlHFjqVb6Vjpio1u74r6Z9Q\n";
/// Of [`SIGNED`], made for this.
const SIGNATURE: &str = "untrusted comment: a signature\n\
    RURvcGVudmxhAN81/9akKY15bnkgfqpjYx9XVmxcG4kZ3gGXSS4FUWNxtCiq4Qsflh4O5p/xmK2hfS1wWE22ideYI/Bigcs26Qs=\n\
    trusted comment: for the fuzzer\n\
    evrmTeaOY24awmBB1WN4aL2a6opd//ncCCLEvzrDdZJ/5vXPCVSK9B/8JDSlqhJy5kEyGA0mpA/SVZJIYYkwDw==\n";
const SIGNED: &str = "a model file";
const COMMENT: &str = "for the fuzzer";

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = common::folder("signature", &[]);
    for (name, text) in [("model", SIGNED), ("key", KEY), ("model.minisig", SIGNATURE)] {
        std::fs::write(folder.join(name), text).expect("memory");
    }
    let [model, key] = ["model", "key"].map(|name| folder.join(name));
    let key = signature::public_key(key.to_str().expect("a path")).expect("a key");
    assert_eq!(signature::check(&model, &key).expect("a signature"), COMMENT);
    folder
});

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let [model, key, token, clients] =
        ["model", "key", "token", "clients"].map(|name| FOLDER.join(name));
    let (path, bytes) = match which % 7 {
        0 => (key.clone(), bytes.to_vec()),
        1 => (key.clone(), common::edited(KEY.as_bytes(), bytes)),
        2 => (signature::path(&model), bytes.to_vec()),
        3 => (signature::path(&model), common::edited(SIGNATURE.as_bytes(), bytes)),
        4 => (model.clone(), bytes.to_vec()),
        5 => (token.clone(), bytes.to_vec()),
        _ => (clients.clone(), bytes.to_vec()),
    };
    common::with_file(&path, &bytes, || {
        if let Ok(key) = signature::public_key(key.to_str().expect("a path"))
            && let Ok(comment) = signature::check(&model, &key)
        {
            let signed = std::fs::read(&model).expect("memory");
            assert_eq!((signed.as_slice(), comment.as_str()), (SIGNED.as_bytes(), COMMENT));
        }
        if Tokens::read(Some(&token), None).is_ok() {
            assert!(bytes.trim_ascii().iter().all(u8::is_ascii_graphic));
        }
        if Tokens::read(None, Some(&clients)).is_ok() {
            assert!(std::str::from_utf8(&bytes).is_ok());
        }
    });
    if let Ok(text) = std::str::from_utf8(&bytes) {
        let _ = signature::PublicKey::from_base64(text);
    }
});
