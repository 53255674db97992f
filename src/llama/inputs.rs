//! What a pass reads beside its ids: positions, and what each row may look at.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use openvla_kernels::{Builder, DType, State, Tensor, shape};

use super::{Layer, LayerCache, Rows, Size, mask_row};
use crate::Result;

/// Positions and mask of a pass, on a device that has layers. CUDA's operations take
/// operands in memory of their own device alone, and these are not copied between devices by ggml: each
/// writes a cache, whose device they belong to.
pub(super) struct Inputs {
    positions: State,
    /// Rows of the cache, where they are not the positions.
    places: Option<State>,
    mask: State,
}

impl Inputs {
    /// For a pass over a cache of `n_ctx` rows, on the layer's device.
    fn new(layer: &Layer, size: &Size, n_ctx: usize) -> Result<Self> {
        let rows = || State::ids_beside(layer.keys(), DType::I32, size.n_row, n_ctx);
        Ok(Self {
            positions: rows()?,
            places: size.scattered.then(rows).transpose()?,
            mask: State::beside(layer.keys(), DType::F16, shape(&[size.n_kv, size.n_row]))?,
        })
    }

    /// One for each device that has layers.
    pub fn by_device(
        layers: &[Layer],
        cache: &[LayerCache],
        size: &Size,
    ) -> Result<BTreeMap<usize, Self>> {
        let mut inputs = BTreeMap::new();
        for (layer, cache) in layers.iter().zip(cache) {
            if let Entry::Vacant(place) = inputs.entry(layer.keys().device()) {
                place.insert(Self::new(layer, size, cache.n_ctx())?);
            }
        }
        Ok(inputs)
    }

    /// Its rows are at these positions, and see what is before them.
    pub fn set_positions(&self, at: impl Iterator<Item = usize> + Clone) {
        let n_kv = self.mask.shape()[0];
        self.positions.write(&at.clone().map(|row| row as i32).collect::<Vec<_>>());
        self.mask.write(&at.flat_map(|row| mask_row(row, n_kv)).collect::<Vec<_>>());
    }

    /// The same of rows that may go anywhere: `[n_row]`, `[n_row]` and `[n_kv, n_row]`.
    pub fn set_rows(&self, at: &[i32], places: &[i32], mask: &[u16]) {
        self.positions.write(at);
        self.places.as_ref().expect("a scattered pass").write(places);
        self.mask.write(mask);
    }

    /// As operands of a graph, with the rows `x`.
    pub fn rows<'g>(&self, g: &'g Builder, x: Tensor<'g>) -> Rows<'g> {
        let positions = g.state(&self.positions);
        let places = self.places.as_ref().map_or(positions, |places| g.state(places));
        Rows { x, positions, places, mask: g.state(&self.mask) }
    }
}
