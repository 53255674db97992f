//! A robot's control loop: a session drafts tokens from the motion before, and the clock decides what is late.
//! `cargo run --release --example control_loop -- example/tabletop.gguf "put eggplant into pot" 5 example/*.png`

use std::time::{Duration, Instant};

use openvla::image::RgbImage;
use openvla::{Draft, OpenVla, Options, Session};

/// What a driver of a real robot has: replace the two functions by yours.
struct Robot<'a> {
    pictures: std::slice::Iter<'a, String>,
}

impl Robot<'_> {
    /// The camera's newest picture, or nothing once the task is over.
    fn look(&mut self) -> anyhow::Result<Option<RgbImage>> {
        let Some(path) = self.pictures.next() else { return Ok(None) };
        Ok(Some(openvla::decode(&std::fs::read(path)?)?))
    }

    /// Starts the motion `[dx, dy, dz, droll, dpitch, dyaw, gripper]`, in the data set's units.
    fn move_by(&mut self, motion: &[f64]) {
        eprintln!("move by {motion:.4?}");
    }
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, instruction, hz, pictures @ ..] = &args[..] else {
        anyhow::bail!("wanted: MODEL.gguf INSTRUCTION HZ IMAGE...");
    };
    let period = Duration::try_from_secs_f64(1.0 / hz.parse::<f64>()?)?;
    let mut robot = Robot { pictures: pictures.iter() };

    let mut options = Options::default();
    options.draft = Draft::Auto;
    let mut policy = OpenVla::open(model, &options)?;
    let mut session = Session::default(); // one for each robot; many may share the policy

    loop {
        let seen = Instant::now();
        let Some(picture) = robot.look()? else { return Ok(()) };
        let action = policy.act_in(&mut session, &picture, instruction, None)?;
        match period.checked_sub(seen.elapsed()) {
            Some(rest) => {
                robot.move_by(&action.action);
                std::thread::sleep(rest);
            }
            // The scene has moved on: a motion for an old picture is worse than none.
            None => eprintln!("late: {:.0?}, not moved", seen.elapsed()),
        }
        eprintln!("{:.2} passes per motion so far", action.draft.session.passes_per_action);
    }
}
