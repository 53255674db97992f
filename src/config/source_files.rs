//! Which files a model file was converted from, by the SHA-256 of their bytes.

use std::path::{Component, Path};

use openvla_kernels::{Gguf, Header};
use serde::{Deserialize, Serialize};

use super::general::optional;
use crate::{Error, Result};

/// One of the files that a model file was converted from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Relative to the checkpoint's folder. Of files that were elsewhere, the option that named them and a slash come
    /// first: `base/`, `lora/`, `statistics/`, `imatrix/`.
    pub name: String,
    /// SHA-256 of its bytes: 64 hexadecimal digits in lower case.
    pub sha256: String,
}

/// Lines as `sha256sum` has them, by name.
const KEY: &str = "openvla.source.sha256";

impl SourceFile {
    /// Reads what a model file says of them. Files by older versions say nothing, and those of random weights have
    /// nothing to say.
    ///
    /// # Errors
    /// [`Error::Model`] names a line that is not one, or names a file outside the folder.
    pub fn read_all(file: &Gguf) -> Result<Vec<Self>> {
        let lines: Vec<String> = optional(file, KEY)?.unwrap_or_default();
        let parse = |line: &String| {
            Self::parse(line).ok_or_else(|| Error::Model {
                why: format!(
                    "`{KEY}` holds {line:?}; 64 hexadecimal digits, two spaces and a file's relative name are wanted"
                ),
            })
        };
        let files: Vec<Self> = lines.iter().map(parse).collect::<Result<_>>()?;
        if !files.is_sorted_by(|a, b| a.name < b.name) {
            return Err(Error::Model { why: format!("`{KEY}` is not sorted by name") });
        }
        Ok(files)
    }

    fn parse(line: &str) -> Option<Self> {
        let (sha256, name) = line.split_once("  ")?;
        let is_digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        let is_hash = sha256.len() == 64 && sha256.chars().all(is_digit);
        let is_inside = |part: Component<'_>| matches!(part, Component::Normal(_));
        let is_relative = !name.is_empty() && Path::new(name).components().all(is_inside);
        (is_hash && is_relative).then(|| Self { name: name.to_owned(), sha256: sha256.to_owned() })
    }

    /// Adds them, which are sorted by name, to the header of a file to be written. However the hashes turn out, the
    /// header is as long.
    pub fn write_all(all: &[Self], to: &mut Header) {
        if !all.is_empty() {
            let line = |Self { name, sha256 }: &Self| format!("{sha256}  {name}");
            to.set(KEY, all.iter().map(line).collect::<Vec<_>>());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, digit: &str) -> SourceFile {
        SourceFile { name: name.to_owned(), sha256: digit.repeat(64) }
    }

    fn read(lines: Vec<String>) -> Result<Vec<SourceFile>> {
        let mut header = Header::default();
        header.set(KEY, lines);
        SourceFile::read_all(&Gguf::built_in("test", header.encode().leak()).unwrap())
    }

    #[test]
    fn they_come_back_as_they_were_written_and_none_are_needed() {
        for all in [vec![], vec![file("config.json", "0"), file("lora/a  b.safetensors", "f")]] {
            let mut header = Header::default();
            SourceFile::write_all(&all, &mut header);
            let written = Gguf::built_in("test", header.encode().leak()).unwrap();
            assert_eq!(written.metadata().len(), usize::from(!all.is_empty()));
            assert_eq!(SourceFile::read_all(&written).unwrap(), all);
        }
    }

    #[test]
    fn lines_that_name_no_file_inside_are_refused() {
        let hash = "0".repeat(64);
        for line in [
            String::new(),
            hash.clone(),
            format!("{hash} config.json"),
            format!("{hash}  "),
            format!("{hash}  ../config.json"),
            format!("{hash}  a/../../config.json"),
            format!("{hash}  /etc/passwd"),
            format!("{}  config.json", "A".repeat(64)),
            format!("{}  config.json", "0".repeat(63)),
        ] {
            let error = read(vec![line.clone()]).unwrap_err().to_string();
            assert!(error.contains(&format!("{KEY}` holds {line:?}")), "{error}");
        }
        let twice = vec![format!("{hash}  a"), format!("{hash}  a")];
        assert!(read(twice).unwrap_err().to_string().contains("not sorted"));
    }
}
