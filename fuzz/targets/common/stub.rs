//! A model for what is around it: the same motion for whatever it sees.

use openvla::prompt::{OPENVLA, Prompt};
use openvla::{
    ActionSpace, Bounds, OftConfig, OftHead, Preprocess, Profile, Resize, Session, Statistics,
    Timing,
};
use openvla_serve::observation::{Draft, Motion, Observation};
use openvla_serve::policy::{ModelInfo, Policy};

/// The model: an OpenVLA, or an OpenVLA-OFT of three cameras and a state.
#[derive(Debug, Clone, Copy)]
pub struct Stub {
    pub is_oft: bool,
}

/// Statistics of one data set of seven numbers.
const STATISTICS: &str = r#"{"tabletop": {"action": {
    "q01": [-0.1, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1], "q99": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]}}}"#;

impl Policy for Stub {
    fn info(&self) -> ModelInfo {
        let preprocess = Preprocess {
            profile: Profile::Raw,
            center_crop: false,
            size: 28,
            resize: Resize::Naive,
            towers: Vec::new(),
        };
        let oft = OftConfig {
            chunk: 4,
            n_action: 7,
            n_state: 3,
            cameras: ["full_image", "left_wrist_image", "right_wrist_image"]
                .map(String::from)
                .into(),
            bounds: Bounds::Quantiles,
            head: OftHead::L1,
            film: false,
        };
        ModelInfo {
            name: "a stub".into(),
            file: "stub.gguf".into(),
            fingerprint: "0".into(),
            image_size: preprocess.size,
            preprocess: Some(preprocess.clone()),
            shown: preprocess,
            actions: ActionSpace { end: 32_000, n_bin: 256 },
            oft: self.is_oft.then_some(oft),
            prompt: Some(Prompt::new(OPENVLA.into(), 29_871).expect("the reference's")),
            statistics: Statistics::parse(STATISTICS.to_owned()).expect("statistics"),
            memory: Vec::new(),
            scratch: 0,
        }
    }

    fn act(
        &mut self,
        _: &mut Session,
        _: &Observation,
        key: Option<&str>,
    ) -> openvla::Result<Motion> {
        let info = self.info();
        let (key, _) = info.statistics.select(key)?;
        let n = info.oft.as_ref().map_or(1, |oft| oft.chunk);
        Ok(Motion {
            normalized: vec![vec![0.5; 7]; n],
            actions: vec![vec![0.05; 7]; n],
            tokens: vec![31_872; 7],
            logits: Vec::new(),
            unnorm_key: key.to_owned(),
            unconstrained: (vec![31_872; 7], true),
            draft: Draft::default(),
            timing: Timing::default(),
        })
    }
}
