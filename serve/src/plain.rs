//! The plain protocol, for all other clients: `POST /v1/act`, an image file in, a JSON object out.
//!
//! in   JSON `{"image": base64 of a PNG or JPEG, "instruction": text, "unnorm_key": text}`, or
//!      multipart/form-data with the same fields, `image` being the file itself
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
use crate::message::{Message, Schema};
use crate::observation::{Answer, Observation};

static SCHEMA: Schema = Schema {
    image: &["image"],
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
    let draft = match kind.as_str() {
        "application/json" => {
            let body = app.body(request).await?;
            let n = body.len();
            app.read(&meta, n, move || Draft::new(from_json(&body)?)).await?
        }
        "multipart/form-data" => {
            let body = app.body(request).await?;
            let n = body.len();
            let fields = fields(&headers, body).await?;
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
    app.act(observation, meta).await
}

fn from_json(body: &[u8]) -> Result<Fields, Error> {
    let json = standard(body)?;
    let mut message = Message::from_json(&SCHEMA, &json)?;
    let (name, image) = message.image()?;
    let file = image.file(&name).map_err(|error| error.hint(SCHEMA.hint))?;
    Ok(Fields {
        image: Some(file.into()),
        instruction: Some(message.instruction()?),
        unnorm_key: message.option("unnorm_key", Field::text)?,
    })
}

/// The parts of a form.
#[derive(Default)]
struct Fields {
    image: Option<Bytes>,
    instruction: Option<String>,
    unnorm_key: Option<String>,
}

async fn fields(headers: &HeaderMap, body: Bytes) -> Result<Fields, Error> {
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
            _ => {}
        }
    }
    Ok(fields)
}

/// An observation whose image was checked, but not decoded yet.
struct Draft {
    file: Bytes,
    /// The cost of decoding it.
    samples: u64,
    instruction: String,
    unnorm_key: Option<String>,
}

impl Draft {
    fn new(fields: Fields) -> Result<Self, Error> {
        let missing = |name| Error::bad_request(format!("the form has no field `{name}`"));
        let file = fields.image.ok_or_else(|| missing("image"))?;
        let instruction = fields.instruction.ok_or_else(|| missing("instruction"))?;
        let samples = Header::read(&file).map_err(refused)?.samples;
        Ok(Self { file, samples, instruction, unnorm_key: fields.unnorm_key })
    }

    fn decode(self, max_pixels: usize) -> Result<Observation, Error> {
        let image = openvla::decode_within(&self.file, max_pixels).map_err(refused)?;
        Observation::new(image, self.instruction, self.unnorm_key)
    }
}

/// A picture that cannot be used. A decoder's panic is for its authors, so it is logged, too.
fn refused(error: openvla::Error) -> Error {
    if let openvla::Error::Decoder { why } = &error {
        tracing::error!(why, "a decoder panicked");
    }
    error.into()
}
