//! OpenVLA robot policies: one camera image and one instruction in, one motion out.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut policy = openvla::OpenVla::open("openvla-7b.gguf", &openvla::Options::default())?;
//! let image = openvla::decode(&std::fs::read("camera.png")?)?;
//! let action = policy.act(&image, "put eggplant into pot", Some("bridge_orig"))?;
//! println!("{:?}", action.action); // [dx, dy, dz, droll, dpitch, dyaw, gripper]
//! # Ok(()) }
//! ```
//!
//! # The pipeline
//!
//! Shapes are ggml's everywhere: fastest dimension first. Numbers are those of openvla-7b.
//!
//! | file | stage | gives |
//! |---|---|---|
//! | `decode` | PNG, JPEG, WebP, BMP | an RGB image |
//! | `profile` | what evaluations do to it first: JPEG, Lanczos, crop | an RGB image |
//! | `preprocess` | bicubic resize as Pillow's, two normalizations | `[224, 224, 6]` planes |
//! | `vision` | DINOv2 and SigLIP | `[2176, 256]` patch features |
//! | `projector` | an MLP | `[4096, 256]` soft tokens |
//! | `prompt`, `tokenizer` | template, SentencePiece BPE | ids: BOS … 29871 |
//! | `session` | what is remembered of a robot | the motion before |
//! | `speculative` | drafts of tokens, and their verification | the tokens |
//! | `llama` | Llama-2: BOS, soft tokens, the other ids; drafts | `[32064]` logits, seven times |
//! | `action` | bins | seven numbers in -1..1 |
//! | `explain` | only if asked: a pass more | attention on each patch, for each token |
//! | `statistics` | the data set's scale | a motion in its units |
//!
//! `batch` runs them in order, for one robot or several; `policy` is what programs see. `network` has those that run on
//! the device: `encoder`, which is vision and projector, and `llama`. [`oft`] is the other policy, with the same encoder.
//! `config` reads what the file says about itself, `layers` has what networks share. [`streamed`] runs the
//! networks part by part where they do not fit. [`mod@format`] documents the file, [`cli`] is what
//! programs share, `score` says how likely given motions are, and [`libero`] has the conventions of that environment's client.
//!
//! # What is deliberately absent
//!
//! - Stages do not call each other: `batch`, [`oft`], `network` and `encoder` do, and [`streamed`] in their place.
//! - No key of the file is named outside `config`. Tensors are named where they are loaded: in the `load`
//!   functions, and for the three tables of the Llama in [`streamed`].
//! - After `open`, a step reads no file, and allocates nothing on the device unless the prompt's
//!   length changed, or a pass has a number of drafts that no pass before it had, or more robots are served together.
//! - Graphs are the same on every device, but for the head of a few rows. What depends on it is where weights are
//!   (`placement`), what drafts cost (`speculative`), and whether robots share passes (`llama`).
//! - No code here is unsafe: that is a matter of `openvla-kernels`.

mod action;
mod any_policy;
mod batch;
#[cfg(feature = "cli")]
pub mod cli;
mod config;
mod decode;
mod encoder;
mod error;
mod explain;
mod layers;
pub mod libero;
mod llama;
mod network;
pub mod oft;
mod options;
mod placement;
mod policy;
mod preprocess;
mod profile;
mod projector;
pub mod prompt;
mod score;
mod session;
mod speculative;
mod statistics;
pub mod streamed;
pub mod tokenizer;
mod vision;

#[doc = include_str!("MODEL.md")]
pub mod format {}

pub use action::{ActionSpace, argmax, dimension_name};
pub use any_policy::Policy;
pub use batch::Request;
pub use config::{
    ARCHITECTURE, ActionCard, BaseModel, Config, Dimension, Expected, General, Gripper,
    LlamaConfig, OftConfig, OftHead, Proof, ProofCase, Source, SourceFile, TowerConfig, checksum,
};
pub use decode::{Header, MAX_PIXELS, decode, decode_within};
pub use encoder::{Features, SoftTokens};
pub use error::{Error, Result};
pub use explain::Explanation;
pub use image;
pub use network::{Network, Sequence};
pub use openvla_kernels::{Device, Gguf, Kernels, Usage};
pub use options::{Decoding, Options};
pub use placement::Devices;
pub use policy::{Action, OpenVla, Timing, Unconstrained};
pub use preprocess::{Normalize, Preprocess, Resize};
pub use profile::Profile;
pub use score::{Statement, TokenScore};
pub use session::{Drafted, Session, Totals};
pub use speculative::Draft;
pub use statistics::{Bounds, Dataset, Scale, Statistics};
