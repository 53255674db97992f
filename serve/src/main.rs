//! `openvla-serve`: a model for robots, over the network.

use std::io::{ErrorKind, IsTerminal};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use openvla::cli;
use openvla_serve::options::Options;
use openvla_serve::server::serve;
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
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
    match options.log_json {
        true => log.json().flatten_event(true).init(),
        false => log.init(),
    }
}

fn run(options: Options) -> Result<()> {
    let Options { model, settings, .. } = options;
    settings.token()?; // before anything listens
    if model.path().is_none() {
        tracing::warn!("{}", cli::BUILT_IN);
    }
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let served = runtime.block_on(async {
        let at = (settings.host, settings.port);
        let listener = bind(at).await;
        let listener = listener.with_context(|| format!("cannot listen on {}:{}", at.0, at.1))?;
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
        serve(listener, settings, move || model.open(), stopped).await
    });
    // A step that hangs must not keep the program.
    runtime.shutdown_background();
    served
}

/// How long a server that is being restarted may keep its port.
const RESTART: Duration = Duration::from_secs(3);

/// Listens, as soon as the server before it has let go of the port.
async fn bind(at: (IpAddr, u16)) -> std::io::Result<TcpListener> {
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
