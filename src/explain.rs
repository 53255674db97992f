//! What a policy looked at: attention on the picture's patches, for each token of a motion.

use image::RgbImage;

use crate::Action;

/// A motion, and what its tokens were chosen by.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Explanation {
    /// The motion.
    pub action: Action,
    /// The picture as the towers saw it, `[3, size, size]`.
    pub shown: RgbImage,
    /// For each token that was decoded, how much the row that it was chosen by looked at each patch of the picture:
    /// `[n_patch]`, row by row from the top left. It is the softmax of queries and keys, as the model computes it, in the
    /// mean over all heads of the last quarter of the layers. The sum is what the picture gets of that row's attention;
    /// the rest goes to the prompt, most of it to BOS, and to the tokens before.
    pub attention: Vec<Vec<f64>>,
}

/// The last quarter of the layers, one at least.
pub(crate) fn last_layers(n_layer: usize) -> usize {
    n_layer.div_ceil(4)
}
