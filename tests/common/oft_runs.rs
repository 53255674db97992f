//! The reference's OpenVLA-OFT runs beside the repository. Tests of several packages convert them.

#![allow(dead_code)] // each test binary uses its own part

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use openvla::Bounds;
use openvla_convert::oft::{Platform, RunOptions};
use openvla_convert::plan::Encoding;
use openvla_convert::{Conversion, Options};
use serde_json::Value;

/// The runs, and what the reference computed of them.
pub struct Runs {
    pub dir: PathBuf,
    pub index: Value,
}

impl Runs {
    pub fn open() -> Self {
        let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
        let mut found = above.map(|up| up.join("shared/golden/oft"));
        let dir = found.find(|path| path.is_dir()).expect("../shared/golden/oft");
        let text = std::fs::read(dir.join("cases.json")).unwrap();
        Self { dir, index: serde_json::from_slice(&text).unwrap() }
    }

    /// Converts a variant, from a folder in the published form.
    pub fn convert(&self, name: &str, encoding: &str, out: &Path) {
        self.convert_with(name, encoding.parse::<Encoding>().unwrap().into(), out);
    }

    /// The same with options of how.
    pub fn convert_with(&self, name: &str, mut options: Options, out: &Path) {
        let variant = &self.index["variants"][name];
        let files = tempfile::tempdir().unwrap();
        let (run, base) = (files.path().join("run"), files.path().join("base"));
        [&run, &base].iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
        let adapter = variant["lora_adapter"].as_str();
        for (name, from) in variant["files"].as_object().unwrap() {
            let is_base = name == "config.json" || name.starts_with("model");
            let to = if adapter.is_some() && is_base { &base } else { &run };
            symlink(self.dir.join(from.as_str().unwrap()), to.join(name)).unwrap();
        }
        if let Some(adapter) = adapter {
            symlink(self.dir.join(adapter), run.join("lora_adapter")).unwrap();
            options.base = Some(base);
        }
        let platform = |platform: &&Platform| platform.name() == variant["constants_platform"];
        let is_min_max = variant["normalization"] == "bounds";
        options.run = RunOptions {
            platform: Some(*Platform::ALL.iter().find(platform).unwrap()),
            chunk: Some(variant["chunk"].as_u64().unwrap() as usize),
            n_camera: Some(variant["num_images_in_input"].as_u64().unwrap() as usize),
            bounds: Some(if is_min_max { Bounds::Extremes } else { Bounds::Quantiles }),
        };
        let conversion = Conversion::new(&run, &options).unwrap();
        conversion.write(out, &indicatif::ProgressBar::hidden()).unwrap();
    }
}
