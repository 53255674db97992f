//! What a robot sends in one message, in JSON and msgpack, openpi's and vla-eval's frames among them: an error of the
//! protocol, or pictures within the limit.
#![no_main]

#[path = "common/stub.rs"]
mod stub;

use std::sync::LazyLock;

use axum::extract::Query;
use axum::http::Uri;
use libfuzzer_sys::fuzz_target;
use openvla_serve::message::{Message, Schema};
use openvla_serve::numpy::Convention;
use openvla_serve::observation::Observation;
use openvla_serve::policy::{ModelInfo, Policy};
use openvla_serve::vla_frame::{Draft, Head, Hello, Wishes};
use openvla_serve::{json, openpi};
use stub::Stub;

const MAX_PIXELS: usize = 1 << 16;

static SCHEMA: Schema = Schema {
    image: &["image", "observation/image"],
    wrists: true,
    cameras: true,
    instruction: &["instruction", "prompt"],
    options: &["unnorm_key", "state", "n_actions"],
    hint: "an object",
};

static MODELS: LazyLock<[ModelInfo; 2]> =
    LazyLock::new(|| [false, true].map(|is_oft| Stub { is_oft }.info()));

fn look(message: Result<Message<'_>, openvla_serve::error::Error>) {
    let Ok(mut message) = message else { return };
    let _ = message.instruction();
    let _ = message.option("unnorm_key", |field, name| field.text(name));
    let _ = message.option("state", |field, name| field.numbers(name));
    let _ = message.option("n_actions", |field, name| field.integer(name));
    let fields = [message.image().ok()].into_iter().flatten().chain(message.wrists());
    for (name, field) in fields {
        if let Ok(image) =
            field.array(&name).and_then(|array| array.image(Convention::OpenPi, MAX_PIXELS))
        {
            assert!(image.width() as usize * image.height() as usize <= MAX_PIXELS);
        }
    }
}

fn check(seen: &Observation) {
    for image in [&seen.image].into_iter().chain(&seen.wrists) {
        assert!((1..=MAX_PIXELS).contains(&(image.width() as usize * image.height() as usize)));
    }
}

// What an URL asks for, up to the end of the line, then the message.
fuzz_target!(|input: &[u8]| {
    let (query, bytes) = match input.iter().position(|byte| *byte == b'\n') {
        Some(end) if input[0] == b'?' => (&input[1..end], &input[end + 1..]),
        _ => (&b""[..], input),
    };
    let uri = Uri::try_from([&b"/vla-eval?"[..], query].concat());
    let wishes = uri.ok().and_then(|uri| Query::<Wishes>::try_from_uri(&uri).ok());
    let wishes = wishes.map(|Query(wishes)| wishes).unwrap_or_default();
    if let Ok(body) = json::standard(bytes) {
        look(Message::from_json(&SCHEMA, &body));
    }
    look(Message::from_msgpack(&SCHEMA, bytes));
    let _ = Head::read(bytes);
    for model in &*MODELS {
        if let Ok((seen, _)) = openpi::observation(bytes, model.oft.is_some(), MAX_PIXELS) {
            check(&seen);
        }
        Hello::new(model, Some(&wishes), None);
        if let Ok(draft) = Draft::read(bytes, &wishes, Some(model), MAX_PIXELS)
            && let Ok(seen) = draft.decode(MAX_PIXELS)
        {
            assert!(seen.wrists.len() < model.n_camera());
            check(&seen);
        }
    }
});
