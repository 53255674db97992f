//! The audit log: who was given which motion when, a line of JSON each.
//!
//! ```text
//! {"time": 1796023454.2, "protocol": "plain", "client": "arm", "connection": 7, "seq": 3, "instruction": "open the drawer",
//!  "unnorm_key": "bridge_orig", "latency_ms": 80.1, "actions": [[0.1, …]], "tokens": [31872, …],
//!  "model": "/srv/openvla-7b.gguf", "fingerprint": "9f2c…", "outcome": "ok"}
//! ```
//!
//! `token` is there if the client's token has a name. `outcome` is `ok`, the error's code, or `stop`,
//! `release`, `reload` (with the model that is served from then on) and `reload_failed`. What did not come as far as the queue, such as a body that is
//! not JSON, is not in it, and neither is what its client did not wait for. Times are seconds since 1970.
//!
//! A thread of its own writes the lines. Nobody waits for it: where it is behind, or the disk is full, lines are dropped,
//! counted and, the first time, warned of. Past its size the file becomes `FILE.1`, that one `FILE.2`, up to `FILE.4`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;

use crate::error::Error;
use crate::meta::Meta;
use crate::observation::{Answer, Observation};
use crate::tokens::Caller;

/// Lines that may wait for the disk.
const MAX_WAITING: usize = 1024;

/// Files of earlier lines that are kept.
const KEPT: u32 = 4;

/// How long the last lines may take when the server ends.
const END: Duration = Duration::from_secs(2);

/// A line.
#[derive(Debug, Default, Serialize)]
pub struct Entry {
    time: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<&'static str>,
    client: Option<String>,
    /// The name of the token that was shown, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    connection: u64,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    asked: Option<Asked>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    moved: Option<Moved>,
    /// The file of the model that moved the robot, or that is served from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Its fingerprint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// `ok`, an error's code, or what was done.
    pub outcome: &'static str,
}

#[derive(Debug, Serialize)]
struct Asked {
    seq: Option<u64>,
    instruction: String,
    /// What the request named; the answer's, if there is one.
    unnorm_key: Option<String>,
    latency_ms: f64,
}

#[derive(Debug, Serialize)]
struct Moved {
    actions: Vec<Vec<f64>>,
    tokens: Vec<u32>,
}

enum Message {
    Line(Box<Entry>),
    /// Says when all before it is written.
    Flush(SyncSender<()>),
}

/// Where lines go.
pub struct Audit {
    lines: SyncSender<Message>,
    dropped: Counter,
}

impl Entry {
    /// An observation, before it is known what comes of it.
    pub fn asked(protocol: &'static str, observation: &Observation, meta: &Meta) -> Self {
        let asked = Asked {
            seq: meta.seq,
            instruction: observation.instruction.clone(),
            unnorm_key: observation.unnorm_key.clone(),
            latency_ms: 0.0,
        };
        let client = meta.client.name().map(str::to_owned);
        let (protocol, asked) = (Some(protocol), Some(asked));
        let (token, connection) = (meta.caller.name().map(str::to_owned), meta.connection);
        Self { protocol, client, token, connection, asked, ..Self::default() }
    }

    /// Something else that somebody did.
    pub fn event(
        outcome: &'static str,
        client: Option<String>,
        caller: &Caller,
        connection: u64,
    ) -> Self {
        let token = caller.name().map(str::to_owned);
        Self { client, token, connection, outcome, ..Self::default() }
    }
}

impl Audit {
    /// Opens the file, whose lines stay, and starts the thread that writes to it. A file of `most` bytes is full.
    ///
    /// # Errors
    /// If the file cannot be opened, or no thread be started.
    pub fn open(path: &Path, most: u64, dropped: Counter) -> Result<Self> {
        let log =
            Log::open(path, most).with_context(|| format!("--audit-log {}", path.display()))?;
        let (send, lines) = sync_channel(MAX_WAITING);
        let failed = dropped.clone();
        let thread = std::thread::Builder::new().name("audit".into());
        thread.spawn(move || write(log, &lines, &failed)).context("cannot start a thread")?;
        Ok(Self { lines: send, dropped })
    }

    /// Adds what came of an observation that came so long ago.
    pub fn answered(&self, mut entry: Entry, took: Duration, answer: &Result<Answer, Error>) {
        if let Some(asked) = &mut entry.asked {
            asked.latency_ms = took.as_secs_f64() * 1e3;
        }
        match answer {
            Ok(answer) => {
                entry.outcome = "ok";
                let (actions, tokens) = (answer.actions.clone(), answer.tokens.clone());
                entry.moved = Some(Moved { actions, tokens });
                entry.model = Some(answer.file.clone());
                entry.fingerprint = Some(answer.fingerprint.clone());
                if let Some(asked) = &mut entry.asked {
                    asked.unnorm_key = Some(answer.unnorm_key.clone());
                }
            }
            Err(error) => entry.outcome = error.code.name(),
        }
        self.add(entry);
    }

    /// Adds a line, or drops it. Never waits.
    pub fn add(&self, mut entry: Entry) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        entry.time = since.unwrap_or_default().as_secs_f64();
        if self.lines.try_send(Message::Line(Box::new(entry))).is_err() {
            lose(&self.dropped, &"the disk is too slow");
        }
    }

    /// Waits until all is written, but not for long.
    pub fn flush(&self) {
        let (done, written) = sync_channel(1);
        if self.lines.try_send(Message::Flush(done)).is_ok() {
            let _ = written.recv_timeout(END); // what is not written by then is lost
        }
    }
}

fn lose(dropped: &Counter, why: &dyn std::fmt::Display) {
    if dropped.inc() == 0 {
        tracing::warn!(%why, "lines of the audit log are lost; openvla_audit_dropped_total counts them");
    }
}

fn write(mut log: Log, lines: &Receiver<Message>, dropped: &Counter) {
    for message in lines {
        match message {
            Message::Line(entry) => {
                let json = serde_json::to_string(&entry).expect("strings and numbers");
                if let Err(error) = log.add(json) {
                    lose(dropped, &error);
                }
            }
            Message::Flush(done) => drop(done), // the other end hears of it
        }
    }
}

/// A file of lines.
struct Log {
    path: PathBuf,
    file: File,
    n: u64,
    most: u64,
    /// Whether its last line was cut off by an error.
    is_cut: bool,
}

impl Log {
    fn open(path: &Path, most: u64) -> io::Result<Self> {
        // Instructions are nobody else's business.
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let n = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, n, most, is_cut: false })
    }

    fn add(&mut self, mut line: String) -> io::Result<()> {
        line.push('\n');
        if self.n > 0 && self.n + line.len() as u64 > self.most {
            self.rotate()?;
        }
        if self.is_cut {
            line.insert(0, '\n');
        }
        let written = self.file.write_all(line.as_bytes());
        self.is_cut = written.is_err();
        self.n += line.len() as u64;
        written
    }

    fn rotate(&mut self) -> io::Result<()> {
        let earlier = |n: u32| {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{n}"));
            PathBuf::from(name)
        };
        for n in (1..KEPT).rev() {
            let _ = std::fs::rename(earlier(n), earlier(n + 1)); // there may be none yet
        }
        std::fs::rename(&self.path, earlier(1))?;
        *self = Self::open(&self.path, self.most)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_makes_room_and_no_line_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let mut log = Log::open(&path, 100).unwrap();
        for i in 0..60 {
            log.add(format!("{{\"line\": {i}}}")).unwrap();
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(read("audit.jsonl").ends_with("{\"line\": 59}\n"));
        let names =
            ["audit.jsonl.4", "audit.jsonl.3", "audit.jsonl.2", "audit.jsonl.1", "audit.jsonl"];
        let kept: String = names.map(read).concat();
        let numbers: Vec<u32> = kept
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["line"].as_u64())
            .map(|line| line.unwrap() as u32)
            .collect();
        let first = numbers[0];
        assert!(numbers.len() > 20 && numbers == (first..60).collect::<Vec<_>>(), "{numbers:?}");
        assert!(names.iter().all(|name| read(name).len() <= 100), "none is too large");
        assert!(!dir.path().join("audit.jsonl.5").exists());
    }

    /// A disk that is full, as the system has one for tests.
    #[test]
    fn a_full_disk_loses_lines_and_counts_them() {
        let dropped = Counter::default();
        let audit = Audit::open(Path::new("/dev/full"), 1 << 20, dropped.clone());
        let audit = audit.unwrap();
        for _ in 0..3 {
            audit.add(Entry::event("stop", None, &Caller::default(), 1));
        }
        audit.flush();
        assert_eq!(dropped.get(), 3);
    }

    /// Nobody reads what is written, so the thread stands still.
    #[test]
    fn a_slow_disk_loses_lines_and_keeps_nobody() {
        let (send, _stands_still) = sync_channel(MAX_WAITING);
        let dropped = Counter::default();
        let audit = Audit { lines: send, dropped: dropped.clone() };
        for _ in 0..MAX_WAITING + 5 {
            audit.add(Entry::event("stop", None, &Caller::default(), 1)); // returns
        }
        assert_eq!(dropped.get(), 5);
    }
}
