//! The listener, the limits of connections, and shutdown.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tower_service::Service;

use crate::app::{App, Connection};
use crate::audit::Audit;
use crate::engine::Engine;
use crate::models::Models;
use crate::options::Settings;
use crate::page;
use crate::reload::{Successor, reload};
use crate::routes::routes;
use crate::tokens::Tokens;
use crate::worker::run;

/// For how long after the signal to stop a connection may still bring a request.
const LINGER: Duration = Duration::from_millis(500);

/// Serves until `stop` comes and everything accepted until then has its answer, or the worker gives
/// up.
///
/// # Errors
/// If the model or the audit log cannot be opened, the model fails too often or hangs, if not all was answered in time, or if
/// no thread can be started for the model.
pub async fn serve(
    listener: TcpListener,
    settings: Settings,
    tokens: Arc<Tokens>,
    models: impl Models,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let engine = Engine::new(settings.limits());
    let audit = Flushed(settings.audit(engine.metrics().audit_dropped.clone())?);
    let (models, (successors, coming)) = (Arc::new(models), channel());
    let (mut worker, mut ended) = start(&engine, &settings, Arc::clone(&models), coming)?;
    let reload = reload(engine.clone(), settings.rules(), models, successors);
    let (drain, draining) = watch::channel(false);
    let slots = Arc::new(Semaphore::new(settings.max_connections as usize));
    let (all, log) = (settings.clone(), audit.0.clone());
    let app = App::new(engine.clone(), all, tokens, log, reload, draining.clone());
    let (stall, drain_s) = (settings.stall(), settings.drain_s);
    if !settings.no_page {
        tokio::spawn(page::run(Arc::clone(&app)));
    }
    let mut accepting = Accepting { router: routes(app), slots, settings, draining, number: 0 };

    let failed = tokio::select! {
        () = accepting.accept_all(&listener, &engine) => unreachable!("accepts until the end"),
        () = stop => false,
        _ = &mut ended => true,
        () = stuck(&engine, 2 * stall) => bail!("a step of the model hangs"),
    };
    tracing::info!(pending = engine.pending(), "draining");
    let _ = drain.send(true); // connections may all be gone
    // The system has accepted these already, and their clients may have sent a request.
    while let Ok(Ok((stream, address))) = timeout(Duration::ZERO, listener.accept()).await {
        accepting.take(stream, address, &engine);
    }
    drop(listener);
    let limit = Duration::from_secs(drain_s);
    let all = accepting.slots.acquire_many(accepting.settings.max_connections);
    let in_time = timeout(limit, all).await.is_ok();
    engine.close();
    if !failed && !in_time {
        bail!("not all was answered within {limit:.0?}: --drain-s");
    }
    if !failed && engine.model().is_none() {
        return Ok(()); // nothing was promised yet, and opening a large model takes its time
    }
    if !failed && timeout(limit, &mut ended).await.is_err() {
        bail!("the model did not end its step within {limit:.0?}");
    }
    worker
        .take()
        .map_or(Ok(Ok(())), JoinHandle::join)
        .map_err(|_| anyhow!("the worker panicked"))?
}

/// An audit log whose last lines are written before the server ends, however it does.
struct Flushed(Option<Arc<Audit>>);

impl Drop for Flushed {
    fn drop(&mut self) {
        self.0.iter().for_each(|audit| audit.flush());
    }
}

/// The worker's thread, and word of its end.
type Worker = (Option<JoinHandle<Result<()>>>, oneshot::Receiver<()>);

fn start<M: Models>(
    engine: &Engine,
    settings: &Settings,
    models: Arc<M>,
    successors: Receiver<Successor<M::Policy>>,
) -> Result<Worker> {
    let (end, ended) = oneshot::channel();
    let (engine, rules) = (engine.clone(), settings.rules());
    let work = move || {
        let _end = end; // dropped with the thread, however it ends
        run(&engine, &rules, &*models, &successors)
    };
    let named = std::thread::Builder::new().name("model".into());
    let thread = named.spawn(work).context("cannot start the model's thread")?;
    Ok((Some(thread), ended))
}

/// Returns if a step takes longer than this.
async fn stuck(engine: &Engine, limit: Duration) {
    while engine.busy().is_none_or(|busy| busy < limit) {
        sleep(Duration::from_secs(1).min(limit)).await;
    }
}

struct Accepting {
    router: Router,
    slots: Arc<Semaphore>,
    settings: Settings,
    draining: watch::Receiver<bool>,
    number: u64,
}

impl Accepting {
    async fn accept_all(&mut self, listener: &TcpListener, engine: &Engine) {
        loop {
            match listener.accept().await {
                Ok((stream, address)) => self.take(stream, address, engine),
                Err(error) => {
                    // Such as too many open files: others must close theirs first.
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    fn take(&mut self, stream: TcpStream, address: SocketAddr, engine: &Engine) {
        let Ok(permit) = Arc::clone(&self.slots).try_acquire_owned() else {
            engine.metrics().refused.inc();
            return; // closes it, so that the client knows at once
        };
        let connection =
            Connection::new(self.number, address.ip().to_canonical(), engine.clone(), permit);
        self.number += 1;
        let (router, draining) = (self.router.clone(), self.draining.clone());
        let patience = self.settings.patience();
        tokio::spawn(async move {
            if let Err(error) = talk(stream, router, connection, draining, patience).await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
}

async fn talk(
    stream: TcpStream,
    router: Router,
    connection: Connection,
    mut draining: watch::Receiver<bool>,
    patience: Duration,
) -> hyper::Result<()> {
    let _ = stream.set_nodelay(true); // answers are small; without it they are only slower
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience));
    let answer = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(connection.clone());
        router.clone().call(request)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(patience).max_buf_size(1 << 16);
    let http = http.serve_connection(TokioIo::new(Box::pin(stream)), answer).with_upgrades();
    let mut http = std::pin::pin!(http);
    let end = async {
        let _ = draining.wait_for(|draining| *draining).await; // an error is the end, too
        sleep(LINGER).await;
    };
    tokio::select! {
        done = http.as_mut() => return done,
        () = end => http.as_mut().graceful_shutdown(),
    }
    http.await
}
