//! Motions for all pictures of a folder, as a JSON object a line, without a server:
//! `cargo run --release --example folder -- example/tabletop.gguf example "put eggplant into pot" >motions.jsonl`

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use openvla::{OpenVla, Options};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, folder, instruction] = &args[..] else {
        anyhow::bail!("wanted: MODEL.gguf FOLDER INSTRUCTION");
    };
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {folder}"))?;
    let entries = entries.collect::<Result<Vec<_>, _>>()?;
    let mut pictures: Vec<PathBuf> = entries.iter().map(|entry| entry.path()).collect();
    pictures.retain(|path| path.extension().is_some_and(|it| it == "png" || it == "jpg"));
    pictures.sort();

    // Opened once: a model's weights are memory-mapped, and its graphs are built for the first picture.
    let mut policy = OpenVla::open(model, &Options::default())?;
    let mut out = std::io::stdout().lock();
    for path in pictures {
        let name = path.display().to_string();
        let act = |policy: &mut OpenVla| -> anyhow::Result<_> {
            let picture = openvla::decode(&std::fs::read(&path)?)?;
            Ok(policy.act(&picture, instruction, None)?)
        };
        let action = act(&mut policy).with_context(|| format!("no motion for {name}"))?;
        let line =
            serde_json::json!({ "image": name, "action": action.action, "tokens": action.tokens });
        writeln!(out, "{line}")?;
    }
    Ok(())
}
