//! Errors as the reference answers them, for clients that rely on it: `--compat-errors`.
//!
//! FastAPI answers invalid requests with 422 and a `detail`; all later errors are the string `"error"` with
//! status 200.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::error::{Code, Error, Outcome};
use crate::json::standard;

/// Bodies up to this size are repeated in the answer, as FastAPI does with all.
const MAX_ECHO: usize = 1 << 16;

/// FastAPI's description of an invalid request, in the order of its keys.
#[derive(Serialize)]
struct Complaint {
    r#type: &'static str,
    loc: Vec<Value>,
    msg: &'static str,
    input: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    ctx: Option<Value>,
}

/// What the reference answers to a body where we say `error`.
pub fn answer(body: &[u8], error: &Error) -> Response {
    let Some(complaint) = complaint(body) else {
        let mut response = Json("error").into_response();
        response.extensions_mut().insert(Outcome(error.code));
        return response;
    };
    detail(StatusCode::UNPROCESSABLE_ENTITY, &[complaint], error.code)
}

/// FastAPI's answer to an invalid request.
pub fn detail(status: StatusCode, what: &(impl Serialize + ?Sized), code: Code) -> Response {
    #[derive(Serialize)]
    struct Detail<'a, T: ?Sized> {
        detail: &'a T,
    }
    let mut response = (status, Json(Detail { detail: what })).into_response();
    response.extensions_mut().insert(Outcome(code));
    response
}

/// What is wrong with a body before anyone looks into it.
fn complaint(body: &[u8]) -> Option<Complaint> {
    // What has no encoding is no JSON either, and is found to be none below.
    let body = &*standard(body).unwrap_or(body.into());
    let (mut loc, mut ctx) = (vec![json!("body")], None);
    let (r#type, msg, input) = if body.is_empty() {
        ("missing", "Field required", Value::Null)
    } else if let Err(why) = serde_json::from_slice::<IgnoredAny>(body) {
        loc.push(offset(body, &why).into());
        ctx = Some(json!({ "error": "Expecting value" }));
        ("json_invalid", "JSON decode error", json!({}))
    } else if body.trim_ascii_start().first() != Some(&b'{') {
        let echo = Some(body).filter(|body| body.len() <= MAX_ECHO);
        let input = echo.and_then(|body| serde_json::from_slice(body).ok()).unwrap_or_default();
        ("dict_type", "Input should be a valid dictionary", input)
    } else {
        return None;
    };
    Some(Complaint { r#type, loc, msg, input, ctx })
}

/// Where a JSON text stops being one, in bytes.
fn offset(body: &[u8], why: &serde_json::Error) -> usize {
    let lines = body.split_inclusive(|byte| *byte == b'\n');
    let before: usize = lines.take(why.line().saturating_sub(1)).map(<[u8]>::len).sum();
    (before + why.column()).saturating_sub(1)
}
