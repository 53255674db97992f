//! A file of a recorded episode, in place of a sound one: words, or as many actions, states and pictures.
#![no_main]

mod common;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use openvla_doctor::episode::Episode;
use openvla_doctor::input::Picture;
use openvla_doctor::judgments::Judgments;

/// Files of an episode whose actions are in `actions.csv`.
const FILES: [&str; 6] =
    ["actions.csv", "states.jsonl", "states.csv", "states.npy", "instruction.txt", "frames/0.png"];
/// Files of one that has none.
const ACTIONS: [&str; 2] = ["actions.jsonl", "actions.npy"];
const KEPT: &str = "kept.jsonl";

fn folder(name: &str, actions: &str) -> PathBuf {
    let folder = common::folder(name, &[]);
    std::fs::create_dir_all(folder.join("frames")).expect("memory");
    for i in 0..2 {
        let image = openvla::image::RgbImage::from_fn(8, 8, |x, y| [x as u8, y as u8, i].into());
        image.save(folder.join(format!("frames/{i}.png"))).expect("memory");
    }
    if !actions.is_empty() {
        std::fs::write(folder.join("actions.csv"), actions).expect("memory");
        assert_eq!(Episode::open(&folder).expect("an episode").n(), 2);
    }
    folder
}

static WHOLE: LazyLock<PathBuf> = LazyLock::new(|| folder("whole", "0,0,1\n0,0,0\n"));
static WITHOUT: LazyLock<PathBuf> = LazyLock::new(|| folder("without", ""));

fn look(folder: &Path) {
    let Ok(episode) = Episode::open(folder) else { return };
    let n = episode.n();
    assert!(n > 0 && episode.frames.len() == n);
    assert!(episode.states.as_ref().is_none_or(|states| states.len() == n));
    assert!(episode.actions.iter().flatten().all(|x| x.is_finite()));
    for i in episode.moments(3) {
        if let Ok(seen) = episode.seen(i) {
            seen.hash();
            for (path, image) in episode.frames[i].iter().zip(&seen.images) {
                assert!(!format!("{:?}", Picture::of(path, image)).is_empty());
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    match usize::from(*which) % (FILES.len() + ACTIONS.len() + 1) {
        i if i < FILES.len() => {
            common::with_file(&WHOLE.join(FILES[i]), bytes, || look(&WHOLE));
        }
        i if i < FILES.len() + ACTIONS.len() => {
            let name = ACTIONS[i - FILES.len()];
            common::with_file(&WITHOUT.join(name), bytes, || look(&WITHOUT));
        }
        _ => {
            // The first line is this examination's.
            let path = WITHOUT.join(KEPT);
            drop(Judgments::open(&path, "an examination"));
            let first = std::fs::read(&path).expect("memory");
            std::fs::write(&path, [&first, bytes].concat()).expect("memory");
            if let Ok(judgments) = Judgments::open(&path, "an examination") {
                judgments.of(0, "");
            }
            std::fs::remove_file(path).expect("memory");
        }
    }
});
