//! `general.*`: what people, file browsers and model hubs read. ref: `docs/gguf.md` of ggml.

use openvla_kernels::{Gguf, Header, Value};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What the file is, where it came from, and what may be done with it. What is not known is not in
/// the file.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct General {
    /// For people: "OpenVLA 7B v1.0".
    pub name: String,
    /// The first part of a file name: "OpenVLA".
    pub basename: String,
    /// Parameters: "7B", "349K".
    pub size_label: String,
    /// What it was tuned for, if anything: "libero-spatial".
    pub finetune: Option<String>,
    /// "v1.0"
    pub version: String,
    /// llama.cpp's `llama_ftype` number of the weights' type.
    pub file_type: u32,
    /// One sentence.
    pub description: Option<String>,
    /// Who made it: "OpenVLA". Nobody is named for a fine-tune.
    pub organization: Option<String>,
    /// An SPDX name, or the hubs' "llama2".
    pub license: Option<String>,
    /// The license for people, with what its short name leaves out.
    pub license_name: Option<String>,
    /// Where its text is.
    pub license_link: Option<String>,
    /// Where its code is.
    pub repo_url: Option<String>,
    /// What the file was converted from.
    pub source: Source,
    /// What it was tuned from.
    pub base_models: Vec<BaseModel>,
    /// Search terms.
    pub tags: Vec<String>,
    /// Of instructions, in ISO 639: "en".
    pub languages: Vec<String>,
    /// Version of the `openvla-convert` that wrote the file.
    pub converter_version: Option<String>,
}

/// The checkpoint that a file was converted from, as far as it is public.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Source {
    /// Its page.
    pub url: Option<String>,
    /// Where its files are.
    pub repo_url: Option<String>,
    /// On the Hugging Face Hub: "openvla/openvla-7b".
    pub repository: Option<String>,
    /// The commit there.
    pub revision: Option<String>,
    /// What tells its weights from those of other checkpoints: a hash, in hexadecimal.
    pub fingerprint: Option<String>,
}

/// A model that another was tuned from.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct BaseModel {
    /// "OpenVLA 7B"
    pub name: String,
    /// "v1.0"
    pub version: Option<String>,
    /// "OpenVLA"
    pub organization: Option<String>,
    /// Where its files are.
    pub repo_url: Option<String>,
}

mod key {
    pub const NAME: &str = "general.name";
    pub const BASENAME: &str = "general.basename";
    pub const SIZE_LABEL: &str = "general.size_label";
    pub const FINETUNE: &str = "general.finetune";
    pub const VERSION: &str = "general.version";
    pub const FILE_TYPE: &str = "general.file_type";
    pub const QUANTIZATION_VERSION: &str = "general.quantization_version";
    pub const DESCRIPTION: &str = "general.description";
    pub const ORGANIZATION: &str = "general.organization";
    pub const LICENSE: &str = "general.license";
    pub const LICENSE_NAME: &str = "general.license.name";
    pub const LICENSE_LINK: &str = "general.license.link";
    pub const REPO_URL: &str = "general.repo_url";
    pub const SOURCE_URL: &str = "general.source.url";
    pub const SOURCE_REPO_URL: &str = "general.source.repo_url";
    pub const SOURCE_REPOSITORY: &str = "general.source.huggingface.repository";
    pub const SOURCE_REVISION: &str = "openvla.source.revision";
    pub const SOURCE_FINGERPRINT: &str = "openvla.source.fingerprint";
    pub const BASE_MODELS: &str = "general.base_model.count";
    pub const TAGS: &str = "general.tags";
    pub const LANGUAGES: &str = "general.languages";
    pub const CONVERTER: &str = "openvla.converter.version";
}

/// ggml's `GGML_QNT_VERSION`: which block formats the file uses.
const QUANTIZATION_VERSION: u32 = 2;

impl General {
    pub(super) fn read(file: &Gguf) -> Result<Self> {
        check_quantization(file)?;
        Ok(Self {
            name: file.get(key::NAME)?,
            basename: file.get(key::BASENAME)?,
            size_label: file.get(key::SIZE_LABEL)?,
            finetune: optional(file, key::FINETUNE)?,
            version: file.get(key::VERSION)?,
            file_type: file.get(key::FILE_TYPE)?,
            description: optional(file, key::DESCRIPTION)?,
            organization: optional(file, key::ORGANIZATION)?,
            license: optional(file, key::LICENSE)?,
            license_name: optional(file, key::LICENSE_NAME)?,
            license_link: optional(file, key::LICENSE_LINK)?,
            repo_url: optional(file, key::REPO_URL)?,
            source: Source::read(file)?,
            base_models: (0..optional::<u32>(file, key::BASE_MODELS)?.unwrap_or(0))
                .map(|i| BaseModel::read(file, i))
                .collect::<Result<_>>()?,
            tags: optional(file, key::TAGS)?.unwrap_or_default(),
            languages: optional(file, key::LANGUAGES)?.unwrap_or_default(),
            converter_version: optional(file, key::CONVERTER)?,
        })
    }

    pub(super) fn write(&self, to: &mut Header) {
        to.set(key::NAME, self.name.clone());
        to.set(key::BASENAME, self.basename.clone());
        to.set(key::SIZE_LABEL, self.size_label.clone());
        set(to, key::FINETUNE, &self.finetune);
        to.set(key::VERSION, self.version.clone());
        to.set(key::FILE_TYPE, self.file_type);
        to.set(key::QUANTIZATION_VERSION, QUANTIZATION_VERSION);
        set(to, key::DESCRIPTION, &self.description);
        set(to, key::ORGANIZATION, &self.organization);
        set(to, key::LICENSE, &self.license);
        set(to, key::LICENSE_NAME, &self.license_name);
        set(to, key::LICENSE_LINK, &self.license_link);
        set(to, key::REPO_URL, &self.repo_url);
        self.source.write(to);
        if !self.base_models.is_empty() {
            to.set(key::BASE_MODELS, self.base_models.len() as u32);
        }
        for (i, base) in (0..).zip(&self.base_models) {
            base.write(to, i);
        }
        for (key, list) in [(key::TAGS, &self.tags), (key::LANGUAGES, &self.languages)] {
            if !list.is_empty() {
                to.set(key, list.clone());
            }
        }
        set(to, key::CONVERTER, &self.converter_version);
    }
}

impl Source {
    fn read(file: &Gguf) -> Result<Self> {
        Ok(Self {
            url: optional(file, key::SOURCE_URL)?,
            repo_url: optional(file, key::SOURCE_REPO_URL)?,
            repository: optional(file, key::SOURCE_REPOSITORY)?,
            revision: optional(file, key::SOURCE_REVISION)?,
            fingerprint: optional(file, key::SOURCE_FINGERPRINT)?,
        })
    }

    fn write(&self, to: &mut Header) {
        set(to, key::SOURCE_URL, &self.url);
        set(to, key::SOURCE_REPO_URL, &self.repo_url);
        set(to, key::SOURCE_REPOSITORY, &self.repository);
        set(to, key::SOURCE_REVISION, &self.revision);
        set(to, key::SOURCE_FINGERPRINT, &self.fingerprint);
    }
}

impl BaseModel {
    fn key(i: u32, part: &str) -> String {
        format!("general.base_model.{i}.{part}")
    }

    fn read(file: &Gguf, i: u32) -> Result<Self> {
        Ok(Self {
            name: file.get(&Self::key(i, "name"))?,
            version: optional(file, &Self::key(i, "version"))?,
            organization: optional(file, &Self::key(i, "organization"))?,
            repo_url: optional(file, &Self::key(i, "repo_url"))?,
        })
    }

    fn write(&self, to: &mut Header, i: u32) {
        to.set(&Self::key(i, "name"), self.name.clone());
        set(to, &Self::key(i, "version"), &self.version);
        set(to, &Self::key(i, "organization"), &self.organization);
        set(to, &Self::key(i, "repo_url"), &self.repo_url);
    }
}

/// Blocks of a later version would be read as others.
fn check_quantization(file: &Gguf) -> Result<()> {
    let (key, known) = (key::QUANTIZATION_VERSION, QUANTIZATION_VERSION);
    match optional::<u32>(file, key)? {
        Some(found) if found > known => {
            let why = format!("`{key}` is {found}; this version reads block formats up to {known}");
            Err(Error::Model { why })
        }
        _ => Ok(()),
    }
}

/// The value of a key that a file may lack.
pub(super) fn optional<T>(file: &Gguf, key: &str) -> Result<Option<T>>
where
    T: TryFrom<Value, Error = &'static str>,
{
    Ok(file.metadata().contains_key(key).then(|| file.get(key)).transpose()?)
}

fn set(to: &mut Header, key: &str, value: &Option<String>) {
    if let Some(value) = value {
        to.set(key, value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(value: &str) -> Option<String> {
        Some(value.to_owned())
    }

    fn written(general: &General) -> Gguf {
        let mut header = Header::default();
        general.write(&mut header);
        Gguf::built_in("general", header.encode().leak()).unwrap()
    }

    #[test]
    fn every_field_comes_back_as_it_was_written() {
        let named = General {
            name: "OpenVLA 7B libero v1.0".into(),
            basename: "OpenVLA".into(),
            size_label: "7B".into(),
            version: "v1.0".into(),
            ..General::default()
        };
        assert_eq!(General::read(&written(&named)).unwrap(), named, "without what is optional");
        let base = |name: &str, version| BaseModel {
            name: name.into(),
            version,
            organization: text("OpenVLA"),
            repo_url: text("https://base"),
        };
        let full = General {
            finetune: text("libero"),
            file_type: 25,
            description: text("A policy.\n\u{1b}[1m"),
            organization: text("Someone"),
            license: text("llama2"),
            license_name: text("Llama 2"),
            license_link: text("https://license"),
            repo_url: text("https://code"),
            source: Source {
                url: text("https://page"),
                repo_url: text("https://files"),
                repository: text("user/model"),
                revision: text("0123abc"),
                fingerprint: text("89abcdef"),
            },
            base_models: vec![base("a", text("v1.0")), base("b", None)],
            tags: vec!["robotics".into(), "vla".into()],
            languages: vec!["en".into()],
            converter_version: text("0.1.0"),
            ..named
        };
        let file = written(&full);
        assert_eq!(General::read(&file).unwrap(), full);
        assert_eq!(file.get::<u32>("general.base_model.count").unwrap(), 2);
        assert_eq!(file.get::<String>("general.base_model.1.name").unwrap(), "b");
        let repository: String = file.get("general.source.huggingface.repository").unwrap();
        assert_eq!(repository, "user/model");
        assert_eq!(file.metadata().len(), 29, "no field is forgotten");
    }

    #[test]
    fn base_models_that_are_only_counted_are_missed() {
        let mut header = Header::default();
        General::default().write(&mut header);
        header.set(key::BASE_MODELS, u32::MAX);
        let file = Gguf::built_in("general", header.encode().leak()).unwrap();
        let error = General::read(&file).unwrap_err().to_string();
        assert!(error.contains("`general.base_model.0.name` is missing"), "{error}");
    }

    #[test]
    fn later_block_formats_are_refused_and_none_is_needed() {
        let read = |version: Option<u32>| {
            let mut header = Header::default();
            for key in [key::NAME, key::BASENAME, key::SIZE_LABEL, key::VERSION] {
                header.set(key, String::new());
            }
            header.set(key::FILE_TYPE, 0_u32);
            version.into_iter().for_each(|n| header.set(key::QUANTIZATION_VERSION, n));
            General::read(&Gguf::built_in("general", header.encode().leak()).unwrap())
        };
        for sound in [None, Some(1), Some(2)] {
            assert!(read(sound).is_ok(), "{sound:?}");
        }
        for later in [3, u32::MAX] {
            let error = read(Some(later)).unwrap_err().to_string();
            let wanted = format!("`general.quantization_version` is {later}; this version reads");
            assert!(error.contains(&wanted), "{error}");
        }
    }
}
