//! `openvla-serve`: a model for robots, over the network.

use std::io::{ErrorKind, IsTerminal};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use openvla::cli;
use openvla_serve::models::{Files, check_threads};
use openvla_serve::options::Options;
use openvla_serve::server::serve;
use openvla_serve::tokens::Tokens;
use tokio::net::TcpListener;
use tokio::runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;

fn main() -> ExitCode {
    let options: Options = cli::start();
    log(&options);
    cli::end(run(options))
}

fn log(options: &Options) {
    let log = tracing_subscriber::fmt()
        .with_max_level(options.log)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // It would panic where stderr cannot be written to; the server goes on without its log.
        .log_internal_errors(false);
    if options.log_json { log.json().flatten_event(true).init() } else { log.init() }
}

fn run(options: Options) -> Result<()> {
    let Options { model, settings, .. } = options;
    let tokens = settings.tokens()?; // before anything listens
    if model.path().is_none() {
        tracing::warn!("{}", cli::BUILT_IN);
    }
    // Beside those, one owns the model, one decodes pictures and one writes the audit log.
    check_threads(WORKERS + model.threads() + 3)?;
    let runtime =
        runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let served = runtime.block_on(async {
        // As the servers of both references have them.
        let usual = || if model.is_oft() { 8777 } else { 8000 };
        let at = SocketAddr::new(settings.host, settings.port.unwrap_or_else(usual));
        let listener = bind(at).await;
        let listener = listener.map_err(|error| cannot_listen(at, &error))?;
        if settings.client_tokens.is_some() {
            let hangup = signal(SignalKind::hangup()).expect("the system has signals");
            tokio::spawn(reread(Arc::clone(&tokens), hangup));
        }
        let mut stop = [SignalKind::terminate(), SignalKind::interrupt()]
            .map(|kind| signal(kind).expect("the system has signals"));
        tracing::info!(address = %listener.local_addr()?, "listening");
        let [terminate, interrupt] = &mut stop;
        let stopped = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        serve(listener, settings, tokens, Files(model), stopped).await
    });
    // A step that hangs must not keep the program.
    runtime.shutdown_background();
    served
}

/// Reads the tokens of clients again at each SIGHUP.
async fn reread(tokens: Arc<Tokens>, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        match tokens.reread() {
            Ok(n) => tracing::info!(n, "SIGHUP: the tokens were read again"),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "SIGHUP: the tokens stay as they were");
            }
        }
    }
}

/// Threads that connections are served on.
const WORKERS: usize = 2;

/// How long a server that is being restarted may keep its port.
const RESTART: Duration = Duration::from_secs(3);

/// Listens, as soon as the server before it has let go of the port.
async fn bind(at: SocketAddr) -> std::io::Result<TcpListener> {
    let start = Instant::now();
    loop {
        match TcpListener::bind(at).await {
            Err(error) if error.kind() == ErrorKind::AddrInUse && start.elapsed() < RESTART => {
                sleep(Duration::from_millis(50)).await;
            }
            bound => return bound,
        }
    }
}

/// Why nothing can listen there, and what to try.
fn cannot_listen(at: SocketAddr, error: &std::io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        ErrorKind::AddrInUse => {
            "; another program listens there: --port names another, 0 a free one"
        }
        ErrorKind::AddrNotAvailable => {
            "; this machine has no such address: --host 0.0.0.0 takes all it has"
        }
        ErrorKind::PermissionDenied => "; ports from 1024 on are open to all users: --port",
        _ => "",
    };
    anyhow!("cannot listen on {at}: {error}{hint}")
}
