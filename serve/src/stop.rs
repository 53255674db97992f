//! The emergency stop: while it is set, no motion leaves the server, by whatever protocol, until it is released.
//!
//! What waits is sent away at once, and what the model computes meanwhile comes to nobody, also if the stop is released before
//! it is done. Neither websocket has a message for it, and a frame would wait behind those before it, so their clients send
//! `POST /v1/stop` over a connection of its own. The stop is in memory: a server that starts anew is not stopped.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, http};
use prometheus_client::metrics::gauge::Gauge;
use serde::Serialize;
use tokio::sync::watch;

use crate::app::{App, Connection};
use crate::audit::Entry;
use crate::error::{Code, Error};
use crate::observation::Headers;
use crate::tokens::Caller;

/// Whether motions may leave. Shared by all requests.
#[derive(Debug)]
pub struct Stop {
    state: watch::Sender<Stopped>,
    /// 1 while they may not.
    gauge: Gauge,
}

/// What is known of the stop; as JSON, the answer to who sets or releases it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Stopped {
    stopped: bool,
    /// Who set it, if it is set and they said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    /// When, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<f64>,
    /// When the last one was released.
    #[serde(skip)]
    released: Option<Instant>,
}

impl Stopped {
    /// Whether a motion may leave that was asked for at this time.
    fn check(&self, arrived: Instant) -> Result<(), Error> {
        let by = self.by.as_ref().map(|by| format!(" by `{by}`")).unwrap_or_default();
        let (message, hint) = match self.released {
            _ if self.stopped => (
                format!("the emergency stop is set{by}: no motion leaves the server"),
                "POST /v1/release ends it, when all is clear",
            ),
            Some(released) if arrived <= released => (
                "the emergency stop was set meanwhile, and is released".to_owned(),
                "send a picture of now",
            ),
            _ => return Ok(()),
        };
        Err(Error::new(Code::Stopped, message).hint(hint))
    }
}

impl Stop {
    /// Motions may leave.
    pub fn new(gauge: Gauge) -> Self {
        Self { state: watch::Sender::new(Stopped::default()), gauge }
    }

    /// Lets no motion leave from now on.
    pub fn set(&self, by: Option<String>) {
        self.state.send_if_modified(|state| {
            let is_new = !state.stopped;
            if is_new {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                (state.stopped, state.by, state.since) = (true, by, Some(since.as_secs_f64()));
            }
            is_new
        });
        self.gauge.set(1);
    }

    /// Lets motions leave that are asked for from now on.
    pub fn release(&self) {
        self.gauge.set(0);
        self.state.send_if_modified(|state| {
            let was_set = state.stopped;
            if was_set {
                *state = Stopped { released: Some(Instant::now()), ..Stopped::default() };
            }
            was_set
        });
    }

    /// Whether a motion may leave that was asked for at this time.
    ///
    /// # Errors
    /// [`Code::Stopped`].
    pub fn check(&self, arrived: Instant) -> Result<(), Error> {
        self.state.borrow().check(arrived)
    }

    /// The result of work that was asked for at this time, unless there is a stop before its end: then the work is dropped.
    ///
    /// # Errors
    /// [`Code::Stopped`], and those of the work.
    pub async fn unless<T>(
        &self,
        arrived: Instant,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let mut state = self.state.subscribe();
        let stopped = async {
            // The sender is ours, and lives as long.
            let found = state.wait_for(|state| state.check(arrived).is_err()).await;
            found.map_or(Ok(()), |state| state.check(arrived))
        };
        let done = tokio::select! {
            biased;
            stopped = stopped => stopped.map(|()| None),
            done = work => done.map(Some),
        };
        self.check(arrived)?;
        done?.ok_or_else(|| Error::new(Code::Stopped, "the server is going away"))
    }
}

/// `POST /v1/stop`.
pub async fn stop(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Connection>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    // A stop is set whatever else the headers say.
    let by = name(request.headers());
    app.stop.set(by.clone());
    let (connection, token) = (connection.number, caller.name());
    tracing::warn!(by, token, connection, "stopped: no motion leaves the server");
    app.note(Entry::event("stop", by, &caller, connection));
    state(&app)
}

/// `POST /v1/release`.
pub async fn release(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Connection>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let by = name(request.headers());
    let (connection, token) = (connection.number, caller.name());
    app.note(Entry::event("release", by.clone(), &caller, connection));
    tracing::warn!(by, token, connection, "released: motions leave the server");
    app.stop.release();
    state(&app)
}

/// The name that a client gives itself.
pub fn name(headers: &http::HeaderMap) -> Option<String> {
    Headers::of(headers).ok()?.client_id.filter(|name| name.len() <= 128)
}

fn state(app: &App) -> Response {
    Json(app.stop.state.borrow().clone()).into_response()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stop_holds_until_it_is_released_and_what_was_asked_before_that_is_lost() {
        let (stop, arrived) = (Stop::new(Gauge::default()), Instant::now());
        assert!(stop.check(arrived).is_ok());
        stop.release();
        assert!(stop.check(arrived).is_ok(), "there was none");
        stop.set(Some("arm".into()));
        stop.set(None);
        for arrived in [arrived, Instant::now()] {
            let error = stop.check(arrived).unwrap_err();
            assert_eq!(error.code, Code::Stopped);
            assert!(error.message.contains("`arm`"), "the first: {error}");
        }
        stop.release();
        assert_eq!(stop.check(arrived).unwrap_err().code, Code::Stopped);
        assert!(stop.check(Instant::now() + Duration::from_millis(1)).is_ok());
    }

    #[tokio::test]
    async fn work_under_way_is_dropped_and_its_result_does_not_leave() {
        let stop = Stop::new(Gauge::default());
        let never = std::future::pending::<Result<(), Error>>();
        let work = stop.unless(Instant::now(), never);
        let (stopped, ()) = tokio::join!(work, async { stop.set(None) });
        assert_eq!(stopped.unwrap_err().code, Code::Stopped);
        let at_once = async || Ok(());
        assert!(stop.unless(Instant::now(), at_once()).await.is_err());
        stop.release();
        let now = Instant::now() + Duration::from_millis(1);
        assert!(stop.unless(now, at_once()).await.is_ok());
        let meanwhile = async {
            stop.set(None);
            tokio::time::sleep(Duration::from_millis(2)).await;
            stop.release();
            Ok(())
        };
        assert!(stop.unless(Instant::now(), meanwhile).await.is_err());
    }
}
