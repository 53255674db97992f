//! Without a command: a checkpoint to a file.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ArgGroup;
use indicatif::{ProgressBar, ProgressStyle};
use openvla_convert::Conversion;
use openvla_convert::hub::{self, Content};
use openvla_convert::plan::Encoding;

use super::example;

#[derive(clap::Args)]
#[command(group(ArgGroup::new("type")))]
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
    /// 4 bits (IQ4_NL; towers and head 8 bits): the default
    #[arg(long, group = "type")]
    q4: bool,
    /// 8 bits (Q8_0)
    #[arg(long, group = "type")]
    q8: bool,
    /// 16 bits, as the checkpoint (BF16)
    #[arg(long, group = "type")]
    bf16: bool,
    /// F32, F16, BF16, Q8_0, Q4_0 or IQ4_NL
    #[arg(long, group = "type", value_name = "TYPE")]
    outtype: Option<Encoding>,
    /// Print what the file would hold, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// File to write [default: a name such as OpenVLA-7B-v1.0-IQ4_NL.gguf, here]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub fn run(args: &Convert) -> Result<()> {
    let name = match args {
        Convert { q8: true, .. } => "Q8_0",
        Convert { bf16: true, .. } => "BF16",
        _ => "IQ4_NL",
    };
    let encoding = args.outtype.map_or_else(|| name.parse(), Ok)?;
    let unpacked;
    let checkpoint = match &args.checkpoint {
        Some(checkpoint) => folder(checkpoint, Content::Checkpoint)?,
        None => {
            unpacked = tempfile::tempdir()?;
            example::unpack(unpacked.path())?
        }
    };
    let lora = args.lora.as_ref().map(|lora| folder(lora, Content::Adapter)).transpose()?;
    let conversion = Conversion::with_adapter(&checkpoint, lora.as_deref(), encoding)?;
    let out = args.output.clone().unwrap_or_else(|| conversion.file_name(encoding));
    let bytes = conversion.data_bytes();
    eprintln!(
        "{}: {} tensors, {} left out as unused, {} of {}",
        conversion.config.general.name,
        conversion.plan.len(),
        conversion.layout.unused.len(),
        indicatif::BinaryBytes(bytes),
        encoding.name
    );
    if args.dry_run {
        let summary = openvla_convert::plan::summary(&conversion.plan);
        write!(std::io::stdout(), "{summary}unused:\n{}\n", conversion.layout.unused.join("\n"))?;
        return Ok(());
    }
    // indicatif draws nothing when stderr is no terminal.
    let style = "{bar:40} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let progress = ProgressBar::new(bytes).with_style(ProgressStyle::with_template(style)?);
    conversion.write(&out, &progress)?;
    progress.finish_and_clear();
    eprintln!("wrote {}", out.display());
    Ok(())
}

/// A folder, fetched from the Hub unless there is one of that name.
fn folder(source: &Path, content: Content) -> Result<PathBuf> {
    let hub::Location { dir, origin } = hub::locate(source, content)?;
    if let Some(hub::Origin { repository, revision }) = origin {
        eprintln!("{repository} is at {revision}");
    }
    Ok(dir)
}
