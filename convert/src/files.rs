//! Reads files that other programs wrote.
//!
//! A missing file may have a substitute; one that exists and cannot be read is an error, or the
//! substitute would be used silently. JSON is read as Python writes it, with `NaN`,
//! `Infinity` and `-Infinity`.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek};
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde::de::DeserializeOwned;

/// Whether a file exists.
///
/// # Errors
/// If the name exists, but is a broken link or not a regular file, or cannot be looked up.
pub fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        _ => open(path).map(|_| true),
    }
}

/// Opens a required file.
///
/// # Errors
/// Names the file and says what was found: a broken link, a folder, a git-lfs pointer.
pub fn open(path: &Path) -> Result<File> {
    let shown = path.display();
    let cannot = || format!("cannot read {shown}");
    // Checked before it is opened: opening a pipe would wait for a writer.
    let found = match (fs::metadata(path), fs::read_link(path)) {
        (Err(error), Ok(target)) => Err(error).with_context(|| {
            format!(
                "cannot read {shown}, which is a link to {}; copy the files themselves \
                 (`cp -rL`), or download them again",
                target.display()
            )
        }),
        (found, _) => found.with_context(cannot),
    }?;
    ensure!(!found.is_dir(), "{shown} is a folder; a file is needed");
    ensure!(found.is_file(), "{shown} is not a regular file");
    let mut file = File::open(path).with_context(cannot)?;
    let mut start = [0; GIT_LFS.len()];
    let pointer = file.read_exact(&mut start).is_ok() && start == GIT_LFS;
    ensure!(
        !pointer,
        "{shown} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or \
         download it again"
    );
    file.rewind().with_context(cannot)?;
    Ok(file)
}

/// The start of the pointers that a clone without git-lfs has in place of large files.
const GIT_LFS: [u8; 23] = *b"version https://git-lfs";

/// The first four bytes of a file, which tell whether it is GGUF. A shorter file is padded with zeros.
///
/// # Errors
/// As [`open`].
pub fn read_start(path: &Path) -> Result<[u8; 4]> {
    let mut start = Vec::new();
    let read = open(path)?.take(4).read_to_end(&mut start);
    read.with_context(|| format!("cannot read {}", path.display()))?;
    start.resize(4, 0);
    Ok(start.try_into().expect("four"))
}

/// The bytes of an optional file.
///
/// # Errors
/// As [`exists`], or if the file cannot be read.
pub fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    if !exists(path)? {
        return Ok(None);
    }
    read(path).map(Some)
}

/// The bytes of a required file.
///
/// # Errors
/// As [`open`], or if the file cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open(path)?.read_to_end(&mut bytes);
    read.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes)
}

/// Reads a required JSON file.
///
/// # Errors
/// Names the file, and the key whose value is of another type.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &json_text(path, read(path)?)?)
}

/// Reads an optional JSON file.
///
/// # Errors
/// As [`read_json`].
pub fn read_json_optional<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(bytes) = read_optional(path)? else { return Ok(None) };
    parse(path, &json_text(path, bytes)?).map(Some)
}

/// A JSON file's text, with the numbers of Python that JSON lacks quoted as strings.
///
/// # Errors
/// Names the file if it is empty or not text.
pub fn json_text(path: &Path, bytes: Vec<u8>) -> Result<String> {
    ensure!(!bytes.is_empty(), "{} is empty; download or write it again", path.display());
    let text = String::from_utf8(bytes);
    let text = text.with_context(|| format!("{} is not text in UTF-8", path.display()))?;
    Ok(quote_non_finite(&text).into_owned())
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    let mut json = serde_json::Deserializer::from_str(text);
    let cannot = || format!("{} cannot be used", path.display());
    let value = serde_path_to_error::deserialize(&mut json).with_context(cannot)?;
    json.end().with_context(cannot)?;
    Ok(value)
}

/// Python's `json` writes numbers that JSON lacks. They become strings, as in Protocol Buffers' JSON:
/// where a number is required, the error then names the key, and elsewhere they do no harm.
fn quote_non_finite(text: &str) -> Cow<'_, str> {
    const NAMES: [&str; 3] = ["NaN", "-Infinity", "Infinity"];
    let mut quoted = String::new();
    let (mut copied, mut at, mut in_string) = (0, 0, false);
    while let Some(byte) = text.as_bytes().get(at) {
        let name = NAMES.iter().find(|name| text.as_bytes()[at..].starts_with(name.as_bytes()));
        match (byte, name) {
            (b'\\', _) if in_string => at += 1, // and what it escapes
            (b'"', _) => in_string = !in_string,
            (_, Some(name)) if !in_string => {
                quoted.extend([&text[copied..at], "\"", name, "\""]);
                copied = at + name.len();
                at = copied - 1;
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    quoted.push_str(&text[copied..]);
    Cow::Owned(quoted)
}

/// The runtime's error about a model file, without its advice to convert the checkpoint again.
pub fn checkpoint_error(error: openvla::Error) -> anyhow::Error {
    match error {
        openvla::Error::Model { why } => anyhow!(why),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_lacks_become_strings_and_strings_stay() {
        for (text, wanted) in [
            (r#"{"a": [NaN, -Infinity,Infinity]}"#, r#"{"a": ["NaN", "-Infinity","Infinity"]}"#),
            (
                r#"{"NaN": "Infinity \" NaN \\", "é": NaN}"#,
                r#"{"NaN": "Infinity \" NaN \\", "é": "NaN"}"#,
            ),
            ("NaN", r#""NaN""#),
            (r#"{"a": 1}"#, r#"{"a": 1}"#),
            (r#""NaN \"#, r#""NaN \"#),
            ("", ""),
        ] {
            assert_eq!(quote_non_finite(text), wanted);
        }
    }

    #[test]
    fn a_file_that_exists_and_cannot_be_read_is_not_taken_for_missing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(!exists(&at("none")).unwrap());
        std::os::unix::fs::symlink("../../blobs/0a1b", at("dangling")).unwrap();
        std::os::unix::fs::symlink("loop", at("loop")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        fs::write(at("pointer"), "version https://git-lfs.github.com/spec/v1\noid sha256:4d")
            .unwrap();
        fs::write(at("file"), "{}").unwrap();
        for (name, words) in [
            ("dangling", "dangling, which is a link to ../../blobs/0a1b"),
            ("loop", "loop, which is a link to loop"),
            ("folder", "folder is a folder"),
            ("pointer", "git lfs pull"),
            ("file/below", "cannot read"),
        ] {
            let error = format!("{:#}", read_optional(&at(name)).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        assert_eq!(read_optional(&at("link")).unwrap().unwrap(), b"{}");
    }

    #[test]
    fn a_value_of_another_type_is_named_with_its_key_and_file() {
        #[derive(Debug, serde::Deserialize)]
        struct Outer {
            #[expect(dead_code, reason = "only read")]
            inner: std::collections::BTreeMap<String, Vec<f32>>,
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("some.json");
        fs::write(&path, r#"{"inner": {"a": [1, NaN]}, "unused": Infinity}"#).unwrap();
        let error = format!("{:#}", read_json::<Outer>(&path).unwrap_err());
        assert!(["some.json", "inner.a[1]", "NaN"].iter().all(|w| error.contains(w)), "{error}");
        fs::write(&path, r#"{"inner": {}, "unused": Infinity}"#).unwrap();
        read_json::<Outer>(&path).unwrap();
    }
}
