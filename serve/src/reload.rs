//! `POST /v1/reload`: another model takes the place of the one that is served, between two steps.
//!
//! It is opened beside that one, checked and warmed up while robots go on being served. Each step is wholly one model's,
//! and so is its answer, which says whose. Whatever goes wrong leaves everything as it was.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use crate::app::{App, Connection};
use crate::audit::Entry;
use crate::engine::Engine;
use crate::error::{Code, Error};
use crate::models::Models;
use crate::options::Settings;
use crate::policy::ModelInfo;
use crate::stop::name;
use crate::tokens::Caller;
use crate::worker::{Rules, catch_panic, warm_up};

/// A model that is to take the place of the one that is served.
pub struct Successor<P> {
    /// The model, warmed up.
    pub policy: P,
    /// Its file, if that is another than at the start.
    pub file: Option<PathBuf>,
    /// How long its first step took.
    pub took: Duration,
    /// Where the model goes that was served before.
    pub before: SyncSender<P>,
}

/// Opens a file beside what is served and puts it in its place; without a name, the file that is served, again. Returns
/// when that is done, and says what is served then.
pub type Reload = dyn Fn(Option<PathBuf>) -> Result<Arc<ModelInfo>> + Send + Sync;

/// How models of this kind are put in place: the worker gets them through `successors`.
pub fn reload<M: Models>(
    engine: Engine,
    rules: Rules,
    models: Arc<M>,
    successors: Sender<Successor<M::Policy>>,
) -> Arc<Reload> {
    let current: Mutex<Option<PathBuf>> = Mutex::new(None);
    Arc::new(move |named| {
        let gone = || anyhow!("the server is going away");
        let served = engine.model().context("no model is served yet")?;
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        let file = named.or_else(|| current.clone());
        let open = || models.open_beside(file.as_deref(), &served);
        let mut policy = catch_panic(open)??;
        let took = warm_up(&rules, &mut policy)?;
        let (before, replaced) = sync_channel(1);
        let successor = Successor { policy, file: file.clone(), took, before };
        successors.send(successor).map_err(|_| gone())?;
        engine.wake();
        // Freed here, which takes a while, and not by the thread that robots wait for.
        drop(replaced.recv().map_err(|_| gone())?);
        *current = file;
        engine.model().ok_or_else(gone)
    })
}

/// What may be asked for.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    /// The name of a file in the folder of `--models`.
    model: Option<String>,
}

/// What came of it.
#[derive(Serialize)]
struct Reloaded {
    model: String,
    fingerprint: String,
    /// Of what was served before.
    before: String,
    seconds: f64,
}

/// `POST /v1/reload`.
pub async fn post(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Connection>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let by = name(request.headers());
    let reloaded = async {
        if app.tokens.is_empty() && !app.settings.host.is_loopback() {
            let message = "--insecure lets other machines ask for motions, not for another model";
            let hint = "--client-tokens, with the scope `admin`";
            return Err(Error::new(Code::MissingScope, message).hint(hint));
        }
        let file = read(&app.body(request).await?, &app.settings)?;
        replace(&app, file, Entry::event("reload", by, &caller, connection.number)).await
    };
    reloaded.await.map(Json).into_response()
}

fn read(body: &[u8], settings: &Settings) -> Result<Option<PathBuf>, Error> {
    let asked = if body.is_empty() {
        Asked::default()
    } else {
        let wrong = |why: serde_json::Error| {
            let code = if why.is_data() { Code::BadRequest } else { Code::BadJson };
            Error::new(code, format!("the body: {why}"))
                .hint("nothing, or {\"model\": \"NAME.gguf\"}, a file in the folder of --models")
        };
        serde_json::from_slice(body).map_err(wrong)?
    };
    let Some(name) = asked.model else { return Ok(None) };
    let Some(folder) = &settings.models else {
        let wrong = "this server serves the file that it was started with alone";
        return Err(Error::bad_request(wrong).hint("--models FOLDER lets clients choose"));
    };
    // Nothing that leads elsewhere: no folders, `..` or absolute paths.
    if Path::new(&name).file_name() != Some(OsStr::new(&name)) {
        let wrong = format!("`model` is {name:?}, which is not the name of a file");
        return Err(Error::bad_request(wrong).hint("files in the folder of --models, without it"));
    }
    Ok(Some(folder.join(name)))
}

/// Goes on to its end also if who asked does not wait for it.
async fn replace(
    app: &Arc<App>,
    file: Option<PathBuf>,
    mut entry: Entry,
) -> Result<Reloaded, Error> {
    let busy = || {
        let error = Error::new(Code::ReloadRunning, "a model is being opened already");
        error.retry_after(10)
    };
    let permit = Arc::clone(&app.reloading).try_acquire_owned().map_err(|_| busy())?;
    let before = app.engine.model();
    let before = before.ok_or_else(|| Error::new(Code::NotReady, "no model is served yet"))?;
    let (at, begun, opens) = (Arc::clone(app), Instant::now(), Arc::clone(&app.reload));
    tracing::info!(file = file.as_ref().map(|f| f.display().to_string()), "reloading");
    let task = tokio::spawn(async move {
        let done = spawn_blocking(move || opens(file)).await;
        let done = done.unwrap_or_else(|_| Err(anyhow!("its thread panicked")));
        let seconds = begun.elapsed().as_secs_f64();
        let outcome = match &done {
            Ok(model) => {
                let (file, fingerprint) = (&model.file, &model.fingerprint);
                tracing::warn!(file, fingerprint, seconds, "another model is served");
                entry.model = Some(file.clone());
                entry.fingerprint = Some(fingerprint.clone());
                "ok"
            }
            Err(why) => {
                tracing::error!(error = format!("{why:#}"), "the model stays");
                entry.outcome = Code::ReloadFailed.name();
                entry.outcome
            }
        };
        at.note(entry);
        at.engine.metrics().reloaded(outcome);
        drop(permit);
        done.map(|model| (model, seconds))
    });
    let mut draining = app.draining.clone();
    let done = tokio::select! {
        done = task => done.unwrap_or_else(|_| Err(anyhow!("its task panicked"))),
        _ = draining.wait_for(|draining| *draining) => {
            return Err(Error::new(Code::NotReady, "the server is going away"));
        }
    };
    let (model, seconds) = done.map_err(|why| failed(&why))?;
    Ok(Reloaded {
        model: model.name.clone(),
        fingerprint: model.fingerprint.clone(),
        before: before.fingerprint.clone(),
        seconds,
    })
}

fn failed(why: &anyhow::Error) -> Error {
    let hint = why.chain().find_map(|cause| cause.downcast_ref::<openvla::Error>()?.hint());
    let error = Error::new(Code::ReloadFailed, format!("the model stays: {why:#}"));
    Error { hint, ..error }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::options::Options;

    fn named(args: &[&str], body: &str) -> Result<Option<PathBuf>, Code> {
        let options = Options::parse_from([&["openvla-serve"], args].concat());
        read(body.as_bytes(), &options.settings).map_err(|error| error.code)
    }

    #[test]
    fn a_client_names_files_of_the_folder_and_no_others() {
        let folder = ["--models", "/srv/models"];
        for args in [&[][..], &folder] {
            for nothing in ["", "{}", r#"{"model": null}"#] {
                assert_eq!(named(args, nothing), Ok(None), "{nothing}");
            }
        }
        let path = Path::new("/srv/models/b.gguf").to_owned();
        assert_eq!(named(&folder, r#"{"model": "b.gguf"}"#), Ok(Some(path)));
        assert_eq!(named(&[], r#"{"model": "b.gguf"}"#), Err(Code::BadRequest));
        for elsewhere in [
            "",
            ".",
            "..",
            "../b",
            "/etc/passwd",
            "a/b",
            "./b",
            "b/",
            "b/.",
            "b/..",
            "//",
            "../models/b",
        ] {
            let body = serde_json::json!({ "model": elsewhere }).to_string();
            assert_eq!(named(&folder, &body), Err(Code::BadRequest), "{elsewhere}");
        }
        for wrong in [r#"{"file": "b"}"#, r#"{"model": 1}"#, "[]", "1"] {
            assert_eq!(named(&folder, wrong), Err(Code::BadRequest), "{wrong}");
        }
        assert_eq!(named(&folder, "{"), Err(Code::BadJson));
    }
}
