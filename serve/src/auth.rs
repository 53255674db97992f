//! Who may ask.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::{Code, Error};

/// What clients must show. Only its digest is kept.
#[derive(Debug, Clone)]
pub struct Token([u8; 32]);

/// Characters that a token must have at least.
const SHORTEST: usize = 16;

impl Token {
    /// The token in a file; white space around it is no part of it.
    ///
    /// # Errors
    /// If the file cannot be read, or holds less than a token.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
        let token = text.trim();
        let sound = token.len() >= SHORTEST && token.chars().all(|c| c.is_ascii_graphic());
        ensure!(
            sound,
            "{name} holds no token: {SHORTEST} or more printable characters are wanted, such as \
             `openssl rand -hex 32` writes"
        );
        Ok(Self(digest(token)))
    }

    /// Whether these headers show it: `Authorization: Bearer TOKEN`, or `Api-Key` as openpi's
    /// client has it. Takes the same time whatever was shown.
    ///
    /// # Errors
    /// [`Code::Unauthorized`].
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Error> {
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.split_once(' '));
        let shown = shown.filter(|(scheme, _)| {
            ["Bearer", "Api-Key"].iter().any(|known| scheme.eq_ignore_ascii_case(known))
        });
        match shown {
            Some((_, token)) if self.0.ct_eq(&digest(token.trim())).into() => Ok(()),
            Some(_) => Err(Error::new(Code::Unauthorized, "the token is not this server's")),
            None => {
                let error = Error::new(Code::Unauthorized, "this server wants a token");
                Err(error.hint("Authorization: Bearer TOKEN"))
            }
        }
    }
}

/// Refuses web pages: where there is no token, any page that a browser on this machine shows could
/// ask otherwise. Robots send no `Origin`.
///
/// # Errors
/// [`Code::ForbiddenOrigin`].
pub fn check_origin(headers: &HeaderMap) -> Result<(), Error> {
    match headers.get(header::ORIGIN) {
        None => Ok(()),
        Some(origin) => {
            let message = format!("{origin:?} is a web page, and this server has no token");
            Err(Error::new(Code::ForbiddenOrigin, message).hint("start it with --token-file"))
        }
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "correct-horse-battery";

    fn check(value: &str) -> Result<(), Error> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        Token(digest(TOKEN)).check(&headers)
    }

    #[test]
    fn both_schemes_and_only_the_token_are_taken() {
        assert!(check(&format!("Bearer {TOKEN}")).is_ok());
        assert!(check(&format!("api-key {TOKEN}")).is_ok());
        for wrong in [
            TOKEN.to_owned(),
            format!("Basic {TOKEN}"),
            format!("Bearer {TOKEN}x"),
            format!("Bearer {}", &TOKEN[1..]),
            "Bearer ".to_owned(),
            "Bearer".to_owned(),
        ] {
            assert_eq!(check(&wrong).unwrap_err().code, Code::Unauthorized, "{wrong}");
        }
        assert!(Token(digest(TOKEN)).check(&HeaderMap::new()).is_err());
    }

    #[test]
    fn a_file_without_a_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        for text in ["", "\n", "short", "sixteen characters of two words", "ümlautümlautümlaut"]
        {
            std::fs::write(&path, text).unwrap();
            assert!(Token::read(&path).is_err(), "{text:?}");
        }
        std::fs::write(&path, format!("  {TOKEN}\n")).unwrap();
        assert_eq!(Token::read(&path).unwrap().0, digest(TOKEN));
        assert!(Token::read(&dir.path().join("none")).is_err());
    }

    #[test]
    fn web_pages_are_refused() {
        let mut headers = HeaderMap::new();
        assert!(check_origin(&headers).is_ok());
        headers.insert(header::ORIGIN, "https://example.org".parse().unwrap());
        assert_eq!(check_origin(&headers).unwrap_err().code, Code::ForbiddenOrigin);
    }
}
