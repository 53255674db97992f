//! All routes, with what surrounds every protocol: token, limits, metrics, logs.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};

use crate::app::{App, Arrived, extension};
use crate::description::Description;
use crate::error::{Code, Error, Outcome};
use crate::tokens::Scope;
use crate::{act, openpi, page, plain, reload, stop, vla_eval};

/// The description of the API.
pub const OPENAPI: &str = include_str!("openapi.json");

/// Where vLLM has openpi's websocket.
const VLLM: &str = "/v1/realtime/robot/openpi";

/// Where motions are asked for, one by one.
const MOTIONS: [&str; 4] = ["/act", "/act/", "/v1/act", "/v1/act/"];

/// All routes.
pub fn routes(app: Arc<App>) -> Router {
    let events = Router::new().route(page::EVENTS, get(page::events));
    let page = if app.settings.no_page { Router::new() } else { events };
    page.route("/", get(page::root))
        .route(VLLM, get(openpi::upgrade))
        .route("/vla-eval", get(vla_eval::upgrade))
        .route("/health", get(vla_eval::health))
        .route("/config", get(vla_eval::config))
        .route("/act", post(act::act))
        .route("/act/", post(act::act)) // FastAPI, which serves the reference, redirects it
        .route("/v1/act", post(plain::act))
        .route("/v1/act/", post(plain::act))
        .route("/v1/stop", post(stop::stop))
        .route("/v1/release", post(stop::release))
        .route("/v1/reload", post(reload::post))
        .route("/v1/model", get(model))
        .route("/healthz", get(async || (TEXT, "OK\n")))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(async || (JSON, OPENAPI)))
        .fallback(act::not_found)
        .method_not_allowed_fallback(act::method_not_allowed)
        .layer(from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}

const TEXT: [(&str, &str); 1] = [("content-type", "text/plain; charset=utf-8")];
const JSON: [(&str, &str); 1] = [("content-type", "application/json")];
const METRICS: [(&str, &str); 1] =
    [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];

async fn ready(State(app): State<Arc<App>>) -> Response {
    if *app.draining.borrow() {
        return Error::new(Code::NotReady, "the server is going away").into_response();
    }
    app.engine.check_ready(app.settings.stall()).map(|()| (TEXT, "ready\n")).into_response()
}

async fn model(State(app): State<Arc<App>>) -> Response {
    let Some(model) = app.engine.model() else {
        return Error::new(Code::NotReady, "the model is not open yet").into_response();
    };
    Json(Description::new(&app, &model)).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    (METRICS, app.engine.metrics().text()).into_response()
}

/// What a token must allow; nothing in particular where anyone may look who has one.
fn scope(app: &App, request: &Request) -> Option<Scope> {
    match request.uri().path() {
        "/" if page::is_page(app, request) => Some(Scope::Watch),
        page::EVENTS | "/metrics" => Some(Scope::Watch),
        "/" | VLLM | "/vla-eval" | "/act" | "/act/" | "/v1/act" | "/v1/act/" => Some(Scope::Act),
        "/v1/stop" | "/v1/release" => Some(Scope::Act),
        "/v1/reload" => Some(Scope::Admin),
        _ => None, // probes, descriptions, and what is not there
    }
}

async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    request.extensions_mut().insert(Arrived(arrived));
    let upgrades = request.headers().contains_key(header::UPGRADE);
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let admitted = app.admit(request.headers(), &path);
    let caller = admitted.as_ref().cloned().unwrap_or_default();
    let permitted = admitted.and_then(|caller| {
        scope(&app, &request).map_or(Ok(()), |scope| app.tokens.permit(&caller, scope))?;
        if MOTIONS.contains(&&*path) {
            // Before the body is read.
            let client = stop::name(request.headers());
            app.limit(&caller, client.as_deref(), extension(&request))?;
        }
        Ok(())
    });
    let mut response = match permitted {
        Ok(()) => {
            request.extensions_mut().insert(caller.clone());
            next.run(request).await
        }
        Err(error) if error.code == Code::Unauthorized => {
            page::sign_in(&app, &request).unwrap_or_else(|| error.into_response())
        }
        Err(error) => error.into_response(),
    };
    let outcome = response.extensions().get().map_or("ok", |Outcome(code)| code.name());
    let form = match path.as_str() {
        "/act" | "/act/" => "act",
        "/v1/act" | "/v1/act/" => "plain",
        VLLM => "openpi",
        "/vla-eval" => "vla_eval",
        "/" if upgrades || app.settings.no_page => "openpi",
        "/" | page::EVENTS => "page",
        _ => "other",
    };
    // A connection that became a websocket is not an answer; its messages are counted one by one.
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        app.engine.metrics().answered(form, outcome, &caller);
        if *app.draining.borrow() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
    let ms = arrived.elapsed().as_secs_f64() * 1e3;
    let status = response.status().as_u16();
    match status {
        500 => tracing::error!(%method, path, status, outcome, ms, "request"),
        _ => tracing::debug!(%method, path, status, outcome, ms, "request"),
    }
    response
}
