//! The reference's form: `POST /act`, an array of json_numpy in, one out.
//!
//! in   `{"image": array, "instruction": text, "unnorm_key": text or null}`, or that as JSON within
//!      JSON: `{"encoded": text}`
//! out  an array of the motion's doubles; for `encoded`, as JSON within JSON
//!
//! ref: `vla-scripts/deploy.py`, served by FastAPI

use std::borrow::Cow;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::compat;
use crate::error::{Code, Error};
use crate::numpy::{self, Layout, Ndarray};
use crate::observation::{Answer, Observation};
use crate::routes::App;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Double<'a> {
    #[serde(borrow)]
    encoded: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Payload<'a> {
    #[serde(borrow)]
    image: numpy::Json<'a>,
    instruction: String,
    unnorm_key: Option<String>,
    encoded: Option<IgnoredAny>,
}

/// Whether the body is JSON within JSON, and so is the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Plain,
    Double,
}

/// `POST /act`.
pub async fn act(State(app): State<Arc<App>>, request: Request) -> Response {
    let order = app.order(&request);
    let body = match app.body(request).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let max_pixels = app.settings.max_pixels;
    let (bytes, n) = (body.clone(), body.len());
    let answer = async {
        let order = order?;
        let (observation, encoding) =
            app.read(&order, n, move || decode(&bytes, max_pixels)).await?;
        Ok((app.engine.act(observation, order).await?, encoding))
    };
    match answer.await {
        Ok((answer, encoding)) => encode(&answer, encoding),
        Err(error) if app.settings.compat_errors => compat::answer(&body, &error),
        Err(error) => error.into_response(),
    }
}

fn decode(body: &[u8], max_pixels: usize) -> Result<(Observation, Encoding), Error> {
    // Fails at the first other key, so it costs nothing where it is not the form.
    if let Ok(Double { encoded }) = serde_json::from_slice(body) {
        return Ok((observation(encoded.as_bytes(), max_pixels)?, Encoding::Double));
    }
    Ok((observation(body, max_pixels)?, Encoding::Plain))
}

fn observation(json: &[u8], max_pixels: usize) -> Result<Observation, Error> {
    let payload: Payload<'_> = object(json)?;
    if payload.encoded.is_some() {
        return Err(Error::bad_request("`encoded` must be the only key where it is given"));
    }
    let image = payload.image.0.image(Layout::ChannelsLast, max_pixels)?;
    Observation::new(image, payload.instruction, payload.unnorm_key)
}

/// A JSON object of this kind.
///
/// # Errors
/// [`Code::BadJson`], [`Code::BadRequest`].
pub fn object<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Error> {
    match serde_json::from_slice(json) {
        // serde would take a list of the fields' values, too.
        Ok(_) if json.trim_ascii_start().first() != Some(&b'{') => {
            Err(Error::bad_request("the body is no object"))
        }
        Ok(object) => Ok(object),
        Err(why) if why.is_data() => Err(Error::bad_request(why.to_string())),
        Err(why) => Err(Error::new(Code::BadJson, format!("the body is not JSON: {why}"))),
    }
}

fn encode(answer: &Answer, encoding: Encoding) -> Response {
    let array = numpy::Json(Ndarray::of_f64(&answer.action, vec![answer.action.len()]));
    let json = serde_json::to_string(&array).expect("strings and numbers");
    let body = match encoding {
        Encoding::Plain => json,
        // Python's `json.dumps` has spaces, and the reference's bytes are to be had exactly.
        Encoding::Double => {
            let json = json.replace("\":", "\": ").replace(",\"", ", \"");
            serde_json::to_string(&json).expect("a string")
        }
    };
    let mut response = ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    for (name, value) in notes(answer) {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
    response
}

/// What the body has no room for.
fn notes(answer: &Answer) -> Vec<(&'static str, String)> {
    let list = |numbers: &[usize]| {
        let texts: Vec<String> = numbers.iter().map(ToString::to_string).collect();
        texts.join(",")
    };
    let tokens: Vec<usize> = answer.tokens.iter().map(|token| *token as usize).collect();
    let times = answer.timing_ms;
    let mut notes = vec![
        ("server-timing", format!("queue;dur={:.3}, step;dur={:.3}", times.queue, times.step)),
        ("x-openvla-tokens", list(&tokens)),
        ("x-openvla-unnorm-key", answer.unnorm_key.clone()),
    ];
    for (name, dimensions) in [
        ("x-openvla-clamped", &answer.safety.clamped),
        ("x-openvla-limited", &answer.safety.limited),
    ] {
        if !dimensions.is_empty() {
            notes.push((name, list(dimensions)));
        }
    }
    notes.extend(answer.warning.map(|warning| ("x-openvla-warning", warning.to_owned())));
    notes.extend(answer.seq.map(|seq| ("x-seq", seq.to_string())));
    notes
}

/// There is no such route.
pub async fn not_found(State(app): State<Arc<App>>, request: Request) -> Response {
    let path = request.uri().path();
    let error = Error::new(Code::NotFound, format!("there is no {path}; see /openapi.json"));
    refuse(&app, error, "Not Found")
}

/// The route takes another method.
pub async fn method_not_allowed(State(app): State<Arc<App>>, request: Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{path} does not take {method}; see /openapi.json");
    refuse(&app, Error::new(Code::MethodNotAllowed, message), "Method Not Allowed")
}

fn refuse(app: &App, error: Error, detail: &'static str) -> Response {
    match app.settings.compat_errors {
        true => compat::detail(error.code.status(), &detail, error.code),
        false => error.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: &str = r#"{"__numpy__": "AAEC", "dtype": "|u1", "shape": [1, 1, 3]}"#;

    #[test]
    fn both_encodings_hold_the_same_observation() {
        let plain = format!(r#"{{"image": {IMAGE}, "instruction": "x", "other": [1]}}"#);
        let double = serde_json::json!({ "encoded": plain }).to_string();
        let (a, encoding) = decode(plain.as_bytes(), 100).unwrap();
        assert_eq!((a.image.as_raw().as_slice(), encoding), (&[0, 1, 2][..], Encoding::Plain));
        let (b, encoding) = decode(double.as_bytes(), 100).unwrap();
        assert_eq!((a.image, a.instruction, encoding), (b.image, b.instruction, Encoding::Double));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let code = |body: &str| decode(body.as_bytes(), 100).map(|_| ()).unwrap_err();
        assert_eq!(code("").code, Code::BadJson);
        assert_eq!(code("{\"image\":").code, Code::BadJson);
        assert!(code(r#"{"instruction": "x"}"#).message.contains("missing field `image`"));
        assert!(code(r#"{"encoded": "{}", "x": 1}"#).message.contains("missing field `image`"));
        let both = format!(r#"{{"encoded": 1, "image": {IMAGE}, "instruction": "x"}}"#);
        assert!(code(&both).message.contains("the only key"));
        let list = code(r#"{"image": [[[0, 1, 2]]], "instruction": "x"}"#);
        assert!(list.message.contains("invalid type: sequence"), "{list}");
        let values = format!(r#"[{IMAGE}, "x", null, null]"#);
        assert!(code(&values).message.contains("no object"));
        let text = format!(r#"{{"image": {}, "instruction": "x"}}"#, IMAGE.replace("AAEC", "?"));
        assert!(code(&text).message.contains("no base64"));
    }
}
