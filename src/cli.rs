//! What this project's programs share: the flags that say where to compute, and how they fail.

pub mod memory;
mod misnamed;
pub mod signature;

use std::fmt::Display;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use clap::builder::{PathBufValueParser, TypedValueParser};
use openvla_kernels::Gguf;
use signal_hook::consts::SIGXFSZ;
use signal_hook::flag;

use crate::{Decoding, Devices, Draft, Kernels, OftConfig, Options, Policy, Profile};

/// The trained example at 4 bits. Swap the file to change the default model.
static EXAMPLE: &[u8] = include_bytes!("cli/tabletop.gguf");

/// What to tell people who get it.
pub const BUILT_IN: &str = "no model named: using the built-in example, which knows the simulated \
                            table alone; -m MODEL.gguf names yours";

/// How many CPU threads.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Threads {
    /// CPU threads [default: one for each core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,
}

impl Threads {
    /// As many as were asked for, else one for each core.
    pub fn count(self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(cores, usize::from)
    }
}

/// Where to compute.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute: auto takes the GPUs there are, else the CPU; cuda, cuda:N, vulkan, vulkan:N
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: Devices,
    /// Layers of the Llama to keep on GPUs, the rest on the CPU [default: all]; also -ngl N
    #[arg(long, value_name = "N")]
    n_gpu_layers: Option<usize>,
    #[command(flatten)]
    threads: Threads,
    /// Kernels that a CPU computes with: fastest (the first of the others that it has the instructions for),
    /// avx512-vnni, avx-vnni, avx2, neon-dotprod, ggml
    #[arg(long, value_name = "NAME", env = Kernels::VARIABLE, default_value = "fastest", hide_env = true)]
    kernels: Kernels,
}

impl DeviceArgs {
    /// How a model is opened there.
    pub fn options(&self) -> Options {
        Options {
            devices: self.device.clone(),
            n_gpu_layers: self.n_gpu_layers,
            n_threads: self.threads.count(),
            kernels: self.kernels,
            ..Options::default()
        }
    }
}

/// Whether pictures are cropped.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct CenterCrop {
    /// Show the model the middle nine tenths of a picture's area, as those expect that were trained with random crops
    #[arg(long)]
    center_crop: bool,
    /// Show the model whole pictures
    #[arg(long, conflicts_with = "center_crop")]
    no_center_crop: bool,
}

impl CenterCrop {
    /// What was asked for, if anything.
    pub fn choice(self) -> Option<bool> {
        if self.center_crop { Some(true) } else { self.no_center_crop.then_some(false) }
    }
}

/// Which model, and how it runs.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ModelArgs {
    /// Model file [default: $OPENVLA_MODEL, else the built-in example]
    #[arg(short, long, value_name = "MODEL.gguf")]
    model: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Guess tokens from the motion before, and check several in one pass where that has paid
    #[arg(long, value_name = "off|auto", default_value = "off")]
    draft: Draft,
    /// Choose among all tokens as the reference does, even those that are not actions
    #[arg(long)]
    reference_decoding: bool,
    /// What is done to pictures first: raw, oft, libero [default: what the file says]
    #[arg(long, value_name = "NAME")]
    profile: Option<Profile>,
    #[command(flatten)]
    crop: CenterCrop,
    /// Open the model only if this public key of minisign, or of this file, signed it: MODEL.gguf.minisig
    #[arg(long, value_name = "KEY", value_parser = signature::public_key)]
    require_signature: Option<signature::PublicKey>,
}

impl ModelArgs {
    /// The file to open; without one, it is the built-in example.
    pub fn path(&self) -> Option<PathBuf> {
        model_path(self.model.clone())
    }

    /// Another file, opened in the same way.
    pub fn of(&self, file: &Path) -> Self {
        Self { model: Some(file.to_owned()), ..self.clone() }
    }

    /// CPU threads that it computes with.
    pub fn threads(&self) -> usize {
        self.device.threads.count()
    }

    /// Opens the model, of whichever policy it is.
    ///
    /// # Errors
    /// As [`Policy::open`] and [`ModelArgs::file`].
    pub fn open(&self) -> anyhow::Result<Policy> {
        Ok(Policy::load(&self.file()?, &self.options())?)
    }

    /// Opens the model's file.
    ///
    /// # Errors
    /// If it is not signed as it must be, or is not a model. If a checkpoint, a URL or the like was named, says what to
    /// do with it.
    pub fn file(&self) -> anyhow::Result<Gguf> {
        let path = self.path();
        if let Some(key) = &self.require_signature {
            let path = path
                .as_deref()
                .context("the built-in example is not signed: name a model with -m")?;
            say(format_args!("signed: {}", signature::check(path, key)?));
        }
        let Some(path) = path else {
            return Ok(Gguf::built_in("the built-in example", EXAMPLE)?);
        };
        misnamed::check(&path)?;
        Ok(Gguf::open(&path)?)
    }

    /// Whether the file is of an OpenVLA-OFT model. What is wrong with it is said when it is opened.
    pub fn is_oft(&self) -> bool {
        let file = self.path().and_then(|path| Gguf::open(&path).ok());
        file.and_then(|file| OftConfig::read(&file).ok()?).is_some()
    }

    /// How it is opened.
    pub fn options(&self) -> Options {
        let mut options = self.device.options();
        options.draft = self.draft;
        if self.reference_decoding {
            options.decoding = Decoding::Reference;
        }
        options.profile = self.profile;
        options.center_crop = self.crop.choice();
        if let Some(why) = options.devices.left_alone() {
            say(why);
        }
        options
    }
}

/// The model file that was named by `-m`, else by `$OPENVLA_MODEL`. An empty variable is as good as
/// none: that is how container tools pass on what is not set.
pub fn model_path(model: Option<PathBuf>) -> Option<PathBuf> {
    let variable = || std::env::var_os("OPENVLA_MODEL").filter(|path| !path.is_empty());
    model.or_else(|| variable().map(Into::into))
}

/// Starts a program: reads its arguments, and from then on a write beyond `ulimit -f` is an error
/// like any other, and a mapped file that is cut off ends it with a message.
///
/// `-ngl` is how llama.cpp's programs spell `--n-gpu-layers`; clap has no short names of three
/// letters.
pub fn start<A: clap::Parser>() -> A {
    // Without a handler, the signal ends the process, which then leaves half a file behind. The flag
    // is not needed: the write itself fails. A system that refuses the handler changes nothing else.
    let _ = flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
    openvla_kernels::exit_on_bus_error();
    let spelled = |arg| if arg == "-ngl" { "--n-gpu-layers".into() } else { arg };
    A::parse_from(std::env::args_os().map(spelled))
}

/// Writes a file beside its place and moves it there, so that it is whole or not there. A device or a pipe, such as
/// /dev/null, is written to and stays what it is, and a link still points to its file.
///
/// # Errors
/// What the system says.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return std::fs::write(path, bytes).with_context(cannot);
    }
    let (behind_links, folder) = place(path);
    let permissions = std::fs::Permissions::from_mode(0o644);
    let mut file = tempfile::Builder::new()
        .permissions(permissions)
        .tempfile_in(folder)
        .with_context(cannot)?;
    file.write_all(bytes.as_ref()).with_context(cannot)?;
    file.persist(&behind_links).with_context(cannot)?;
    Ok(())
}

/// Where a file of this name goes that is written beside its place and moved there: what it links to, and that folder.
pub fn place(path: &Path) -> (PathBuf, PathBuf) {
    let behind_links = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let folder = behind_links.parent().filter(|folder| *folder != Path::new(""));
    let folder = folder.unwrap_or(Path::new(".")).to_owned();
    (behind_links, folder)
}

/// What a file of lines `key: value`, as Linux has them in /proc, says first.
pub fn value_of(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
}

/// The processor's name for itself, else "unknown".
pub fn processor() -> String {
    value_of("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned())
}

/// Writes a line to stderr. Unlike `eprintln!`, it does not panic where stderr cannot be written to:
/// a job does not end because nobody reads its log.
pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Reads the name of a file to write. `-` is refused, since nothing here writes files to stdout.
pub fn output_file() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| {
        if path == Path::new("-") {
            Err("a file is needed, not stdout; ./- is a file of this name")
        } else {
            Ok(path)
        }
    })
}

/// Reads a number from `least` to `most`.
pub fn between(least: f64, most: f64) -> impl TypedValueParser<Value = f64> {
    let is_within = move |x: &f64| (least..=most).contains(x);
    move |text: &str| {
        let number = text.parse().ok().filter(is_within);
        number.ok_or_else(|| format!("a number from {least} to {most} is needed"))
    }
}

/// What is probably a mistake about an instruction from the command line. What can be said without
/// the command line is [`crate::prompt::Prompt::doubt`]'s.
pub fn doubt(instruction: &str) -> Option<&'static str> {
    let path = Path::new(instruction);
    (is_picture(path) || path.is_file())
        .then_some("the instruction is the name of a file; images come first, then the instruction")
}

/// Endings of picture files that can be read.
pub const PICTURES: [&str; 5] = ["png", "jpg", "jpeg", "webp", "bmp"];

/// Whether a file's name ends like a picture's, in letters of either case.
pub fn is_picture(path: &Path) -> bool {
    let ending = path.extension().map(|ending| ending.to_ascii_lowercase());
    ending.is_some_and(|ending| PICTURES.iter().any(|known| ending == *known))
}

/// How a program ends: 0, or 1 with the error and what to try on stderr.
pub fn end(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    say(format_args!("error: {error:#}"));
    let hint = error.chain().find_map(|cause| cause.downcast_ref::<crate::Error>()?.hint());
    if let Some(hint) = hint {
        say(format_args!("hint: {hint}"));
    }
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_replaced_and_devices_and_links_stay_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        for text in ["first", "second"] {
            write(&file, text).unwrap();
            assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
        }
        let device = folder.path().join("device");
        std::os::unix::fs::symlink("/dev/null", &device).unwrap();
        write(&device, "text").unwrap();
        assert!(device.is_symlink(), "it was replaced by a file");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("file", &link).unwrap();
        write(&link, "third").unwrap();
        assert!(link.is_symlink(), "it was replaced by a file");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "third");
        assert!(write(folder.path(), "text").is_err());
    }
}
