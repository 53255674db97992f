//! The policy of a server, in worlds of this process.

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use anyhow::{Result, anyhow, ensure};
use openvla::image::{ImageFormat, RgbImage};
use openvla_client::{Client, Model, Refusal, Server};

use crate::episode::Policy;
use crate::model::{check_arm, executed_of};
use crate::render::{picture, wrist_picture};
use crate::world::{Action, World};

/// A world that waits has time, even for a large model on a processor.
const DEADLINE_MS: u64 = 600_000;

/// Asks openvla-serve for each motion, or for each chunk of actions.
pub struct Remote {
    client: Client,
    model: Model,
    /// Actions of an answer that are made before it is asked again.
    executed: usize,
    seq: u64,
}

impl Remote {
    /// A robot of its own, whatever else asks the server. All actions of an answer are made where `executed` is left
    /// out.
    ///
    /// # Errors
    /// If the token's file cannot be read, the server does not answer, or its model wants another state or more
    /// cameras than there are, or gives fewer actions than `executed`.
    pub fn new(
        url: String,
        token_file: Option<PathBuf>,
        unnorm_key: Option<String>,
        executed: Option<usize>,
    ) -> Result<Self> {
        static ROBOTS: AtomicUsize = AtomicUsize::new(0);
        let robot = ROBOTS.fetch_add(1, Ordering::Relaxed);
        let client_id = format!("tabletop-{}-{robot}", std::process::id());
        let server = Server { url, token_file, unnorm_key, client_id, deadline_ms: DEADLINE_MS };
        let client = Client::new(server)?;
        let model = client.model().map_err(refused)?;
        if let Some(cameras) = &model.cameras {
            check_arm(model.state_length, cameras)?;
        }
        let executed = executed_of(model.action_horizon, executed)?;
        Ok(Self { client, model, executed, seq: 0 })
    }
}

fn refused(Refusal { code, why }: Refusal) -> anyhow::Error {
    anyhow!("{code}: {why}")
}

impl Policy for Remote {
    fn act(&mut self, world: &World) -> Result<Vec<Action>> {
        let size = self.model.image_size;
        let front = png(&picture(world, size))?;
        let (seq, instruction) = (self.seq, &world.scene.instruction);
        self.seq += 1;
        let asked = |client: &Client| client.act(seq, SystemTime::now(), &front, instruction);
        let actions: Vec<Vec<f64>> = match &self.model.cameras {
            None => {
                let answer = asked(&self.client).map_err(refused)?;
                vec![serde_json::from_value(answer["action"].clone())?]
            }
            Some(_) => {
                let wrist = png(&wrist_picture(world, size))?;
                let wrists = if self.sees_wrist() { &[wrist][..] } else { &[] };
                let state = world.gripper.state();
                let state = (self.model.state_length > 0).then_some(&state[..]);
                let answer =
                    asked(&self.client.clone().with_arm(wrists, state)).map_err(refused)?;
                serde_json::from_value(answer["actions"].clone())?
            }
        };
        ensure!(!actions.is_empty(), "the server answered no action");
        actions.into_iter().take(self.executed).map(seven).collect()
    }

    fn sees_wrist(&self) -> bool {
        self.model.cameras.as_ref().is_some_and(|cameras| cameras.len() > 1)
    }
}

fn png(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, ImageFormat::Png)?;
    Ok(file.into_inner())
}

fn seven(action: Vec<f64>) -> Result<Action> {
    let n = action.len();
    action.try_into().map_err(|_| anyhow!("a motion of {n} numbers; seven move this gripper"))
}
