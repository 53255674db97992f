//! A sound model file with some bytes changed, through opening and one step: words, or a motion that is finite.
#![no_main]

mod common;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla::image::RgbImage;
use openvla::oft::Observation;
use openvla::{Options, Policy};

static MODELS: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    ["example.gguf", "tabletop-oft.gguf"]
        .map(|name| std::fs::read(common::example(name)).expect("an example"))
});
static PATH: LazyLock<PathBuf> = LazyLock::new(|| common::folder("edited", &[]).join("model.gguf"));
static IMAGE: LazyLock<RgbImage> =
    LazyLock::new(|| RgbImage::from_fn(84, 84, |x, y| [x as u8, y as u8, 99].into()));

// Which model, then edits.
fuzz_target!(|input: &[u8]| {
    let Some((which, edits)) = input.split_first() else { return };
    let bytes = common::edited(&MODELS[usize::from(which & 1)], edits);
    std::fs::write(&*PATH, &bytes).expect("memory");
    let mut options = Options::default();
    options.n_threads = 1;
    match Policy::open(&*PATH, &options) {
        Ok(Policy::OpenVla(mut policy)) => {
            let key = policy.config().statistics.first().0.to_owned();
            if let Ok(action) = policy.act(&IMAGE, "lift it", Some(&key)) {
                assert!(action.normalized.iter().all(|x| x.is_finite()));
            }
        }
        Ok(Policy::Oft(mut policy)) => {
            let (key, state) =
                (policy.config().statistics.first().0.to_owned(), vec![0.0; policy.oft().n_state]);
            let images = vec![&*IMAGE; policy.oft().cameras.len()];
            let seen = Observation { images: &images, state: Some(&state) };
            if let Ok(chunk) = policy.act(&seen, "lift it", Some(&key)) {
                assert!(chunk.normalized.iter().flatten().all(|x| x.is_finite()));
            }
        }
        Err(_) => {}
    }
});
