//! Activations that are not finite, which ggml's kernels would round to arbitrary numbers.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::finite::are_finite;
use crate::{Error, Result};

/// Whether the activations of a product were finite when its graph last ran.
pub(crate) struct Guard {
    weight: String,
    failed: AtomicBool,
}

impl Guard {
    /// Of activations that `weight` is multiplied by.
    pub fn new(weight: String) -> Self {
        Self { weight, failed: AtomicBool::new(false) }
    }

    /// Looks at some of the activations.
    pub fn look(&self, x: &[f32]) {
        if !are_finite(x) {
            self.failed.store(true, Ordering::Relaxed);
        }
    }

    /// What was found since the last call.
    ///
    /// # Errors
    /// [`Error::NotFinite`] names the weight.
    pub fn check(&self) -> Result<()> {
        if self.failed.swap(false, Ordering::Relaxed) {
            return Err(Error::NotFinite { weight: self.weight.clone() });
        }
        Ok(())
    }
}
