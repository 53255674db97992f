//! Settings of the Hub from the environment: the variables of Hugging Face's own programs, in the same
//! order of precedence. An empty variable counts as unset.
//!
//! ref: huggingface_hub `constants.py`, `utils/_auth.py`, `utils/_headers.py`

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use regex::{Captures, Regex};

/// The cache, the endpoint, and how to reach it.
#[derive(Debug, PartialEq, Eq)]
pub struct Environment {
    /// The folder of all repositories.
    pub cache: PathBuf,
    /// Whether to use the cache alone.
    pub offline: bool,
    /// The Hub's URL, or a mirror's.
    pub endpoint: String,
    /// The access token.
    pub token: Option<String>,
    /// Seconds of silence after which a connection is given up.
    pub timeout: u64,
}

impl Environment {
    /// Reads the process's environment.
    ///
    /// # Errors
    /// If neither a variable nor a home directory says where the cache is.
    pub fn read() -> Result<Self> {
        Self::of(&|name| std::env::var_os(name), std::env::home_dir().as_deref())
    }

    fn of(get: &dyn Fn(&str) -> Option<OsString>, home: Option<&Path>) -> Result<Self> {
        let set = |name: &str| get(name).filter(|value| !value.is_empty());
        let first = |names: &[&str]| names.iter().find_map(|name| set(name));
        let text = |names: &[&str]| {
            let value = first(names)?.to_string_lossy().trim().to_owned();
            Some(value).filter(|value| !value.is_empty())
        };
        let is_set = |names: &[&str]| {
            let value = text(names).unwrap_or_default().to_uppercase();
            ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
        };
        let expand = |path: OsString| expand(&path, get, home);
        let shared = || match (set("HF_HOME"), set("XDG_CACHE_HOME"), home) {
            (Some(path), ..) => Ok(expand(path)),
            (None, Some(path), _) => Ok(expand(path).join("huggingface")),
            (None, None, Some(home)) => Ok(home.join(".cache/huggingface")),
            (None, None, None) => Err(anyhow!(
                "there is no home directory for the Hub's cache; set HF_HOME to a folder"
            )),
        };
        let cache = match first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]) {
            Some(path) => expand(path),
            None => shared()?.join("hub"),
        };
        let file = set("HF_TOKEN_PATH").map(expand).or_else(|| Some(shared().ok()?.join("token")));
        let saved = || std::fs::read_to_string(file?).ok().map(|token| token.trim().to_owned());
        let token = text(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).or_else(saved);
        let implicit = !is_set(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"]);
        let endpoint = text(&["HF_ENDPOINT"]);
        let timeout = text(&["HF_HUB_DOWNLOAD_TIMEOUT"]).and_then(|value| value.parse().ok());
        Ok(Self {
            cache,
            offline: is_set(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]),
            endpoint: endpoint.map_or("https://huggingface.co".into(), |endpoint| {
                endpoint.trim_end_matches('/').to_owned()
            }),
            token: token.filter(|token| implicit && !token.is_empty()),
            timeout: timeout.unwrap_or(30).max(1),
        })
    }
}

/// Python's `expandvars(expanduser(path))`, without the homes of other users.
fn expand(path: &OsStr, get: &dyn Fn(&str) -> Option<OsString>, home: Option<&Path>) -> PathBuf {
    let Some(text) = path.to_str() else { return path.into() };
    let variable = Regex::new(r"\$(?:(\w+)|\{([^}]*)\})").expect("a pattern");
    let value = |captures: &Captures<'_>| {
        let name = captures.get(1).or_else(|| captures.get(2)).map_or("", |name| name.as_str());
        let value = get(name).and_then(|value| value.into_string().ok());
        value.unwrap_or_else(|| captures[0].to_owned()) // An unknown one stays as it is.
    };
    let at_home = match (text.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            format!("{}{rest}", home.display())
        }
        _ => text.to_owned(),
    };
    variable.replace_all(&at_home, value).into_owned().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Environment {
        let get = |name: &str| {
            let found = variables.iter().find(|(found, _)| *found == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Environment::of(&get, Some(Path::new("/home/x"))).unwrap()
    }

    /// What `huggingface_hub.constants.HF_HUB_CACHE` is with these variables.
    #[test]
    fn the_cache_is_where_hugging_faces_programs_have_it() {
        let all = [
            ("HF_HUB_CACHE", "/a"),
            ("HUGGINGFACE_HUB_CACHE", "/b"),
            ("HF_HOME", "/c"),
            ("XDG_CACHE_HOME", "/d"),
        ];
        let wanted = ["/a", "/b", "/c/hub", "/d/huggingface/hub", "/home/x/.cache/huggingface/hub"];
        for (i, wanted) in wanted.iter().enumerate() {
            assert_eq!(of(&all[i..]).cache, Path::new(wanted));
        }
        for (value, wanted) in [
            ("~", "/home/x"),
            ("~/y", "/home/x/y"),
            ("~y/z", "~y/z"),
            ("$DISK/y", "/disk/y"),
            ("${DISK}/$NONE/${NONE}", "/disk/$NONE/${NONE}"),
            ("", "/home/x/.cache/huggingface/hub"),
        ] {
            for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
                let found = of(&[(name, value), ("DISK", "/disk")]).cache;
                assert_eq!(found, Path::new(wanted), "{name}={value}");
            }
        }
        assert_eq!(of(&[("HF_HOME", "~/y")]).cache, Path::new("/home/x/y/hub"));
        let homeless = Environment::of(&|_| None, None).unwrap_err().to_string();
        assert!(homeless.contains("set HF_HOME"), "{homeless}");
        let named = |name: &str| (name == "HF_HUB_CACHE").then(|| "/a".into());
        assert_eq!(Environment::of(&named, None).unwrap().cache, Path::new("/a"));
    }

    #[test]
    fn tokens_come_from_variables_and_then_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, " hf_file\n").unwrap();
        let (path, home) = (path.to_str().unwrap(), dir.path().to_str().unwrap());
        let token = |variables: &[(&str, &str)]| of(variables).token;
        let both = [("HF_TOKEN", "hf_new "), ("HUGGING_FACE_HUB_TOKEN", "hf_old")];
        assert_eq!(token(&both).as_deref(), Some("hf_new"));
        assert_eq!(token(&both[1..]).as_deref(), Some("hf_old"));
        assert_eq!(token(&[("HF_TOKEN_PATH", path)]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_HOME", home)]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN_PATH", "/none")]), None);
        assert_eq!(token(&[both[0], ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
    }

    #[test]
    fn switches_are_true_as_in_python() {
        for (variables, wanted) in [
            (&[("HF_HUB_OFFLINE", "yes")][..], true),
            (&[("TRANSFORMERS_OFFLINE", "1")], true),
            (&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")], false),
            (&[("HF_HUB_OFFLINE", "2")], false),
        ] {
            assert_eq!(of(variables).offline, wanted, "{variables:?}");
        }
        assert_eq!(of(&[("HF_ENDPOINT", "http://mirror//")]).endpoint, "http://mirror");
        assert_eq!(of(&[("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]).timeout, 30);
    }
}
