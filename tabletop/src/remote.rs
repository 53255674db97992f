//! The policy of a server, in worlds of this process.

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use anyhow::{Result, anyhow, bail};
use openvla::image::ImageFormat;
use openvla_client::{Client, Refusal, Server};

use crate::episode::Policy;
use crate::render::picture;
use crate::world::{Action, World};

/// Sides of the pictures that are sent, in pixels; those that OpenVLA sees.
const SIZE: u32 = 224;

/// A world that waits has time, even for a large model on a processor.
const DEADLINE_MS: u64 = 600_000;

/// Asks openvla-serve for each motion.
pub struct Remote {
    client: Client,
    seq: u64,
}

impl Remote {
    /// A robot of its own, whatever else asks the server.
    ///
    /// # Errors
    /// If the token's file cannot be read.
    pub fn new(
        url: String,
        token_file: Option<PathBuf>,
        unnorm_key: Option<String>,
    ) -> Result<Self> {
        static ROBOTS: AtomicUsize = AtomicUsize::new(0);
        let robot = ROBOTS.fetch_add(1, Ordering::Relaxed);
        let client_id = format!("tabletop-{}-{robot}", std::process::id());
        let server = Server { url, token_file, unnorm_key, client_id, deadline_ms: DEADLINE_MS };
        Ok(Self { client: Client::new(server)?, seq: 0 })
    }
}

impl Policy for Remote {
    fn act(&mut self, world: &World) -> Result<Vec<Action>> {
        let mut file = Cursor::new(Vec::new());
        picture(world, SIZE).write_to(&mut file, ImageFormat::Png)?;
        let (picture, instruction) = (file.into_inner(), &world.scene.instruction);
        let seq = self.seq;
        self.seq += 1;
        let answer = match self.client.act(seq, SystemTime::now(), &picture, instruction) {
            Ok(answer) => answer,
            Err(Refusal { code, why }) => bail!("{code}: {why}"),
        };
        let action: Vec<f64> = serde_json::from_value(answer["action"].clone())?;
        let n = action.len();
        let action = action.try_into();
        Ok(vec![action.map_err(|_| anyhow!("a motion of {n} numbers; seven move this gripper"))?])
    }
}
