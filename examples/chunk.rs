//! What an OpenVLA-OFT model's cameras see, the arm's state and an instruction to a chunk of actions:
//! `cargo run --release --example chunk -- example/tabletop-oft.gguf full_image=example/tabletop.png \
//!  wrist_image=example/tabletop-wrist.png "$(cat example/tabletop-state.json)" "put eggplant into pot"`

use std::io::Write;

use anyhow::Context;
use openvla::Options;
use openvla::oft::{Observation, OpenVlaOft};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, seen @ .., state, instruction] = &args[..] else {
        anyhow::bail!("wanted: MODEL.gguf CAMERA=IMAGE... STATE INSTRUCTION");
    };
    let mut policy = OpenVlaOft::open(model, &Options::default())?;
    let mut pictures = Vec::new();
    for seen in seen {
        let (camera, path) = seen.split_once('=').context("wanted: CAMERA=IMAGE")?;
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {path}"))?;
        pictures.push((camera, openvla::decode(&bytes)?));
    }
    // Pictures that change places give other motions without an error, so they are put in order by name.
    let named: Vec<_> = pictures.iter().map(|(camera, image)| (*camera, image)).collect();
    let images = policy.oft().in_order(&named)?;
    let state: Vec<f64> = serde_json::from_str(state).context("the state is not a JSON list")?;
    let observation = Observation { images: &images, state: Some(&state) };
    let chunk = policy.act(&observation, instruction, None)?;

    let mut out = std::io::stdout().lock();
    // A robot makes these one after another, and looks again before or after the last.
    for action in &chunk.actions {
        let numbers: Vec<String> = action.iter().map(|x| format!("{x:10.6}")).collect();
        writeln!(out, "{}", numbers.join(" "))?;
    }
    writeln!(out, "in units of {}, {:.0} ms", chunk.unnorm_key, chunk.timing_ms.total)?;
    Ok(())
}
