//! Without a command: a checkpoint to a file.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::ArgGroup;
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;

#[derive(clap::Args)]
#[command(group(ArgGroup::new("type")))]
pub struct Convert {
    /// Folder with config.json, *.safetensors, tokenizer files, dataset_statistics.json
    checkpoint: PathBuf,
    /// Folder with a LoRA adapter (adapter_config.json, adapter_model.safetensors) to merge first
    #[arg(long, value_name = "FOLDER")]
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
    let conversion = Conversion::with_adapter(&args.checkpoint, args.lora.as_deref(), encoding)?;
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
    let progress = super::progress(bytes)?;
    conversion.write(&out, &progress)?;
    progress.finish_and_clear();
    eprintln!("wrote {}", out.display());
    Ok(())
}
