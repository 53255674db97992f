//! The plain protocol, for all other clients: `POST /v1/act`, an image file in, a JSON object out.
//!
//! in   JSON `{"image": base64 of a PNG or JPEG, "instruction": text, "unnorm_key": text}`, or
//!      multipart/form-data with the same fields, `image` being the file itself
//! An OpenVLA-OFT model is also sent files with `wrist` in their names, in the order that it was trained with, and
//! `state`, a list of numbers; `n_actions` asks for the first actions of a chunk. Other models do not look at them.
//!
//! out  [`crate::observation::Answer`]

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use openvla::Header;

use crate::app::App;
use crate::error::{Code, Error};
use crate::field::Field;
use crate::json::standard;
use crate::message::{Message, Named, Schema};
use crate::observation::{Answer, Observation};

/// What an OpenVLA-OFT model is sent.
static OFT: Schema = Schema {
    image: &["image", "full_image"],
    wrists: true,
    options: &["unnorm_key", "state", "n_actions"],
    ..OPENVLA
};

static SCHEMA: Schema = OPENVLA;

const OPENVLA: Schema = Schema {
    image: &["image"],
    wrists: false,
    cameras: false,
    instruction: &["instruction"],
    options: &["unnorm_key"],
    hint: "`image` is a PNG or JPEG file in base64, as base64.b64encode(bytes).decode() writes it, and \
           `instruction` is text; arrays of json_numpy go to /act",
};

/// `POST /v1/act`.
pub async fn act(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request).await.map(Json).into_response()
}

async fn answer(app: &Arc<App>, request: Request) -> Result<Answer, Error> {
    let meta = app.meta(&request)?;
    let headers = request.headers().clone();
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or("").trim().to_lowercase();
    let is_oft = app.engine.model().is_some_and(|model| model.oft.is_some());
    let draft = match kind.as_str() {
        "application/json" => {
            let body = app.body(request).await?;
            let n = body.len();
            app.read(&meta, n, move || Draft::new(from_json(&body, is_oft)?)).await?
        }
        "multipart/form-data" => {
            let body = app.body(request).await?;
            let n = body.len();
            let fields = fields(&headers, body, is_oft).await?;
            app.read(&meta, n, move || Draft::new(fields)).await?
        }
        other => {
            let message = format!("the body is `{other}`");
            let hint = "application/json or multipart/form-data";
            return Err(Error::new(Code::UnsupportedMediaType, message).hint(hint));
        }
    };
    let max_pixels = app.settings.max_pixels;
    let observation = app.decode(&meta, draft.samples, move || draft.decode(max_pixels)).await?;
    app.act("plain", observation, meta).await
}

fn from_json(body: &[u8], is_oft: bool) -> Result<Fields, Error> {
    let json = standard(body)?;
    let mut message = Message::from_json(if is_oft { &OFT } else { &SCHEMA }, &json)?;
    let file = |(name, field): Named<'_>| {
        field.file(&name).map(Bytes::from).map_err(|error| error.hint(SCHEMA.hint))
    };
    let image = file(message.image()?)?;
    Ok(Fields {
        image: Some(image),
        wrists: message.wrists().into_iter().map(file).collect::<Result<_, _>>()?,
        state: message.option("state", Field::numbers)?,
        n_actions: message.option("n_actions", Field::integer)?,
        instruction: Some(message.instruction()?),
        unnorm_key: message.option("unnorm_key", Field::text)?,
    })
}

/// The parts of a form.
#[derive(Default)]
struct Fields {
    image: Option<Bytes>,
    wrists: Vec<Bytes>,
    state: Option<Vec<f64>>,
    n_actions: Option<u64>,
    instruction: Option<String>,
    unnorm_key: Option<String>,
}

async fn fields(headers: &HeaderMap, body: Bytes, is_oft: bool) -> Result<Fields, Error> {
    let mut whole = Request::new(Body::from(body));
    *whole.headers_mut() = headers.clone();
    DefaultBodyLimit::disable().apply(&mut whole); // it is here already
    let wrong = |why: &dyn std::fmt::Display| Error::bad_request(format!("the form: {why}"));
    let mut form = Multipart::from_request(whole, &()).await.map_err(|why| wrong(&why))?;
    let mut fields = Fields::default();
    while let Some(field) = form.next_field().await.map_err(|why| wrong(&why.body_text()))? {
        let name = field.name().unwrap_or_default().to_owned();
        let bytes = field.bytes().await.map_err(|why| wrong(&why.body_text()))?;
        let text = || {
            let no_text = |_| Error::bad_request(format!("the form: `{name}` is no UTF-8"));
            String::from_utf8(bytes.to_vec()).map_err(no_text)
        };
        match name.as_str() {
            "image" => fields.image = Some(bytes),
            "instruction" => fields.instruction = Some(text()?),
            "unnorm_key" => fields.unnorm_key = Some(text()?),
            "full_image" if is_oft => fields.image = Some(bytes),
            "state" if is_oft => {
                fields.state = Some(number_field(&text()?, &name, Field::numbers)?)
            }
            "n_actions" if is_oft => {
                fields.n_actions = Some(number_field(&text()?, &name, Field::integer)?);
            }
            wrist if is_oft && wrist.contains("wrist") => fields.wrists.push(bytes),
            _ => {}
        }
    }
    Ok(fields)
}

/// A part of a form that holds JSON: a number, or a list of such.
fn number_field<'a, T>(
    text: &'a str,
    name: &str,
    read: impl FnOnce(Field<'a>, &str) -> Result<T, Error>,
) -> Result<T, Error> {
    let wrong = |why| Error::bad_request(format!("the form: `{name}` is not JSON: {why}"));
    read(serde_json::from_str(text).map_err(wrong)?, name)
}

/// An observation whose image was checked, but not decoded yet.
struct Draft {
    file: Bytes,
    wrists: Vec<Bytes>,
    state: Option<Vec<f64>>,
    n_actions: Option<u64>,
    /// The cost of decoding them.
    samples: u64,
    instruction: String,
    unnorm_key: Option<String>,
}

impl Draft {
    fn new(fields: Fields) -> Result<Self, Error> {
        let missing = |name| Error::bad_request(format!("the form has no field `{name}`"));
        let file = fields.image.ok_or_else(|| missing("image"))?;
        let instruction = fields.instruction.ok_or_else(|| missing("instruction"))?;
        let mut samples: u64 = 0;
        for file in [&file].into_iter().chain(&fields.wrists) {
            samples = samples.saturating_add(Header::read(file).map_err(refused)?.samples);
        }
        let Fields { wrists, state, n_actions, unnorm_key, .. } = fields;
        Ok(Self { file, wrists, state, n_actions, samples, instruction, unnorm_key })
    }

    fn decode(self, max_pixels: usize) -> Result<Observation, Error> {
        let decode = |file: &Bytes| openvla::decode_within(file, max_pixels).map_err(refused);
        let observation = Observation::new(decode(&self.file)?, self.instruction, self.unnorm_key)?;
        let wrists = self.wrists.iter().map(decode).collect::<Result<_, _>>()?;
        Ok(Observation { wrists, state: self.state, n_actions: self.n_actions, ..observation })
    }
}

/// A picture that cannot be used. A decoder's panic is for its authors, so it is logged, too.
pub fn refused(error: openvla::Error) -> Error {
    if let openvla::Error::Decoder { why } = &error {
        tracing::error!(why, "a decoder panicked");
    }
    error.into()
}
