//! Whether a model file is signed by somebody whom its user trusts: signatures of
//! [minisign](https://jedisct1.github.io/minisign/), beside the file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
pub use minisign_verify::PublicKey;
use minisign_verify::{Error, Signature};

/// Signatures and keys are shorter: two comments and two numbers.
const MAX_BYTES: u64 = 1 << 16;

/// Reads a public key: the key itself, `RW…`, or the name of a file that holds it.
///
/// # Errors
/// Says what was found and what is wanted.
pub fn public_key(text: &str) -> Result<PublicKey, String> {
    if let Ok(key) = PublicKey::from_base64(text) {
        return Ok(key);
    }
    let wanted =
        "a public key of minisign (RW…) is wanted, or a file of one, as `minisign -G` makes it";
    let file = read(Path::new(text)).map_err(|error| format!("{error:#}; {wanted}"))?;
    PublicKey::decode(&file).map_err(|error| format!("{text}: {error}; {wanted}"))
}

/// Where minisign puts a file's signature.
pub fn path(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".minisig");
    path.into()
}

/// Checks that `key` signed the bytes that `file` has now, and gives the signature's trusted comment, which is
/// signed as well.
///
/// # Errors
/// Without a signature beside the file; if it is another key's or of other bytes.
pub fn check(file: &Path, key: &PublicKey) -> Result<String> {
    let beside = path(file);
    let hint = || {
        format!("{} has no signature that can be read: `minisign -Sm` makes one", file.display())
    };
    let signature = read(&beside).with_context(hint)?;
    let signature = Signature::decode(&signature)
        .with_context(|| format!("{} is not a signature of minisign", beside.display()))?;
    let refused = |error| match error {
        Error::UnexpectedKeyId => {
            anyhow!("{} is of another key than the one that is trusted", beside.display())
        }
        Error::InvalidSignature => anyhow!(
            "{} or its signature was changed after it was signed: get both again from where they came from",
            file.display()
        ),
        Error::UnsupportedLegacyMode => {
            anyhow!(
                "{} is of the kind that minisign made before 0.10: sign it again",
                beside.display()
            )
        }
        error => anyhow!("{}: {error}", beside.display()),
    };
    let mut verifier = key.verify_stream(&signature).map_err(refused)?;
    let cannot = || format!("cannot read {}", file.display());
    let mut bytes = File::open(file).with_context(cannot)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = bytes.read(&mut buffer).with_context(cannot)?;
        if n == 0 {
            break;
        }
        verifier.update(&buffer[..n]);
    }
    verifier.finalize().map_err(refused)?;
    Ok(signature.trusted_comment().to_owned())
}

fn read(path: &Path) -> Result<String> {
    let cannot = || format!("cannot read {}", path.display());
    let mut text = String::new();
    let file = File::open(path).with_context(cannot)?;
    file.take(MAX_BYTES + 1).read_to_string(&mut text).with_context(cannot)?;
    ensure!(text.len() as u64 <= MAX_BYTES, "{} has more than {MAX_BYTES} bytes", path.display());
    Ok(text)
}
