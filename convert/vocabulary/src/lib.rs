//! Learns a vocabulary in Llama-2's layout from sentences, and writes it as the tokenizer files of a
//! Hugging Face checkpoint: for random checkpoints, and for models that are trained on a simulation.
//!
//! | file | what it does |
//! |---|---|
//! | `learn.rs` | sentences to pieces, by byte-pair encoding |
//! | `json.rs` | JSON files as Hugging Face writes them |
//! | `files.rs` | pieces to `tokenizer.model`, `tokenizer.json` and the files that name special tokens |
//!
//! Nothing here depends on the machine: no clock and no hash order. The same sentences make the same
//! bytes everywhere.

mod files;
mod json;
mod learn;

pub use files::{write_fast_tokenizer, write_tokenizer};
pub use json::{write_file, write_json};
pub use learn::{Piece, PieceType, learn};
