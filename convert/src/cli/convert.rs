//! Without a command: converts a checkpoint to a file.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use openvla::cli::{output_file, say};
use openvla::{Bounds, Preprocess, Profile};
use openvla_convert::checkpoint::{HubRevision, hub_revision};
use openvla_convert::fingerprint::check_replaceable;
use openvla_convert::hub::{self, Content};
use openvla_convert::oft::{self, Platform, RunOptions};
use openvla_convert::plan::{Encoding, Override};
use openvla_convert::{Conversion, Options};

use super::example;

#[derive(clap::Args)]
pub struct Convert {
    /// Folder with config.json, *.safetensors, tokenizer files, dataset_statistics.json; or
    /// user/repo or user/repo@revision on the Hugging Face Hub
    #[arg(required_unless_present = "example")]
    checkpoint: Option<PathBuf>,
    /// Convert the example checkpoint, which is built in
    #[arg(long, conflicts_with = "checkpoint")]
    example: bool,
    /// LoRA adapter to merge first, a folder or a repository too: adapter_config.json,
    /// adapter_model.safetensors
    #[arg(long, value_name = "ADAPTER")]
    lora: Option<PathBuf>,
    /// What is done to pictures first: raw (nothing), oft (a JPEG round trip and TensorFlow's resize unless
    /// they have the model's size), libero (rotated by 180° and always that) [default: oft for OpenVLA-OFT, else raw]
    #[arg(long, value_name = "NAME")]
    profile: Option<Profile>,
    /// Statistics of the model's data sets, as finetune.py writes them [default:
    /// dataset_statistics.json of the adapter or the checkpoint, else config.json's norm_stats]
    #[arg(long, value_name = "FILE")]
    statistics: Option<PathBuf>,
    /// Another type for the tensors whose names match this regular expression, such as
    /// 'blk\.0\.=Q8_0'; may be given several times, the last match wins
    #[arg(long, value_name = "PATTERN=TYPE")]
    tensor_type: Vec<Override>,
    /// Importance matrix (GGUF) to quantize with, as `openvla-convert imatrix` collects it
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Do not compute reference cases in f32 first: faster, but `verify` then checks only checksums
    #[arg(long)]
    no_proof: bool,
    /// Print what the file would hold, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// File to write or replace [default: a name such as OpenVLA-7B-v1.0-Q4_K_M.gguf in this folder,
    /// unless a file of another checkpoint has it]
    #[arg(short, long, value_name = "FILE", value_parser = output_file())]
    output: Option<PathBuf>,
}

pub fn run(args: &Convert, options: &Options) -> Result<()> {
    let unpacked;
    let checkpoint = match &args.checkpoint {
        Some(checkpoint) if options.base.is_some() => folder(checkpoint, Content::Run)?,
        Some(checkpoint) => folder(checkpoint, Content::Checkpoint)?,
        None => {
            unpacked = tempfile::tempdir()?;
            example::unpack(unpacked.path())?
        }
    };
    let conversion = Conversion::new(&checkpoint, options)?;
    let out = args.output.clone().unwrap_or_else(|| conversion.file_name());
    let (name, unused) = (&conversion.config.general.name, conversion.mapping.unused.len());
    say(format_args!("{name} to {}; {unused} tensors left out as unused", out.display()));
    if !args.example {
        say(format_args!("statistics: {}", conversion.statistics));
    }
    if let Some(oft) = &conversion.config.oft {
        say(oft::summary(oft));
    }
    let Preprocess { profile, center_crop, .. } = &conversion.config.preprocess;
    if (*profile, *center_crop) != (Profile::Raw, false) {
        let crop = if *center_crop { "their center cropped" } else { "not cropped" };
        say(format_args!("pictures: prepared as `{profile}`, {crop}"));
    }
    for warning in &conversion.warnings {
        say(format_args!("warning: {warning}"));
    }
    let summary = conversion.summary();
    if args.dry_run {
        write!(std::io::stdout(), "{summary}unused:\n{}\n", conversion.mapping.unused.join("\n"))?;
        return Ok(());
    }
    say(summary.trim_end());
    if args.output.is_none() {
        check_replaceable(&out, &conversion.config.general.source.fingerprint)?;
    }
    let progress = super::progress(0)?;
    conversion.write(&out, &progress)?;
    progress.finish_and_clear();
    say(format_args!("wrote {}", out.display()));
    Ok(())
}

/// What no file of an OpenVLA-OFT run says.
#[derive(clap::Args)]
#[command(next_help_heading = "OpenVLA-OFT")]
pub struct OftArgs {
    /// The model that a run was trained from, a folder or a repository: to merge its adapter, or if it has weights to
    /// check that they contain the adapter once
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "lora")]
    base: Option<PathBuf>,
    /// Defaults of the options below: libero, aloha or bridge [default: what the sizes tell]
    #[arg(long, value_name = "NAME")]
    platform: Option<Platform>,
    /// Actions of one pass
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    /// Cameras: the third-person one, then those on wrists
    #[arg(long, value_name = "N")]
    cameras: Option<usize>,
    /// Which statistics -1 and 1 correspond to: q99 or min-max
    #[arg(long, value_name = "NAME", value_parser = bounds)]
    bounds: Option<Bounds>,
}

fn bounds(name: &str) -> Result<Bounds, String> {
    let found = [Bounds::Quantiles, Bounds::Extremes].into_iter().find(|b| b.as_ref() == name);
    found.ok_or_else(|| "q99 or min-max is needed".to_owned())
}

impl Convert {
    /// How it is to be converted.
    pub fn options(&self, oft: &OftArgs, encoding: Encoding) -> Result<Options> {
        let lora = self.lora.as_ref();
        Ok(Options {
            encoding,
            overrides: self.tensor_type.clone(),
            adapter: lora.map(|lora| folder(lora, Content::Adapter)).transpose()?,
            base: oft.base.as_deref().map(|dir| folder(dir, Content::Checkpoint)).transpose()?,
            run: RunOptions {
                platform: oft.platform,
                chunk: oft.chunk,
                n_camera: oft.cameras,
                bounds: oft.bounds,
            },
            profile: self.profile,
            statistics: self.statistics.clone(),
            importance: self.imatrix.clone(),
            proof: !self.no_proof,
            ..Options::default()
        })
    }
}

/// A folder, fetched from the Hub unless there is one of that name.
pub fn folder(source: &Path, content: Content) -> Result<PathBuf> {
    let dir = hub::locate(source, content)?;
    if let Some(HubRevision { repository, revision }) = hub_revision(&dir)? {
        say(format_args!("{repository} is at {revision}"));
    }
    Ok(dir)
}
