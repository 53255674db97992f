//! Without a command: a checkpoint to a file.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::ArgGroup;
use indicatif::{ProgressBar, ProgressStyle};
use openvla_convert::plan::{Encoding, Override};
use openvla_convert::{Conversion, Options};

#[derive(clap::Args)]
#[command(group(ArgGroup::new("type")))]
pub struct Convert {
    /// Folder with config.json, *.safetensors, tokenizer files, dataset_statistics.json
    checkpoint: PathBuf,
    /// Folder with a LoRA adapter (adapter_config.json, adapter_model.safetensors) to merge first
    #[arg(long, value_name = "FOLDER")]
    lora: Option<PathBuf>,
    /// 4 bits (Q4_K_M): the default
    #[arg(long, group = "type")]
    q4: bool,
    /// 8 bits (Q8_0)
    #[arg(long, group = "type")]
    q8: bool,
    /// 16 bits, as the checkpoint (BF16)
    #[arg(long, group = "type")]
    bf16: bool,
    /// F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, Q4_0, IQ4_NL or IQ4_XS
    #[arg(long, group = "type", value_name = "TYPE")]
    outtype: Option<Encoding>,
    /// Another type for the tensors whose names this regular expression is found in, such as
    /// 'blk\.0\.=Q8_0'; may be given several times, the last that matches wins
    #[arg(long, value_name = "PATTERN=TYPE")]
    tensor_type: Vec<Override>,
    /// Importance matrix (GGUF) to quantise by, as `openvla-convert imatrix` collects it
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Do not compute reference cases in f32 first: faster, but `verify` can then say less
    #[arg(long)]
    no_proof: bool,
    /// Print what the file would hold, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// File to write [default: a name such as OpenVLA-7B-v1.0-Q4_K_M.gguf, here]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub fn run(args: &Convert) -> Result<()> {
    let conversion = Conversion::new(&args.checkpoint, &args.options()?)?;
    let out = args.output.clone().unwrap_or_else(|| conversion.file_name());
    let (name, unused) = (&conversion.config.general.name, conversion.layout.unused.len());
    eprintln!("{name} to {}; {unused} tensors left out as unused", out.display());
    let summary = conversion.summary();
    if args.dry_run {
        write!(std::io::stdout(), "{summary}unused:\n{}\n", conversion.layout.unused.join("\n"))?;
        return Ok(());
    }
    eprint!("{summary}");
    // indicatif draws nothing when stderr is no terminal.
    let style =
        "{msg} {bar:40} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let progress = ProgressBar::new(0).with_style(ProgressStyle::with_template(style)?);
    conversion.write(&out, &progress)?;
    progress.finish_and_clear();
    eprintln!("wrote {}", out.display());
    Ok(())
}

impl Convert {
    fn options(&self) -> Result<Options> {
        let encoding = match self {
            Self { outtype: Some(encoding), .. } => *encoding,
            Self { q8: true, .. } => "Q8_0".parse()?,
            Self { bf16: true, .. } => "BF16".parse()?,
            _ => Encoding::default(),
        };
        Ok(Options {
            encoding,
            overrides: self.tensor_type.clone(),
            adapter: self.lora.clone(),
            importance: self.imatrix.clone(),
            proof: !self.no_proof,
        })
    }
}
