//! How much memory a model takes, by device and purpose.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Weights,
    States,
    Graphs,
}

/// Bytes that a model takes on one device, by what they are for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// The device's name.
    pub device: String,
    /// Weights, those that stay in the mapped file included.
    pub weights: usize,
    /// Inputs, what stages hand on, and the KV cache.
    pub states: usize,
    /// Intermediate tensors of graphs; on the CPU alone, of the largest, whose memory the others use too.
    pub graphs: usize,
}

/// The count of one device.
#[derive(Default)]
pub(crate) struct Counts([AtomicUsize; 3]);

impl Counts {
    pub fn add(&self, what: Use, bytes: usize) {
        self.0[what as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn subtract(&self, what: Use, bytes: usize) {
        self.0[what as usize].fetch_sub(bytes, Ordering::Relaxed);
    }

    pub fn get(&self, what: Use) -> usize {
        self.0[what as usize].load(Ordering::Relaxed)
    }
}
