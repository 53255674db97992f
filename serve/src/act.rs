//! The reference's protocol: `POST /act`, an array of json_numpy in, one out.
//!
//! in   `{"image": array, "instruction": text, "unnorm_key": text or null}`, or that as JSON within
//!      JSON: `{"encoded": text}`
//! out  an array of the motion's doubles; for `encoded`, as JSON within JSON
//!
//! With an OpenVLA-OFT model it is that one's:
//!
//! in   `{"full_image": array, "…wrist…": array, …, "state": array or list, "instruction": text, "n_actions": number}`
//! out  a list of arrays, one for each action
//!
//! ref: `vla-scripts/deploy.py` of openvla and of openvla-oft, served by FastAPI

use std::borrow::Cow;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use crate::app::App;
use crate::compat;
use crate::error::{Code, Error};
use crate::field::Field;
use crate::json::standard;
use crate::message::{Message, Named, Schema};
use crate::numpy::{self, Convention, Ndarray};
use crate::observation::{Answer, Observation};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Double<'a> {
    #[serde(borrow)]
    encoded: Cow<'a, str>,
}

/// ref: openvla-oft `vla-scripts/deploy.py`, which takes no `unnorm_key` from clients
static OFT: Schema = Schema {
    image: &["full_image"],
    wrists: true,
    cameras: false,
    instruction: &["instruction"],
    options: &["state", "n_actions", "encoded"],
    hint: "`full_image` and what has `wrist` in its name are arrays of json_numpy, {\"__numpy__\": base64, \"dtype\": \
           \"|u1\", \"shape\": [height, width, 3]}, `state` is such an array or a list of numbers, and `instruction` is \
           text; a PNG or JPEG goes to /v1/act",
};

static SCHEMA: Schema = Schema {
    image: &["image"],
    wrists: false,
    cameras: false,
    instruction: &["instruction"],
    options: &["unnorm_key", "encoded"],
    hint: "`image` is an array of json_numpy, {\"__numpy__\": base64, \"dtype\": \"|u1\", \"shape\": \
           [height, width, 3]}, and `instruction` is text; a Python client calls json_numpy.patch() \
           before it sends arrays, and a PNG or JPEG goes to /v1/act",
};

/// Whether the body is JSON within JSON, and so is the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Plain,
    Double,
}

/// `POST /act`.
pub async fn act(State(app): State<Arc<App>>, request: Request) -> Response {
    let meta = app.meta(&request);
    let body = match app.body(request).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let max_pixels = app.settings.max_pixels;
    let (bytes, n) = (body.clone(), body.len());
    let n_camera =
        app.engine.model().filter(|model| model.oft.is_some()).map(|model| model.n_camera());
    let answer = async {
        let meta = meta?;
        let (observation, encoding) =
            app.read(&meta, n, move || decode(&bytes, n_camera, max_pixels)).await?;
        Ok((app.act("act", observation, meta).await?, encoding))
    };
    match answer.await {
        Ok((answer, encoding)) => encode(&answer, n_camera.is_some(), encoding),
        Err(error) if app.settings.compat_errors => compat::answer(&body, &error),
        Err(error) => error.into_response(),
    }
}

/// `n_camera` is of an OpenVLA-OFT model.
fn decode(
    body: &[u8],
    n_camera: Option<usize>,
    max_pixels: usize,
) -> Result<(Observation, Encoding), Error> {
    let body = &*standard(body)?;
    let observation = |json: &[u8]| match n_camera {
        Some(n) => oft_observation(json, n, max_pixels),
        None => observation(json, max_pixels),
    };
    // Fails at the first other key, so it costs nothing elsewhere.
    if let Ok(Double { encoded }) = serde_json::from_slice(body) {
        let encoded = standard(encoded.as_bytes())?;
        return Ok((observation(&encoded)?, Encoding::Double));
    }
    Ok((observation(body)?, Encoding::Plain))
}

fn message<'a>(schema: &'static Schema, json: &'a [u8]) -> Result<Message<'a>, Error> {
    let mut message = Message::from_json(schema, json)?;
    if message.option("encoded", |_, _| Ok(()))?.is_some() {
        let wrong = "`encoded` is JSON as text, and the only key where it is given";
        return Err(Error::bad_request(wrong));
    }
    Ok(message)
}

fn oft_observation(json: &[u8], n_camera: usize, max_pixels: usize) -> Result<Observation, Error> {
    let mut message = message(&OFT, json)?;
    let image = |(name, field): Named<'_>| {
        let array = field.array(&name).map_err(|error| error.hint(OFT.hint))?;
        array.image(Convention::Rgb, max_pixels)
    };
    let full = image(message.image()?)?;
    // ref: `get_vla_action`, which does not look at them where the model has one camera
    let wrists = if n_camera > 1 { message.wrists() } else { Vec::new() };
    let wrists = wrists.into_iter().map(image).collect::<Result<_, _>>()?;
    let state = message.option("state", Field::numbers)?;
    let n_actions = message.option("n_actions", Field::integer)?;
    let observation = Observation::new(full, message.instruction()?, None)?;
    Ok(Observation { wrists, state, n_actions, ..observation })
}

fn observation(json: &[u8], max_pixels: usize) -> Result<Observation, Error> {
    let mut message = message(&SCHEMA, json)?;
    let (name, image) = message.image()?;
    let image = image.array(&name).map_err(|error| error.hint(SCHEMA.hint))?;
    let instruction = message.instruction()?;
    let unnorm_key = message.option("unnorm_key", Field::text)?;
    Observation::new(image.image(Convention::Pillow, max_pixels)?, instruction, unnorm_key)
}

fn encode(answer: &Answer, is_chunk: bool, encoding: Encoding) -> Response {
    let array = |action: &Vec<f64>| numpy::Json(Ndarray::of_f64(action, vec![action.len()]));
    let json = if is_chunk {
        serde_json::to_string(&answer.actions.iter().map(array).collect::<Vec<_>>())
    } else {
        serde_json::to_string(&array(&answer.action))
    };
    let json = json.expect("strings and numbers");
    let body = match encoding {
        Encoding::Plain => json,
        // Python's `json.dumps` has spaces, and the reference's bytes are to be had exactly.
        Encoding::Double => {
            let json = json.replace("\":", "\": ").replace(",\"", ", \"").replace(",{", ", {");
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
        ("x-openvla-unnorm-key", answer.unnorm_key.clone()),
        ("x-openvla-fingerprint", answer.fingerprint.clone()),
    ];
    if !tokens.is_empty() {
        notes.push(("x-openvla-tokens", list(&tokens)));
    }
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
    if app.settings.compat_errors {
        compat::detail(error.code.status(), &detail, error.code)
    } else {
        error.into_response()
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
        let (a, encoding) = decode(plain.as_bytes(), None, 100).unwrap();
        assert_eq!((a.image.as_raw().as_slice(), encoding), (&[0, 1, 2][..], Encoding::Plain));
        let (b, encoding) = decode(double.as_bytes(), None, 100).unwrap();
        assert_eq!((a.image, a.instruction, encoding), (b.image, b.instruction, Encoding::Double));
    }

    #[test]
    fn what_nothing_reads_may_be_what_python_writes() {
        let body =
            format!(r#"{{"image": {IMAGE}, "instruction": "x", "state": [NaN, -Infinity]}}"#);
        let (a, _) = decode(body.as_bytes(), None, 100).unwrap();
        assert_eq!((a.image.as_raw().as_slice(), a.unnorm_key), (&[0, 1, 2][..], None));
        let double = serde_json::json!({ "encoded": body }).to_string();
        assert!(decode(double.as_bytes(), None, 100).is_ok());
        let wide: Vec<u8> = body.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(decode(&[b"\xff\xfe", &wide[..]].concat(), None, 100).is_ok());
        let text = r#"{"__numpy__": "eAAAAA==", "dtype": "<U1", "shape": []}"#;
        let body = format!(r#"{{"image": {IMAGE}, "instruction": {text}, "unnorm_key": {text}}}"#);
        let (a, _) = decode(body.as_bytes(), None, 100).unwrap();
        assert_eq!((a.instruction.as_str(), a.unnorm_key.as_deref()), ("x", Some("x")));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let code = |body: &str| decode(body.as_bytes(), None, 100).map(|_| ()).unwrap_err();
        assert_eq!(code("").code, Code::BadJson);
        assert_eq!(code("{\"image\":").code, Code::BadJson);
        let keys = code(r#"{"full_image": 1, "instruction": "x"}"#);
        assert!(keys.message.contains("no `image`; what is not read: `full_image`"), "{keys}");
        let both = format!(r#"{{"encoded": 1, "image": {IMAGE}, "instruction": "x"}}"#);
        assert!(code(&both).message.contains("the only key"));
        assert!(code(r#"{"encoded": "{}", "x": 1}"#).message.contains("the only key"));
        for (image, found) in [
            ("[[[0, 1, 2]]]", "a list of other things than numbers"),
            (r#""AAEC""#, "text"),
            ("NaN", "a boolean, or NaN"),
            ("{}", "a map"),
            (r#"{"__numpy__": "AAEC", "dtype": "|u1"}"#, "an array without `shape`"),
        ] {
            let error = code(&format!(r#"{{"image": {image}, "instruction": "x"}}"#));
            assert!(error.message.starts_with(&format!("`image` is {found}; ")), "{error}");
            assert!(error.hint.unwrap().contains("json_numpy.patch()"));
        }
        for instruction in ["NaN", "null", "[\"x\"]", "3"] {
            let error = code(&format!(r#"{{"image": {IMAGE}, "instruction": {instruction}}}"#));
            assert!(error.message.contains("`instruction`"), "{error}");
        }
        let values = format!(r#"[{IMAGE}, "x", null, null]"#);
        assert!(code(&values).message.contains("a map with `image` and `instruction`"));
        let text = format!(r#"{{"image": {}, "instruction": "x"}}"#, IMAGE.replace("AAEC", "?"));
        assert!(code(&text).message.contains("not base64"));
    }
}
