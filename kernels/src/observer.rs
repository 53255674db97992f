//! What weights are multiplied by: the squares of it, which say how much each column counts.
//!
//! The inputs of products stay in memory until their graph has run and are summed on the host, so
//! an observed graph computes what it computes anyway, bit for bit, but needs room for all of them.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use llama_cpp_sys_2 as sys;

use crate::Shape;
use crate::exceptions::openvla_tensor_get;

/// The squares of what a weight `[n_in, n_out]` was multiplied by.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Squares {
    /// Their sum over all rows, per column: `[n_in]`.
    pub sums: Vec<f64>,
    /// Rows that were summed.
    pub n_row: u64,
}

/// Where a weight's squares are added up, whichever graph multiplies by it.
#[derive(Clone, Default)]
pub(crate) struct Sink(Arc<Mutex<Squares>>);

impl Sink {
    /// Adds rows of `n_in` numbers.
    fn add(&self, rows: &[f32], n_in: usize) {
        let mut squares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        squares.sums.resize(n_in, 0.0);
        for row in rows.chunks_exact(n_in) {
            squares.n_row += 1;
            squares.sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
        }
    }
}

/// Sees what graphs multiply the weights of a file by: [`crate::Weights::observe`] makes one. The
/// default sees nothing.
#[derive(Default)]
pub struct Observer(pub(crate) BTreeMap<String, Sink>);

impl Observer {
    /// What was seen so far, by weight; without those that nothing was multiplied by.
    pub fn squares(&self) -> BTreeMap<String, Squares> {
        let squares = |sink: &Sink| sink.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let all = self.0.iter().map(|(name, sink)| (name.clone(), squares(sink)));
        all.filter(|(_, squares)| squares.n_row > 0).collect()
    }
}

/// The input of a product in a graph, which keeps it alive.
pub(crate) struct Observed {
    x: NonNull<sys::ggml_tensor>,
    n_in: usize,
    n_row: usize,
    sink: Sink,
}

impl Observed {
    /// `x` must be contiguous f32 of this shape, and an output of its graph.
    pub fn new(x: NonNull<sys::ggml_tensor>, [n_in, rows @ ..]: Shape, sink: Sink) -> Self {
        Self { x, n_in, n_row: rows.iter().product(), sink }
    }

    /// The input's node.
    pub fn raw(&self) -> *mut sys::ggml_tensor {
        self.x.as_ptr()
    }

    /// Adds what the graph, which has just run, multiplied the weight by. Under the backend's lock.
    pub fn add(&self) {
        let mut rows = vec![0.0_f32; self.n_in * self.n_row];
        let bytes = std::mem::size_of_val(rows.as_slice());
        // SAFETY: the tensor is alive, allocated, and holds exactly that many bytes of f32; the
        // lock keeps graphs from running meanwhile.
        unsafe { openvla_tensor_get(self.x.as_ptr(), rows.as_mut_ptr().cast(), bytes) };
        self.sink.add(&rows, self.n_in);
    }
}
