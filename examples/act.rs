//! One picture and one instruction to one motion:
//! `cargo run --release --example act -- example/tabletop.gguf example/tabletop.png "put eggplant into pot"`

use std::io::Write;

use anyhow::Context;
use openvla::{OpenVla, Options};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, image, instruction] = &args[..] else {
        anyhow::bail!("wanted: MODEL.gguf IMAGE INSTRUCTION");
    };
    let mut policy = OpenVla::open(model, &Options::default())?;
    let bytes = std::fs::read(image).with_context(|| format!("cannot read {image}"))?;
    // Without the name of a data set, a model that knows just one acts in that one's units.
    let action = policy.act(&openvla::decode(&bytes)?, instruction, None)?;

    let (name, dataset) = policy.config().statistics.select(Some(&action.unnorm_key))?;
    let mut out = std::io::stdout().lock();
    for (value, [low, high]) in action.action.iter().zip(dataset.action.ranges()) {
        writeln!(out, "{value:10.6} of {low:.6} … {high:.6}")?;
    }
    writeln!(out, "in units of {name}, {:.0} ms", action.timing_ms.total)?;
    // Decoding is among the action tokens; all of the vocabulary says whether the model agrees.
    if !action.unconstrained.all_actions {
        writeln!(out, "the model is unsure: unconstrained, it would have chosen no motion")?;
    }
    Ok(())
}
