//! What a robot sends, in JSON and msgpack: an error of the protocol, or a picture within the limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use openvla_serve::json;
use openvla_serve::message::{Message, Schema};
use openvla_serve::numpy::Convention;
use openvla_serve::vla_frame::{Draft, Head, Wishes};

static SCHEMA: Schema = Schema {
    image: &["image", "observation/image"],
    wrists: true,
    cameras: true,
    instruction: &["instruction", "prompt"],
    options: &["unnorm_key", "state", "n_actions"],
    hint: "an object",
};

fn look(message: Result<Message<'_>, openvla_serve::error::Error>) {
    let Ok(mut message) = message else { return };
    let _ = message.instruction();
    let _ = message.option("unnorm_key", |field, name| field.text(name));
    let _ = message.option("state", |field, name| field.numbers(name));
    let _ = message.option("n_actions", |field, name| field.integer(name));
    let fields = [message.image().ok()].into_iter().flatten().chain(message.wrists());
    for (name, field) in fields {
        if let Ok(image) =
            field.array(&name).and_then(|array| array.image(Convention::OpenPi, 1 << 16))
        {
            assert!(image.width() as usize * image.height() as usize <= 1 << 16);
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(body) = json::standard(bytes) {
        look(Message::from_json(&SCHEMA, &body));
    }
    look(Message::from_msgpack(&SCHEMA, bytes));
    let _ = Head::read(bytes);
    if let Ok(draft) = Draft::read(bytes, &Wishes::default(), None, 1 << 16)
        && let Ok(seen) = draft.decode(1 << 16)
    {
        assert!(seen.image.width() as usize * seen.image.height() as usize <= 1 << 16);
    }
});
