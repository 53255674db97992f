//! Worlds for a policy in another program: worlds out, actions in, in lockstep.
//!
//! out  for each world: a byte, 1 if its task is done, and the step as [`Learner::bytes`] has it
//! in   for each world: seven f32, little-endian

use std::io::{ErrorKind, Read, Write};

use anyhow::Result;

use crate::scene::{Scene, Suite};
use crate::steps::Learner;
use crate::world::World;

/// Bytes of an action.
const ACTION: usize = 4 * 7;

/// Runs `n` worlds until the input ends. A world whose task is done stays as it is.
///
/// # Errors
/// If the output is closed, or the input ends within an action.
pub fn gym(
    learner: Learner,
    suite: Suite,
    seed: u64,
    n: usize,
    size: u32,
    mut input: impl Read,
    mut out: impl Write,
) -> Result<()> {
    let scene = |i| Scene::new(suite, seed.wrapping_add(i as u64));
    let mut worlds: Vec<World> = (0..n).map(|i| World::new(scene(i))).collect();
    let mut actions = vec![0; n * ACTION];
    loop {
        for world in &worlds {
            out.write_all(&[u8::from(world.is_done())])?;
            out.write_all(&learner.bytes(world, size))?;
        }
        out.flush()?;
        match input.read_exact(&mut actions) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        for (world, action) in worlds.iter_mut().zip(actions.as_chunks::<ACTION>().0) {
            if !world.is_done() {
                let numbers = action.as_chunks().0;
                world.step(&std::array::from_fn(|i| f64::from(f32::from_le_bytes(numbers[i]))));
            }
        }
    }
}
