//! Lists and downloads a repository's files over HTTP.
//!
//! `hf-hub` is used for the cache's layout, but not to download: version 0.5.0 fails at compressed
//! responses, waits forever for silent servers and does not check lengths; 1.0 cannot resume.
//!
//! ref: huggingface_hub `file_download.py`; hf-hub issues 141 and 196

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::environment::Environment;

/// The files of a revision.
#[derive(Deserialize)]
pub struct Listing {
    /// The commit's hash.
    pub sha: String,
    pub siblings: Vec<Sibling>,
}

/// A file of a revision.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sibling {
    pub rfilename: String,
    size: u64,
    blob_id: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl Sibling {
    /// The name of its content in the cache.
    fn hash(&self) -> &str {
        self.lfs.as_ref().map_or(&self.blob_id, |lfs| &lfs.sha256)
    }
}

/// An HTTP client of the Hub.
pub struct Hub {
    agent: Agent,
    pub endpoint: String,
    token: Option<String>,
}

impl Hub {
    pub fn new(environment: Environment) -> Self {
        let Environment { endpoint, token, timeout, .. } = environment;
        let timeout = Some(Duration::from_secs(timeout));
        let agent = Agent::config_builder()
            .user_agent(concat!("openvla-convert/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            // The token is for the Hub, not for the hosts that it redirects to for large files.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(timeout)
            .timeout_per_read(timeout)
            .build();
        Self { agent: agent.into(), endpoint, token }
    }

    /// A revision's commit and files.
    pub fn list(&self, repository: &str, revision: &str) -> Result<Listing> {
        let revision = revision.replace('/', "%2F");
        let url = format!("{}/api/models/{repository}/revision/{revision}", self.endpoint);
        let mut answer = self.get(&format!("{url}?blobs=true"), 0)?;
        let text = answer.body_mut().read_to_string()?;
        let listing: Listing = serde_json::from_str(&text)
            .with_context(|| format!("{url} answers with no list of files"))?;
        // They become file names in the cache.
        let hashes = listing.siblings.iter().map(Sibling::hash).chain([listing.sha.as_str()]);
        for hash in hashes {
            let plain = !hash.is_empty() && hash.bytes().all(|b| b.is_ascii_hexdigit());
            ensure!(plain, "{url} lists the hash {hash:?}");
        }
        Ok(listing)
    }

    /// Requests the bytes from `start` on. Transient failures are [`ureq::Error`]s.
    fn get(&self, url: &str, start: u64) -> Result<Response<Body>> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.header("range", format!("bytes={start}-"));
        }
        let response = request.call().with_context(|| {
            format!(
                "no answer from {url}; is there a network? HF_HUB_OFFLINE=1 takes what was \
                 downloaded before"
            )
        })?;
        let status = response.status();
        let hint = match status.as_u16() {
            200..=299 => return Ok(response),
            401 | 403 => {
                "it is private, gated or not there; check its name, ask for access on its page, \
                 and set HF_TOKEN to your access token"
            }
            404 => "check the names of the repository and its revision",
            429 => "too many requests; wait some minutes, or set HF_TOKEN to your access token",
            400..=499 => "the Hub does not take this request",
            status => {
                return Err(ureq::Error::StatusCode(status))
                    .with_context(|| format!("{url} fails"));
            }
        };
        let said = response.headers().get("x-error-message").and_then(|said| said.to_str().ok());
        bail!(
            "{url} answers {status}{}: {hint}",
            said.map(|s| format!(", {s}")).unwrap_or_default()
        )
    }
}

/// The folder of a commit in the cache.
pub struct Snapshot {
    pub hub: Hub,
    /// The folder.
    pub dir: PathBuf,
    /// The folder of the files' contents.
    pub blobs: PathBuf,
    /// The URL of the files.
    pub url: String,
}

/// Seconds to wait after attempts without progress.
const WAITS: [u64; 3] = [1, 2, 4];

impl Snapshot {
    /// Downloads a file into the folder, unless it is there at its full length.
    pub fn download(&self, file: &Sibling) -> Result<()> {
        let link = self.dir.join(&file.rfilename);
        let whole = |path: &Path| fs::metadata(path).is_ok_and(|found| found.len() == file.size);
        if whole(&link) {
            return Ok(());
        }
        let blob = self.blobs.join(file.hash());
        let failed = || format!("cannot download {} to {}", file.rfilename, blob.display());
        fs::create_dir_all(&self.blobs).with_context(failed)?;
        fs::create_dir_all(link.parent().unwrap_or(&self.dir)).with_context(failed)?;
        if !whole(&blob) {
            let part = blob.with_extension("part");
            self.receive(file, &part).with_context(failed)?;
            fs::rename(&part, &blob).with_context(failed)?;
        }
        if link.is_symlink() || link.exists() {
            fs::remove_file(&link).with_context(failed)?; // broken, or cut off
        }
        let up = "../".repeat(2 + file.rfilename.matches('/').count());
        let target = Path::new(&up).join("blobs").join(file.hash());
        std::os::unix::fs::symlink(target, &link).with_context(failed)
    }

    /// Resumes and retries a download until it is complete.
    fn receive(&self, file: &Sibling, path: &Path) -> Result<()> {
        let mut part = OpenOptions::new().create(true).append(true).open(path)?;
        let taken = matches!(part.try_lock(), Err(TryLockError::WouldBlock));
        ensure!(!taken, "another program downloads it; wait for that one");
        let style = "{msg} {bar:30} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, \
                     {eta} left";
        // indicatif draws nothing when stderr is not a terminal.
        let progress = ProgressBar::new(file.size)
            .with_style(ProgressStyle::with_template(style)?)
            .with_message(file.rfilename.clone());
        let mut waits = WAITS.iter();
        let mut had = part.metadata()?.len();
        while had != file.size {
            let attempt = self.append(file, &mut part, &progress);
            let has = part.metadata()?.len();
            if has > had {
                waits = WAITS.iter();
            }
            had = has;
            if let Err(error) = attempt {
                match waits.next() {
                    Some(wait) if error.is::<ureq::Error>() => {
                        std::thread::sleep(Duration::from_secs(*wait));
                    }
                    _ => {
                        return Err(error)
                            .context("run this again and it goes on where it stopped");
                    }
                }
            }
        }
        progress.finish_and_clear();
        Ok(())
    }

    /// One attempt to download the rest.
    fn append(&self, file: &Sibling, part: &mut File, progress: &ProgressBar) -> Result<()> {
        let had = part.metadata()?.len();
        let start = if had < file.size { had } else { 0 }; // A file that is too long is another one.
        let response = self.hub.get(&format!("{}/{}", self.url, file.rfilename), start)?;
        // A server without ranges sends the whole file.
        let start = if response.status() == StatusCode::PARTIAL_CONTENT { start } else { 0 };
        part.set_len(start)?;
        progress.set_position(start);
        let mut body = progress.wrap_read(response.into_body().into_reader());
        let n = std::io::copy(&mut body, part).map_err(ureq::Error::from)?;
        let has = start + n;
        ensure!(has == file.size, "{has} bytes came, {} were announced", file.size);
        Ok(())
    }
}
