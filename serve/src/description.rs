//! What the server serves: openpi's clients are told when they connect, others ask at `GET /v1/model`.

use serde::Serialize;

use crate::app::App;
use crate::policy::ModelInfo;

/// The description of a model for its clients.
#[derive(Debug, Serialize)]
pub struct Description<'a> {
    model: &'a str,
    /// What tells its file from others.
    fingerprint: &'a str,
    /// Sides of the square that pictures become, in pixels.
    image_size: u32,
    /// Actions of an answer.
    action_horizon: usize,
    /// Whose pictures an OpenVLA-OFT is shown, in its order.
    #[serde(skip_serializing_if = "Option::is_none")]
    cameras: Option<&'a [String]>,
    /// Numbers of the arm's state that an OpenVLA-OFT reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    state_length: Option<usize>,
    /// The data set whose units a client gets that names none.
    unnorm_key: Option<&'a str>,
    unnorm_keys: Vec<&'a str>,
}

impl<'a> Description<'a> {
    /// Of what `app` serves.
    pub fn new(app: &'a App, model: &'a ModelInfo) -> Self {
        let keys: Vec<&str> = model.statistics.datasets().keys().map(String::as_str).collect();
        let only = (keys.len() == 1).then(|| keys[0]);
        let oft = model.oft.as_ref();
        Self {
            model: &model.name,
            fingerprint: &model.fingerprint,
            image_size: model.image_size,
            action_horizon: oft.map_or(1, |oft| oft.chunk),
            cameras: oft.map(|oft| oft.cameras.as_slice()),
            state_length: oft.map(|oft| oft.n_state),
            unnorm_key: app.settings.unnorm_key.as_deref().or(only),
            unnorm_keys: keys,
        }
    }
}
