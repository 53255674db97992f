//! In place of `panel` where there is no such CPU: no tensor is in panels.

use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::buffer::Buffer;
use crate::repack::Entry;
use crate::{Backend, Gguf, Mapped, Tensor};

/// There is none.
pub(crate) enum Kind {}

/// There is none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rounding {}

pub(crate) fn available() -> bool {
    false
}

pub(crate) fn suits(_: &Entry<'_>) -> bool {
    false
}

pub(crate) fn kind(_: NonNull<sys::ggml_tensor>) -> Option<&'static Kind> {
    None
}

pub(crate) fn misused(_: NonNull<sys::ggml_tensor>) -> bool {
    false
}

pub(crate) fn copy(_: &Gguf, _: &Arc<Backend>, _: &[Entry<'_>]) -> Option<(Buffer, Mapped)> {
    None
}

pub(crate) fn mul_mat<'g>(_: Tensor<'g>, _: Tensor<'g>, kind: &'static Kind) -> Tensor<'g> {
    match *kind {}
}
