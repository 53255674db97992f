//! A server as a process of the soak's own: started, measured from outside, asked to end, ended.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

/// How long a server may take to open its model, and to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// How to start one.
pub struct Spawn {
    pub program: PathBuf,
    pub args: Vec<String>,
    /// Host and port, the same for each that is started.
    pub address: String,
}

/// One that runs; ended when dropped.
pub struct Process {
    child: Child,
}

/// What a process has of the system.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// Since the first.
    pub minutes: f64,
    pub resident_bytes: u64,
    pub descriptors: usize,
    pub threads: u64,
    /// Processes of the machine that ran or waited in the last minute, on average.
    pub load: f64,
}

impl Spawn {
    /// A program, with arguments beside those that say where it listens.
    ///
    /// # Errors
    /// If no port is free.
    pub fn new(program: &Path, args: &[String]) -> Result<Self> {
        let free = TcpListener::bind("127.0.0.1:0").context("no port is free")?;
        let address = free.local_addr()?.to_string();
        Ok(Self { program: program.to_owned(), args: args.to_vec(), address })
    }

    /// Starts a server and waits until it is ready. Its log goes where ours does. Drafts are off, since a token that is
    /// checked with others may round differently.
    ///
    /// # Errors
    /// If it cannot be started, or is not ready in time.
    pub fn start(&self) -> Result<Process> {
        let (name, port) = (self.program.display(), self.address.rsplit(':').next());
        let child = Command::new(&self.program)
            .args(["--host", "127.0.0.1", "--port", port.unwrap_or_default(), "--draft", "off"])
            .args(&self.args)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let mut process = Process { child };
        let begun = Instant::now();
        let url = format!("http://{}/readyz", self.address);
        let agent: ureq::Agent = ureq::Agent::config_builder().proxy(None).build().into();
        while agent.get(&url).call().is_err() {
            if let Some(status) = process.child.try_wait()? {
                bail!("{name} ended before it was ready: {status}");
            }
            if begun.elapsed() > PATIENCE {
                bail!("{name} was not ready within {PATIENCE:.0?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(process)
    }
}

impl Process {
    /// Sends a signal and waits for the end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        kill_process(Pid::from_child(&self.child), signal)?;
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if begun.elapsed() > PATIENCE {
                bail!("the server did not end within {PATIENCE:.0?} of {signal:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it has now.
    ///
    /// # Errors
    /// If it has ended.
    pub fn sample(&self, since: Instant) -> Result<Sample> {
        let folder = PathBuf::from(format!("/proc/{}", self.child.id()));
        let gone = || format!("cannot read {}: the server has ended", folder.display());
        let status = std::fs::read_to_string(folder.join("status")).with_context(gone)?;
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let (resident, threads) = (number("VmRSS:"), number("Threads:"));
        let (resident, threads) = resident.zip(threads).with_context(gone)?;
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Ok(Sample {
            minutes: since.elapsed().as_secs_f64() / 60.0,
            resident_bytes: resident * 1024,
            descriptors: std::fs::read_dir(folder.join("fd")).with_context(gone)?.count(),
            threads,
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}
