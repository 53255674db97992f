//! What files and devices can refuse.

use std::path::PathBuf;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// A file that cannot be used, or a device that cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened or mapped.
    #[error("cannot read {}: {why}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
    /// The bytes are not a GGUF file, or a damaged one.
    #[error("{file} is not a usable GGUF file: {why}")]
    Format {
        /// The file, or the name of the built-in model.
        file: String,
        /// What was found and what was wanted.
        why: String,
    },
    /// A metadata key is missing or holds something else.
    #[error("{file}: metadata key `{key}` {why}")]
    Key {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// "is missing", or what was found and wanted.
        why: String,
    },
    /// A tensor is missing, left over, or has another shape or type.
    #[error("{file}: tensor `{name}` {why}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// "is missing", or what was found and wanted.
        why: String,
    },
    /// A product was given a number that is not finite.
    #[error("what `{weight}` is multiplied by is not finite")]
    NotFinite {
        /// The weight.
        weight: String,
    },
    /// The device has no room.
    #[error("{device} has no room for {what} ({bytes} bytes)")]
    Memory {
        /// The device.
        device: String,
        /// What was to be allocated.
        what: String,
        /// How much it needs.
        bytes: usize,
    },
    /// The device failed, or lacks an operation.
    #[error("{device}: {why}")]
    Device {
        /// The device.
        device: String,
        /// What happened.
        why: String,
    },
}
