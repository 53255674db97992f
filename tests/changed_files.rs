//! A policy does not depend on its file once it is open: whoever changes or shortens the file changes no motion.

mod common;

use std::fs::File;
use std::path::Path;

use openvla::{Kernels, OpenVla, Options};

const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/example/openvla-tabletop");
const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/example/tabletop.png");

#[test]
fn motions_stay_the_same_when_the_file_is_overwritten_and_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let image = common::picture(Path::new(PICTURE));
    for encoding in ["F32", "BF16", "Q8_0", "Q4_K_M"] {
        let path = dir.path().join(format!("{encoding}.gguf"));
        for kernels in [Kernels::default(), Kernels::Ggml] {
            common::convert(Path::new(CHECKPOINT), encoding, &path);
            let mut options = Options::default();
            (options.n_threads, options.kernels) = (1, kernels);
            let mut policy = OpenVla::open(&path, &options).unwrap();
            let mut act = || policy.act(&image, "put eggplant into pot", None).unwrap();
            let before = act().tokens;
            let length = path.metadata().unwrap().len();
            std::fs::write(&path, vec![0; usize::try_from(length).unwrap()]).unwrap();
            assert_eq!(act().tokens, before, "{encoding}, {kernels:?}: overwritten with zeros");
            File::options().write(true).open(&path).unwrap().set_len(1).unwrap();
            assert_eq!(act().tokens, before, "{encoding}, {kernels:?}: cut off");
        }
    }
}
