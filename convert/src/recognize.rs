//! Recognizes folders and repositories that cannot be converted, by the names of their files, and says
//! what they are instead: OpenVLA-OFT runs, adapters, native Prismatic runs, pickled weights.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value};

use crate::run_files::RunFiles;

/// The file that lists the shards of a large checkpoint.
pub const INDEX: &str = "model.safetensors.index.json";
/// The only file of a small checkpoint, which has no index.
pub const WEIGHTS: &str = "model.safetensors";
/// The file with an adapter's weights.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Refuses what is not a checkpoint of OpenVLA.
///
/// # Errors
/// Says what it is, and what to do with it.
pub fn check_checkpoint(checkpoint: &str, names: &[String]) -> Result<()> {
    if has(names, "config.json") {
        return Ok(());
    }
    if RunFiles::find(checkpoint, names)?.is_some() {
        bail!(
            "{checkpoint} is an OpenVLA-OFT run without config.json and weights: its adapter was not merged; give the \
             model that it was trained from with --base, such as --base openvla/openvla-7b"
        );
    }
    ensure!(
        !has(names, "adapter_config.json"),
        "{checkpoint} is a LoRA adapter, not a whole checkpoint; give its base model as CHECKPOINT \
         and this with --lora"
    );
    if let Some(gguf) = with_extension(names, &["gguf"]) {
        bail!("{checkpoint} holds {gguf}, {IS_CONVERTED}");
    }
    if let Some(weights) = with_extension(names, &["pt"]) {
        bail!("{checkpoint} holds {weights}: {PRISMATIC}");
    }
    Ok(())
}

/// Refuses the `config.json` of a training run, by its keys.
///
/// # Errors
/// Says what it is, and what to do with it.
pub fn check_config(checkpoint: &str, config: &Map<String, Value>) -> Result<()> {
    const TRAINING_KEYS: [&str; 4] = ["run_id", "run_root_dir", "data_root_dir", "vla"];
    let native = !config.contains_key("model_type")
        && TRAINING_KEYS.iter().any(|key| config.contains_key(*key));
    ensure!(!native, "{checkpoint} has a config.json of training: {PRISMATIC}");
    Ok(())
}

/// The end of the message about a GGUF file in place of a checkpoint.
pub const IS_CONVERTED: &str = "which is converted already; openvla-run -m takes it, and another type is made from the \
     checkpoint";

/// Refuses a checkpoint whose weights are missing or in another format.
///
/// # Errors
/// Says what was found, and how to turn it into a checkpoint that can be converted.
pub fn check_weights(checkpoint: &str, names: &[String]) -> Result<()> {
    if has(names, WEIGHTS) || has(names, INDEX) {
        return Ok(());
    }
    if let Some(shard) = names.iter().find(|name| is_shard(name)) {
        bail!("{checkpoint} holds {shard}, but no {INDEX}; download or copy that too");
    }
    if RunFiles::find(checkpoint, names)?.is_some() {
        bail!(
            "{checkpoint} is an OpenVLA-OFT run with neither {WEIGHTS} nor {INDEX}; if its adapter was not merged, give \
             the model that it was trained from with --base"
        );
    }
    if let Some(weights) = with_extension(names, &["pt"]) {
        bail!("{checkpoint} holds {weights}: {PRISMATIC}");
    }
    if let Some(weights) = pickled(names) {
        bail!(
            "{checkpoint} has no {WEIGHTS} but {weights}, and pickled weights or those of other \
             frameworks are not read; load the checkpoint with transformers' from_pretrained and \
             save it with save_pretrained(FOLDER, safe_serialization=True)"
        );
    }
    match with_extension(names, &["safetensors"]) {
        Some(other) => bail!(
            "{checkpoint} has no {WEIGHTS} but {other}, which transformers would not load either; \
             rename it if it is the whole checkpoint"
        ),
        None => {
            bail!("{checkpoint} has neither {WEIGHTS} nor {INDEX}; is the checkpoint complete?")
        }
    }
}

/// The end of the message about a native run of the training code.
pub const PRISMATIC: &str = "it is a native Prismatic run, as OpenVLA's training leaves it, not a checkpoint in Hugging \
     Face's format; export it with openvla's vla-scripts/extern/convert_openvla_weights_to_hf.py \
     and convert what that writes";

/// Refuses what is not an OpenVLA-OFT run, with or without weights.
///
/// # Errors
/// Says what to do.
pub fn check_run(run: &str, names: &[String]) -> Result<()> {
    ensure!(
        RunFiles::find(run, names)?.is_some(),
        "{run} is not an OpenVLA-OFT run, which --base is for; leave that out, or give an adapter with --lora"
    );
    Ok(())
}

/// Refuses what is a whole checkpoint, and adapters with weights in another format.
///
/// # Errors
/// Says what it is, and what to do.
pub fn check_adapter(adapter: &str, names: &[String]) -> Result<()> {
    if RunFiles::find(adapter, names)?.is_some() {
        bail!(
            "{adapter} is an OpenVLA-OFT run, not a LoRA adapter; give it as CHECKPOINT, and the model that it was \
             trained from with --base if its weights are not merged"
        );
    }
    ensure!(
        has(names, "adapter_config.json") || !has(names, "config.json"),
        "{adapter} is a whole checkpoint, not a LoRA adapter; give it as CHECKPOINT, without --lora"
    );
    if let (false, Some(weights)) = (has(names, ADAPTER_WEIGHTS), pickled(names)) {
        bail!(
            "{adapter} has no {ADAPTER_WEIGHTS} but {weights}, as older versions of peft write it, \
             and pickled weights are not read; load the adapter with peft's \
             PeftModel.from_pretrained and save it with \
             save_pretrained(FOLDER, safe_serialization=True)"
        );
    }
    Ok(())
}

/// Whether a file's name is that of a shard, as an index lists them.
pub fn is_shard(name: &str) -> bool {
    let inner = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    inner.is_some_and(|inner| inner.contains("-of-"))
}

/// Weights in a format that runs code when it is read, or that belongs to another framework.
fn pickled(names: &[String]) -> Option<&String> {
    let extensions = ["bin", "pt", "pth", "ckpt", "h5", "msgpack"];
    let others = ["training_args", "optimizer", "scheduler", "rng_state"];
    let weights = |name: &&String| !others.iter().any(|other| name.starts_with(other));
    let mut found = names.iter().filter(weights);
    found.find(|name| with_extension(std::slice::from_ref(name), &extensions).is_some())
}

fn has(names: &[String], name: &str) -> bool {
    names.iter().any(|found| found == name)
}

fn with_extension<'a>(names: &'a [String], extensions: &[&str]) -> Option<&'a String> {
    let is = |name: &&String| {
        let extension = Path::new(name).extension().unwrap_or_default().to_string_lossy();
        extensions.iter().any(|wanted| extension.eq_ignore_ascii_case(wanted))
    };
    names.iter().find(is)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn what_cannot_be_converted_is_named() {
        let all = |listing: &str| {
            let listing = names(&listing.split(' ').collect::<Vec<_>>());
            check_checkpoint("X", &listing).and_then(|()| check_weights("X", &listing))
        };
        for (listing, words) in [
            ("lora_adapter action_head--5_checkpoint.pt", "--base"),
            ("config.json action_head--5_checkpoint.pt", "--base"),
            ("adapter_config.json adapter_model.safetensors", "--lora"),
            ("model-Q4_K_M.GGUF", "converted already"),
            ("config.json pytorch_model-00001-of-00002.bin", "safe_serialization"),
            ("config.json tf_model.h5 README.md", "tf_model.h5"),
            ("config.json checkpoints/step-000001.pt", "convert_openvla_weights_to_hf.py"),
            ("step-000001.pt", "convert_openvla_weights_to_hf.py"),
            ("config.json model-00001-of-00002.safetensors", INDEX),
            ("config.json model.fp16.safetensors", "model.fp16.safetensors"),
            ("config.json training_args.bin", "is the checkpoint complete?"),
        ] {
            let error = all(listing).unwrap_err().to_string();
            assert!(error.contains(words), "{listing}: {error}");
        }
        all("config.json model.safetensors pytorch_model.bin adapter_config.json").unwrap();
        all("config.json model.safetensors.index.json optimizer.pt").unwrap();
    }

    #[test]
    fn adapters_are_told_from_checkpoints_and_older_formats() {
        for (listing, words) in [
            (["config.json", WEIGHTS], "without --lora"),
            (["adapter_config.json", "adapter_model.bin"], "adapter_model.bin"),
            (["adapter_config.json", "proprio_projector--1_checkpoint.pt"], "OpenVLA-OFT"),
        ] {
            let error = check_adapter("X", &names(&listing)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        check_adapter("X", &names(&["adapter_config.json", ADAPTER_WEIGHTS, "a.bin"])).unwrap();
    }
}
