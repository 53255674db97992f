//! Episodes of the tabletop's expert.

use std::path::Path;

use openvla::image::RgbImage;
use openvla_tabletop::{Scene, Suite, World, expert, picture, wrist_picture};
use serde_json::json;

/// An episode in memory.
#[derive(Clone)]
pub struct Recording {
    /// Of each moment, the pictures of all cameras.
    pub frames: Vec<Vec<RgbImage>>,
    pub actions: Vec<Vec<f64>>,
    pub states: Vec<Vec<f64>>,
    pub instruction: String,
}

/// The expert's first steps in a scene, of pictures with sides of `size` pixels.
pub fn record(seed: u64, n: usize, size: u32) -> Recording {
    let suite = if seed.is_multiple_of(2) { Suite::Base } else { Suite::Language };
    let mut world = World::new(Scene::new(suite, seed));
    let instruction = world.scene.instruction.clone();
    let mut recording = Recording { frames: vec![], actions: vec![], states: vec![], instruction };
    for _ in 0..n {
        let action = expert(&world);
        recording.frames.push(vec![picture(&world, size), wrist_picture(&world, size)]);
        recording.states.push(world.gripper.state().to_vec());
        recording.actions.push(action.to_vec());
        world.step(&action);
    }
    recording
}

impl Recording {
    /// Writes it as the doctor reads it.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        for (camera, name) in ["frames", "wrist"].into_iter().enumerate() {
            std::fs::create_dir(folder.join(name))?;
            for (i, images) in self.frames.iter().enumerate() {
                images[camera].save(folder.join(format!("{name}/{i:06}.png")))?;
            }
        }
        for (stem, rows) in [("actions", &self.actions), ("states", &self.states)] {
            let lines: Vec<String> = rows.iter().map(|row| json!(row).to_string() + "\n").collect();
            std::fs::write(folder.join(format!("{stem}.jsonl")), lines.concat())?;
        }
        Ok(std::fs::write(folder.join("instruction.txt"), &self.instruction)?)
    }
}
