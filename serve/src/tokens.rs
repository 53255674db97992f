//! Tokens: who may do what.
//!
//! `--token-file` holds one token, which may do everything. `--client-tokens` has a line for each client, of three words;
//! empty lines and such that start with `#` are skipped:
//!
//! ```text
//! # name   scopes       token
//! arm-1    act          8c1f…
//! wall     watch        41d0…
//! ops      watch,admin  e77a…
//! ```
//!
//! Only digests are kept, no message repeats what is in a file, and looking a token up takes the same time whichever it is.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result, anyhow, bail, ensure};
use axum::http::HeaderMap;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::auth::{check_origin, shown};
use crate::error::{Code, Error};

/// Characters that a token must have at least.
const SHORTEST: usize = 16;

/// The longest name of a client, in bytes.
const LONGEST_NAME: usize = 64;

/// The most clients: their names are labels of metrics.
const MOST: usize = 256;

/// The most bytes of the clients' file.
const MAX_BYTES: u64 = 1 << 20;

/// What a client may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Ask for motions, stop and release.
    Act,
    /// See the page, what it listens to, and the metrics.
    Watch,
    /// Change what is served.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Act, Self::Watch, Self::Admin];

    /// As the file has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Act => "act",
            Self::Watch => "watch",
            Self::Admin => "admin",
        }
    }
}

/// A client's token.
#[derive(Debug)]
struct Token {
    /// The client's name; the token of `--token-file` has none.
    name: Option<String>,
    scopes: Vec<Scope>,
    digest: [u8; 32],
}

/// Who asks, by the token that was shown: nobody in particular on a server without tokens.
#[derive(Debug, Clone, Default)]
pub struct Caller(Option<Arc<Token>>);

impl Caller {
    /// The name that the clients' file has for it.
    pub fn name(&self) -> Option<&str> {
        self.0.as_ref()?.name.as_deref()
    }
}

/// All tokens of a server.
#[derive(Debug)]
pub struct Tokens {
    /// That of `--token-file`.
    single: Option<Arc<Token>>,
    /// The clients' file.
    file: Option<PathBuf>,
    all: RwLock<Vec<Arc<Token>>>,
}

impl Tokens {
    /// Reads a file of one token, and one of clients.
    ///
    /// # Errors
    /// If a file cannot be read, or does not hold what it must.
    pub fn read(single: Option<&Path>, clients: Option<&Path>) -> Result<Self> {
        let single = single.map(read_single).transpose()?.map(Arc::new);
        let (file, all) = (clients.map(Path::to_owned), RwLock::default());
        let tokens = Self { single, file, all };
        tokens.reread()?;
        Ok(tokens)
    }

    /// Reads the clients' file again, if there is one, and gives the number of tokens. Who is not in it any more may
    /// do nothing from now on, also over connections that are open.
    ///
    /// # Errors
    /// As [`Tokens::read`]; what was known before then still holds.
    pub fn reread(&self) -> Result<usize> {
        let mut all: Vec<_> = self.single.clone().into_iter().collect();
        if let Some(path) = &self.file {
            all.extend(read_clients(path)?.into_iter().map(Arc::new));
            check_doubles(&all).with_context(|| path.display().to_string())?;
        }
        let n = all.len();
        *self.all.write().unwrap_or_else(PoisonError::into_inner) = all;
        Ok(n)
    }

    /// Whether the server has no tokens.
    pub fn is_empty(&self) -> bool {
        self.single.is_none() && self.file.is_none()
    }

    /// Whose token these headers show: `Authorization: Bearer TOKEN`, `Api-Key` as openpi's client has it, or `Basic`
    /// as the password of any user, as clients have it that know an URL alone.
    ///
    /// # Errors
    /// [`Code::Unauthorized`].
    pub fn check(&self, headers: &HeaderMap) -> Result<Caller, Error> {
        let Some(shown) = shown(headers) else {
            let error = Error::new(Code::Unauthorized, "this server wants a token");
            return Err(error.hint("Authorization: Bearer TOKEN"));
        };
        let unknown = || Error::new(Code::Unauthorized, "the token is not this server's");
        let token = self.find(&shown.token).ok_or_else(unknown)?;
        if shown.by_browser {
            // A browser that was once given a user and password sends them with other sites' requests, too.
            check_origin(headers)?;
        }
        Ok(Caller(Some(token)))
    }

    /// Whether a caller may do this now.
    ///
    /// # Errors
    /// [`Code::MissingScope`], and [`Code::Unauthorized`] if the token was taken back.
    pub fn permit(&self, caller: &Caller, scope: Scope) -> Result<(), Error> {
        let Some(token) = &caller.0 else { return Ok(()) };
        let name = token.name.as_deref().unwrap_or("of --token-file");
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        let Some(now) = all.iter().find(|now| now.digest == token.digest) else {
            let message = format!("the token `{name}` is not this server's any more");
            return Err(Error::new(Code::Unauthorized, message));
        };
        if now.scopes.contains(&scope) {
            return Ok(());
        }
        let message = format!("the token `{name}` lacks the scope `{}`", scope.name());
        let hint = format!("it has {}: --client-tokens says so", names(&now.scopes));
        Err(Error::new(Code::MissingScope, message).hint(hint))
    }

    fn find(&self, token: &str) -> Option<Arc<Token>> {
        let shown = digest(token);
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = 0_u64;
        for (place, token) in (1..).zip(all.iter()) {
            found.conditional_assign(&place, token.digest.ct_eq(&shown));
        }
        let place = usize::try_from(found).ok()?.checked_sub(1)?;
        all.get(place).cloned()
    }
}

/// The token in a file; white space around it is not part of it.
fn read_single(path: &Path) -> Result<Token> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    warn_of_readers(path);
    let token = text.trim_ascii();
    ensure!(
        is_sound(token),
        "{name} holds no token: {SHORTEST} or more printable characters are wanted, such as `openssl rand -hex 32` \
         writes"
    );
    Ok(Token { name: None, scopes: Scope::ALL.to_vec(), digest: digest(token) })
}

fn read_clients(path: &Path) -> Result<Vec<Token>> {
    let name = path.display();
    let cannot = || format!("cannot read {name}");
    // Looked at before it is opened: opening a pipe would wait for a writer.
    let metadata = path.metadata().with_context(cannot)?;
    let is_fit = metadata.is_file() && metadata.len() <= MAX_BYTES;
    ensure!(is_fit, "{name} is not a regular file of at most {MAX_BYTES} bytes");
    let text = std::fs::read_to_string(path).with_context(cannot)?;
    warn_of_readers(path);
    let lines = (1..).zip(text.lines().map(str::trim_ascii));
    let clients = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let client = |(i, line)| read_line(line).with_context(|| format!("{name}, line {i}"));
    let clients: Vec<Token> = clients.map(client).collect::<Result<_>>()?;
    let n = clients.len();
    ensure!((1..=MOST).contains(&n), "{name} names {n} clients; 1 to {MOST} are wanted");
    Ok(clients)
}

fn read_line(line: &str) -> Result<Token> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let [name, scopes, token] = words[..] else {
        bail!("{} words were found; NAME SCOPES TOKEN are wanted", words.len());
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ensure!(
        name.len() <= LONGEST_NAME && name.chars().all(is_name),
        "the name is not of 1 to {LONGEST_NAME} letters, digits, `-`, `_` and `.`"
    );
    let scope = |text: &str| Scope::ALL.into_iter().find(|scope| scope.name() == text);
    let scopes: Option<Vec<Scope>> = scopes.split(',').map(scope).collect();
    let scopes = scopes.ok_or_else(|| {
        anyhow!("the scopes are not among {}, with commas between", names(&Scope::ALL))
    })?;
    ensure!(
        is_sound(token),
        "the token is not of {SHORTEST} or more printable characters, such as `openssl rand -hex 32` writes"
    );
    Ok(Token { name: Some(name.to_owned()), scopes, digest: digest(token) })
}

/// Each token, and each name, must be of one client.
fn check_doubles(all: &[Arc<Token>]) -> Result<()> {
    for (i, token) in all.iter().enumerate() {
        let earlier = &all[..i];
        let Some(name) = &token.name else { continue };
        let is_twice = earlier.iter().any(|other| other.name.as_ref() == Some(name));
        ensure!(!is_twice, "`{name}` is named twice");
        let same = earlier.iter().find(|other| other.digest == token.digest);
        if let Some(same) = same {
            let other = same.name.as_deref().unwrap_or("--token-file");
            bail!("the token of `{name}` is that of `{other}`, too");
        }
    }
    Ok(())
}

fn is_sound(token: &str) -> bool {
    token.len() >= SHORTEST && token.chars().all(|c| c.is_ascii_graphic())
}

fn warn_of_readers(path: &Path) {
    let mode = path.metadata().map_or(0, |metadata| metadata.permissions().mode());
    if mode & 0o004 != 0 {
        let path = path.display();
        tracing::warn!("{path} holds tokens and can be read by every user: chmod 600 {path}");
    }
}

fn names(scopes: &[Scope]) -> String {
    let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
    names.join(", ")
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::header;
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    const TOKEN: &str = "correct-horse-battery";

    fn files(single: Option<&str>, clients: Option<&str>) -> (tempfile::TempDir, Result<Tokens>) {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let single = single.map(|text| write("token", text));
        let clients = clients.map(|text| write("clients", text));
        let tokens = Tokens::read(single.as_deref(), clients.as_deref());
        (dir, tokens)
    }

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn all_schemes_and_only_the_token_are_taken() {
        let (_dir, tokens) = files(Some(TOKEN), None);
        let tokens = tokens.unwrap();
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        assert!(tokens.check(&headers(&format!("Bearer {TOKEN}"))).is_ok());
        assert!(tokens.check(&headers(&format!("api-key {TOKEN}"))).is_ok());
        assert!(tokens.check(&headers(&basic(&format!("robot:{TOKEN}")))).is_ok());
        for wrong in [
            TOKEN.to_owned(),
            format!("Basic {TOKEN}"),
            format!("Bearer {TOKEN}x"),
            format!("Bearer {}", &TOKEN[1..]),
            "Bearer ".to_owned(),
            basic(TOKEN),
            basic(&format!("{TOKEN}:")),
            basic(&format!("robot:{TOKEN}:x")),
            "Basic =".to_owned(),
            "Bearer".to_owned(),
        ] {
            let error = tokens.check(&headers(&wrong)).unwrap_err();
            assert_eq!(error.code, Code::Unauthorized, "{wrong}");
        }
        assert!(tokens.check(&HeaderMap::new()).is_err());
        for (value, is_served) in
            [(format!("Bearer {TOKEN}"), true), (basic(&format!("robot:{TOKEN}")), false)]
        {
            let mut headers = headers(&value);
            headers.insert(header::ORIGIN, "http://elsewhere.example".parse().unwrap());
            assert_eq!(tokens.check(&headers).is_ok(), is_served, "{value}");
        }
    }

    #[test]
    fn a_file_without_a_token_is_refused() {
        for text in ["", "\n", "short", "sixteen characters of two words", "ümlautümlautümlaut"]
        {
            assert!(files(Some(text), None).1.is_err(), "{text:?}");
        }
        // White space, but not ASCII's.
        assert!(files(Some(&format!("{TOKEN}\u{85}")), None).1.is_err());
        let (_dir, tokens) = files(Some(&format!("  {TOKEN}\n")), None);
        assert!(tokens.unwrap().check(&headers(&format!("Bearer {TOKEN}"))).is_ok());
        assert!(Tokens::read(Some(Path::new("/nowhere/token")), None).is_err());
    }

    /// Every place of the list, and what is said of each client.
    #[test]
    fn each_client_has_its_name_and_its_scopes() {
        let lines: String = (0..MOST)
            .map(|i| format!("robot-{i} {} token-of-robot-{i:04}\n", ["act", "act,admin"][i % 2]))
            .collect();
        let (_dir, tokens) = files(Some(TOKEN), Some(&format!("# all\n\n{lines}")));
        let tokens = tokens.unwrap();
        for i in 0..MOST {
            let caller = tokens.check(&headers(&format!("Bearer token-of-robot-{i:04}"))).unwrap();
            assert_eq!(caller.name(), Some(&*format!("robot-{i}")));
            let scopes = [true, false, i % 2 == 1];
            assert_eq!(Scope::ALL.map(|scope| tokens.permit(&caller, scope).is_ok()), scopes);
            let error = tokens.permit(&caller, Scope::Watch).unwrap_err();
            assert_eq!(error.code, Code::MissingScope);
            assert!(error.message.contains("`watch`") && error.message.contains("`robot-"));
        }
        let single = tokens.check(&headers(&format!("Bearer {TOKEN}"))).unwrap();
        assert_eq!(single.name(), None);
        assert!(Scope::ALL.into_iter().all(|scope| tokens.permit(&single, scope).is_ok()));
        assert!(tokens.check(&headers("Bearer token-of-robot-9999")).is_err());
    }

    #[test]
    fn a_wrong_file_is_refused_by_its_line_and_never_repeated() {
        let secret = "0123456789-secret";
        for (text, why) in [
            (String::new(), "names 0 clients"),
            ("# nobody\n".to_owned(), "names 0 clients"),
            (format!("\narm {secret}\n"), "line 2: 2 words"),
            (format!("arm act {secret} # mine"), "line 1: 5 words"),
            (format!("arm act\u{a0}{secret}"), "line 1: 2 words"),
            (format!("{secret}-{secret}-{secret}-{secret} act arm"), "the name"),
            (format!("arm/1 act {secret}"), "the name"),
            (format!("arm {secret} act"), "the scopes are"),
            (format!("arm act, {secret}"), "the scopes are"),
            (format!("arm act,all {secret}"), "the scopes are"),
            (format!("{secret} act arm"), "the token is"),
            ("arm act 0123-secret".to_owned(), "the token is"),
            (format!("arm act {secret}1\narm act {secret}2"), "`arm` is named twice"),
            (format!("arm act {secret}\nleg act {secret}"), "`leg` is that of `arm`, too"),
            (format!("arm act {TOKEN}"), "that of `--token-file`, too"),
        ] {
            let error = format!("{:#}", files(Some(TOKEN), Some(&text)).1.unwrap_err());
            assert!(error.contains(why) && !error.contains("secret"), "{error}: {why}");
        }
        let many: String = (0..=MOST).map(|i| format!("r{i} act {secret}{i}\n")).collect();
        assert!(files(None, Some(&many)).1.is_err());
        for path in ["/dev/zero", "/nowhere/clients", "/tmp"] {
            assert!(Tokens::read(None, Some(Path::new(path))).is_err(), "{path}");
        }
    }

    #[test]
    fn what_was_taken_back_is_of_no_use_and_a_wrong_file_changes_nothing() {
        let (dir, tokens) =
            files(Some(TOKEN), Some(&format!("arm act {TOKEN}1\nleg act {TOKEN}2")));
        let tokens = tokens.unwrap();
        let caller = |i: u8| tokens.check(&headers(&format!("Bearer {TOKEN}{i}")));
        let (arm, leg) = (caller(1).unwrap(), caller(2).unwrap());
        let path = dir.path().join("clients");
        std::fs::write(&path, format!("arm act {TOKEN}1 and more")).unwrap();
        assert!(tokens.reread().is_err());
        assert!([&arm, &leg].into_iter().all(|c| tokens.permit(c, Scope::Act).is_ok()));
        std::fs::write(&path, format!("arm watch {TOKEN}1\nhand act {TOKEN}3")).unwrap();
        assert_eq!(tokens.reread().unwrap(), 3);
        assert_eq!(tokens.permit(&arm, Scope::Act).unwrap_err().code, Code::MissingScope);
        assert!(tokens.permit(&arm, Scope::Watch).is_ok());
        assert_eq!(tokens.permit(&leg, Scope::Act).unwrap_err().code, Code::Unauthorized);
        assert!(caller(2).is_err() && caller(3).is_ok());
        assert!(tokens.check(&headers(&format!("Bearer {TOKEN}"))).is_ok(), "the single one stays");
    }
}
