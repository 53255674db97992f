//! Signatures of model files: whose they are, what they cover, and that a model without a good one is not opened.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use clap::Parser;
use minisign::KeyPair;
use openvla::cli::{ModelArgs, signature};
use tempfile::TempDir;

/// The trained example, and the keys of those who sign it.
struct Signed {
    folder: TempDir,
    model: PathBuf,
    keys: KeyPair,
}

impl Signed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model.gguf");
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../src/cli/tabletop.gguf");
        std::fs::copy(example, &model).unwrap();
        Self { folder, model, keys: KeyPair::generate_unencrypted_keypair().unwrap() }
    }

    /// As `minisign -S` does.
    fn sign(&self, comment: &str) {
        let file = File::open(&self.model).unwrap();
        let signature = minisign::sign(None, &self.keys.sk, file, Some(comment), None).unwrap();
        std::fs::write(signature::path(&self.model), signature.into_string()).unwrap();
    }

    /// What a check with this key says. Opening the model and `openvla-convert verify` say the same.
    fn check(&self, key: &KeyPair) -> Result<String, String> {
        let file = self.folder.path().join("key.pub");
        std::fs::write(&file, key.pk.to_box().unwrap().into_string()).unwrap();
        let [model, file] = [&self.model, &file].map(|path| path.to_str().unwrap());
        let opened = open(&["-m", model, "--require-signature", file]);
        let verified = Command::new(env!("CARGO_BIN_EXE_openvla-convert"))
            .args(["verify", model, "--key", file])
            .output()
            .unwrap();
        let verified = String::from_utf8(verified.stderr).unwrap();
        let said = signature::check(&self.model, &signature::public_key(file).unwrap());
        match &said {
            Ok(comment) => {
                opened.unwrap();
                assert_eq!(verified.trim(), format!("signed: {comment}"));
            }
            Err(error) => {
                assert_eq!(opened.unwrap_err(), format!("{error:#}"));
                assert_eq!(verified.trim(), format!("error: {error:#}"));
            }
        }
        said.map_err(|error| format!("{error:#}"))
    }
}

/// Opens a model as every program does.
fn open(words: &[&str]) -> Result<(), String> {
    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        model: ModelArgs,
    }
    let program = Program::parse_from([&["program"], words].concat());
    program.model.open().map(drop).map_err(|error| format!("{error:#}"))
}

#[test]
fn a_signed_model_opens() {
    let it = Signed::new();
    it.sign("from revision 7");
    assert_eq!(it.check(&it.keys).unwrap(), "from revision 7");
    let key = signature::public_key(&it.keys.pk.to_base64()).unwrap(); // without a file
    assert_eq!(signature::check(&it.model, &key).unwrap(), "from revision 7");
}

#[test]
fn what_was_not_signed_does_not_open() {
    let it = Signed::new();
    let refused = |words: &str| {
        let error = it.check(&it.keys).unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    let signature = signature::path(&it.model);
    refused("has no signature that can be read");
    for (text, words) in [
        (&b"no signature"[..], "is not a signature of minisign"),
        (&[b'a'; 1 << 17], "has more than 65536 bytes"),
        (&[0xff; 8], "has no signature that can be read"),
    ] {
        std::fs::write(&signature, text).unwrap();
        refused(words);
    }

    it.sign("mine");
    let signed = std::fs::read_to_string(&signature).unwrap();
    std::fs::write(&signature, signed.replace("mine", "ours")).unwrap();
    refused("was changed after it was signed");
    std::fs::write(&signature, &signed).unwrap();
    let bytes = std::fs::read(&it.model).unwrap();
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    for changed in [&changed[..], &bytes[..bytes.len() - 1], &[]] {
        std::fs::write(&it.model, changed).unwrap();
        refused("was changed after it was signed");
    }
    std::fs::write(&it.model, &bytes).unwrap();
    it.check(&it.keys).unwrap();
    let error = it.check(&KeyPair::generate_unencrypted_keypair().unwrap()).unwrap_err();
    assert!(error.contains("is of another key than the one that is trusted"), "{error}");
}

#[test]
fn a_key_is_a_key_or_a_file_of_one() {
    let wrong = signature::public_key("RWnonsense").unwrap_err();
    assert!(wrong.starts_with("cannot read RWnonsense"), "{wrong}");
    assert!(wrong.contains("a public key of minisign (RW…) is wanted"), "{wrong}");
    let file = tempfile::NamedTempFile::new().unwrap();
    let wrong = signature::public_key(file.path().to_str().unwrap()).unwrap_err();
    assert!(wrong.contains("a public key of minisign (RW…) is wanted"), "{wrong}");
}
