//! What can go wrong, said so that a tired user knows what to type next.

use std::path::PathBuf;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model could not be opened or a motion not be computed.
///
/// `Display` names the thing, what was found and what was wanted; [`Error::hint`] says what to try.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {why}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
    /// The file is not a GGUF, or a damaged one, or the device refused it.
    #[error(transparent)]
    Kernels(#[from] openvla_kernels::Error),
    /// The file is a sound GGUF, but not a model this version can run.
    #[error("the model file cannot be used: {why}")]
    Model {
        /// What was found and what was wanted.
        why: String,
    },
    /// The file is of a policy of another kind than the one that it was opened as.
    #[error("the model file is of {found} policy, not of an {wanted} one")]
    OtherPolicy {
        /// What it is of.
        found: &'static str,
        /// What it was opened as.
        wanted: &'static str,
    },
    /// Drafts were asked for where nothing can be drafted.
    #[error("an OpenVLA-OFT has nothing to draft: it computes a chunk of actions in one pass")]
    NothingToDraft,
    /// Pictures or the arm's state are not what the model reads.
    #[error("the observation cannot be used: {why}")]
    Observation {
        /// What was found and what was wanted.
        why: String,
    },
    /// The image could not be decoded, or its size is out of bounds.
    #[error("the image cannot be used: {why}")]
    Image {
        /// What was found and what was wanted.
        why: String,
    },
    /// A decoder panicked on an image, which is its fault as much as the image's.
    #[error("the image cannot be used: its decoder failed: {why}")]
    Decoder {
        /// What the decoder said.
        why: String,
    },
    /// The instruction does not fit the model's context.
    #[error(
        "the instruction is too long: {rows} rows (image, prompt and motion), the model has {limit}"
    )]
    InstructionTooLong {
        /// Rows that the step would need.
        rows: usize,
        /// Rows that the model was trained for.
        limit: usize,
    },
    /// No statistics of this name are in the file.
    #[error("no statistics named `{key}` in this model")]
    UnknownStatistics {
        /// The name asked for.
        key: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The file has statistics of several data sets and none was named.
    #[error("this model has statistics of {} data sets, and none was named", known.len())]
    AmbiguousStatistics {
        /// The names there are.
        known: Vec<String>,
    },
    /// The device that was asked for is not there.
    #[error("there is no device `{wanted}` here{}", why.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    NoDevice {
        /// As it was asked for.
        wanted: String,
        /// The GPUs there are.
        found: Vec<String>,
        /// What ggml complained about, if it did.
        why: Option<String>,
    },
    /// A GPU has too little memory free for its part of the model.
    #[error("{device} has {} free and needs {}", gigabytes(*free), gigabytes(*needed))]
    DeviceMemory {
        /// The GPU.
        device: String,
        /// Bytes of its part, and what it needs beside.
        needed: usize,
        /// Bytes that are free.
        free: usize,
        /// Layers of the Llama that would fit, if the rest of the model does.
        fits: Option<usize>,
    },
    /// A number of an action was not finite; a motion made of it would be arbitrary.
    #[error(
        "the model computed {value} for number {dimension} of action {step}, which is not finite"
    )]
    NotFiniteAction {
        /// Which action of the chunk, from 0.
        step: usize,
        /// Which of its numbers, from 0.
        dimension: usize,
        /// What was computed.
        value: f32,
    },
    /// A pass that had rows of several robots failed.
    #[error("a pass that several robots shared failed: {why}")]
    SharedPass {
        /// What the device said.
        why: String,
    },
    /// A logit was not a number; a motion made of it would be arbitrary.
    #[error("the model computed a logit that is not a finite number at step {step}")]
    NotFinite {
        /// Which of the motion's tokens, from 0.
        step: usize,
    },
}

impl Error {
    /// What to try, if there is advice beyond the message itself.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model { .. } => Some(
                "write the file again with this version's `openvla-convert CHECKPOINT --q4`".into(),
            ),
            Self::UnknownStatistics { key, known } => Some(suggest(key, known)),
            Self::AmbiguousStatistics { known } => {
                Some(format!("name one with --unnorm-key: {}", known.join(", ")))
            }
            Self::InstructionTooLong { .. } => Some("say it in fewer words".into()),
            Self::OtherPolicy { .. } => Some(
                "openvla-run, openvla-serve and `Policy::open` take either; a program that was written for one \
                 must be told of the other"
                    .into(),
            ),
            Self::NothingToDraft => Some("leave out --draft; it is for OpenVLAs".into()),
            Self::NotFinite { .. }
            | Self::NotFiniteAction { .. }
            | Self::Kernels(openvla_kernels::Error::NotFinite { .. }) => {
                Some("the file may be damaged; try a wider type, such as --bf16".into())
            }
            Self::NoDevice { wanted, found, .. } => Some(other_devices(wanted, found)),
            Self::DeviceMemory { fits: Some(n), .. } => Some(format!(
                "--n-gpu-layers {n} keeps {n} layers on GPUs and the rest on the CPU; a file of a smaller \
                 type, such as --q4, needs less"
            )),
            Self::DeviceMemory { fits: None, .. } => {
                Some("not even the vision towers fit; --device cpu needs no GPU".into())
            }
            Self::Read { .. }
            | Self::Kernels(_)
            | Self::SharedPass { .. }
            | Self::Image { .. }
            | Self::Observation { .. }
            | Self::Decoder { .. } => {
                None
            }
        }
    }
}

/// What there is in place of a device, and what a program needs for its kind if there is none of it.
fn other_devices(wanted: &str, found: &[String]) -> String {
    let kind = wanted.split(':').next().unwrap_or(wanted);
    let build = match kind {
        "cuda" => {
            "a program built with `--features cuda` and its libraries beside it uses NVIDIA GPUs"
        }
        "vulkan" => {
            "a program built with `--features vulkan` and its libraries beside it uses GPUs that have a \
             Vulkan driver (`vulkaninfo --summary` lists them)"
        }
        _ => "the kinds are cuda and vulkan; vulkan:1 is the second of its kind",
    };
    let is_of_kind = |name: &String| name.to_lowercase().starts_with(kind);
    match found.join(", ") {
        names if found.iter().any(is_of_kind) => format!("there are: {names}"),
        names if names.is_empty() => format!("--device auto takes what there is; {build}"),
        names => format!("there are: {names}; {build}"),
    }
}

fn gigabytes(bytes: usize) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// "did you mean" for a name that is close to a known one, and the list of those there are.
fn suggest(key: &str, known: &[String]) -> String {
    let nearest = known
        .iter()
        .map(|name| (strsim::jaro_winkler(key, name), name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.7);
    let meant = nearest.map(|(_, name)| format!("did you mean `{name}`? ")).unwrap_or_default();
    format!("{meant}this model has: {}", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_told_what_there_is_and_what_its_kind_needs() {
        let hint = |wanted: &str, found: &[&str]| {
            let found = found.iter().map(|name| (*name).to_owned()).collect();
            Error::NoDevice { wanted: wanted.to_owned(), found, why: None }.hint().unwrap()
        };
        assert!(hint("cuda", &[]).contains("--features cuda"), "{}", hint("cuda", &[]));
        assert!(hint("vulkan:1", &[]).contains("--features vulkan"), "{}", hint("vulkan:1", &[]));
        assert!(hint("vulcan", &[]).contains("cuda and vulkan"), "{}", hint("vulcan", &[]));
        let intel = ["Vulkan0 (Intel Arc)"];
        assert_eq!(hint("vulkan:1", &intel), "there are: Vulkan0 (Intel Arc)");
        let both = hint("cuda", &intel);
        assert!(
            both.contains("Vulkan0 (Intel Arc); a program built with `--features cuda`"),
            "{both}"
        );
    }

    #[test]
    fn a_near_miss_is_suggested_and_a_wild_guess_is_not() {
        let known = vec!["bridge_orig".to_owned(), "fractal20220817_data".to_owned()];
        let hint = |key: &str| {
            Error::UnknownStatistics { key: key.into(), known: known.clone() }.hint().unwrap()
        };
        assert!(hint("bridge").starts_with("did you mean `bridge_orig`?"), "{}", hint("bridge"));
        assert_eq!(hint("zzz"), "this model has: bridge_orig, fractal20220817_data");
    }
}
