//! Safe Rust over [ggml](https://github.com/ggml-org/ggml) for one purpose: running OpenVLA.
//!
//! | module | what it holds |
//! |---|---|
//! | [`Gguf`], [`Header`] | the file: a validating reader over a memory map, and the header writer |
//! | [`DType`] | element types, and quantizing rows into them |
//! | [`Device`], [`Backend`], [`Usage`] | GPUs there are; those a model runs on, with the CPU; what it takes there |
//! | [`Kernels`] | whose functions a CPU computes with: ggml's, or our own |
//! | [`Weights`], [`Weight`], [`State`] | tensors that outlive graphs: read-only, and read-write |
//! | [`Graph`], [`Builder`], [`Tensor`] | one stage's computation, built once and run many times |
//! | [`Observer`], [`Squares`] | what graphs multiply weights by |
//! | [`Mapped`] | files and parts of files as byte slices |
//! | [`decode_jpeg_fast`] | a decoder that the `turbojpeg` crate does not offer |
//! | [`parallel_for_each`] | work that several threads share |
//!
//! Shapes are ggml's everywhere: fastest dimension first, four numbers, ones at the end.
//!
//! # What makes it safe
//!
//! ggml checks its arguments by aborting the process. So every method here asserts ggml's
//! conditions first, in Rust, and no value from a file reaches ggml before [`Gguf`] has checked it
//! against the file's length. Memory is kept alive by reference counts: a graph holds on to
//! the weights and states it names, those to their buffer, the buffer to its file and its backend.
//! A backend runs one thing at a time, behind a lock, so handles may be used from any thread; graphs on the CPU
//! alone, which are told where their tensors lie before they run, use one piece of its memory.

mod backend;
mod buffer;
mod builder;
mod bus_error;
mod context;
mod custom;
mod device;
mod dtype;
mod error;
mod exceptions;
mod finite;
mod gguf;
mod graph;
mod guard;
mod header;
mod heads;
mod jpeg;
mod kernels;
mod mapped;
mod memory;
mod observer;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod openmp;
mod own;
mod repack;
mod scheduler;
mod scratch;
mod state;
mod tensor;
mod threads;
mod usage;
mod value;

pub use backend::Backend;
pub use builder::{Builder, Tensor};
pub use bus_error::exit_on_bus_error;
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use gguf::{Gguf, TensorInfo};
pub use graph::Graph;
pub use header::{ALIGNMENT, Header, MAX_TENSOR_NAME};
pub use jpeg::decode_jpeg_fast;
pub use kernels::Kernels;
pub use mapped::Mapped;
pub use memory::{Weight, Weights};
pub use observer::{Observer, Squares};
pub use state::State;
pub use threads::parallel_for_each;
pub use usage::Usage;
pub use value::{Array, Value};

/// Sizes of a tensor, fastest dimension first, ones at the end.
pub type Shape = [usize; 4];

/// `dims` with ones at the end.
///
/// # Panics
/// If there are more than four.
pub fn shape(dims: &[usize]) -> Shape {
    assert!(dims.len() <= 4, "ggml tensors have at most four dimensions, not {dims:?}");
    let mut shape = [1; 4];
    shape[..dims.len()].copy_from_slice(dims);
    shape
}
