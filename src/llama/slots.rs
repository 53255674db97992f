//! Prompts of several robots in one cache, and passes whose rows are tokens of any of them: the weights are read once
//! for all.
//!
//! A prompt is read by itself as ever, and what the cache has of it then moves to a slot, so that the next can be read. A
//! pass's mask shows each row its own slot alone.
//!
//! A row's logits are bit for bit those that it has alone, where the kernels see to it ([`Slots::new`] says which): our
//! products of quantized matrices compute each column by itself, ggml's attention of a few rows each row by itself and
//! leaves out what the mask hides, and norms, rotations and sums are of single rows anyway.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use openvla_kernels::{Backend, Graph};

use super::{Cache, HIDDEN, Llama, Model, Pass, SEEN, Size, device_ids, n_ctx};
use crate::Result;

/// ggml's attention of a single row sums a cache of so many rows in parts, one for each thread, and of several rows
/// never: prompts that need such a cache stay alone. This also bounds the memory of slots.
const TOO_LONG: usize = 512;

/// A pass of a single row has another row for company, so that attention does not sum the whole cache in parts.
const MIN_ROWS: usize = 2;

pub(super) struct Slots {
    /// Whether a pass of several rows computes for each what a pass of one does, or as good as that.
    suit: bool,
    /// How many are wanted, and the rows of each, the last of which no token takes.
    wanted: [usize; 2],
    /// Rows that are written, of each that is taken.
    taken: Vec<usize>,
    shared: Option<Shared>,
}

/// What takes memory.
struct Shared {
    cache: Cache,
    /// By the number of rows.
    passes: BTreeMap<usize, Pass>,
}

impl Slots {
    /// None yet. On a CPU they suit our own kernels and a Llama whose matrices those have packed: ggml's round otherwise
    /// for one row than for several, and cost more than half as much for each further one. On GPUs, which gain the
    /// most, they always suit, and near-ties may be resolved differently than alone.
    pub fn new(model: &Model, backend: &Backend) -> Self {
        let suit = match backend.n_device() {
            1 => backend.has_own_kernels() && model.matrices().all(|matrix| matrix.is_packed()),
            _ => true,
        };
        Self { suit, wanted: [0; 2], taken: Vec::new(), shared: None }
    }
}

impl Shared {
    fn n_ctx(&self) -> usize {
        self.cache[0].n_ctx()
    }
}

impl Llama {
    /// Whether a pass may have rows of several robots.
    pub fn shares_passes(&self) -> bool {
        self.slots.suit
    }

    /// Frees all slots, and notes that one for each of these numbers of prompt rows is wanted. Takes no memory yet.
    pub fn plan_slots(&mut self, n_rows: &[usize]) {
        let rows = n_rows.iter().map(|n_row| n_ctx(n_row + self.n_token_max));
        let short: Vec<usize> = rows.filter(|n| *n < TOO_LONG).collect();
        self.slots.wanted = [short.len(), short.into_iter().max().unwrap_or(0)];
        self.slots.taken.clear();
    }

    /// Copies what was read last, a prompt and perhaps tokens, to a free slot, and returns its number. `None` if it had
    /// better stay alone, or no slot was planned for it.
    ///
    /// # Panics
    /// Without a prefill before.
    pub fn park(&mut self) -> Result<Option<usize>> {
        let (graphs, slots) =
            (self.graphs.as_ref().expect("a prefill comes first"), &mut self.slots);
        let [n_slot, n_slot_row] = slots.wanted;
        let (slot, n_past) = (slots.taken.len(), graphs.n_past);
        let fits = slot < n_slot && graphs.n_row + self.n_token_max <= n_slot_row;
        if !slots.suit || !fits || graphs.n_ctx >= TOO_LONG {
            return Ok(None);
        }
        if slots.shared.as_ref().is_none_or(|shared| shared.n_ctx() < n_slot * n_slot_row) {
            assert_eq!(slot, 0, "slots are planned before any is taken");
            slots.shared = None; // gives its memory back before the next takes some
            let cache = self.model.cache(n_slot * n_slot_row)?;
            slots.shared = Some(Shared { cache, passes: BTreeMap::new() });
        }
        let shared = slots.shared.as_ref().expect("made above");
        let mut copy = Graph::build(&self.backend, 8 * shared.cache.len(), |g| {
            for (from, to) in graphs.cache.iter().zip(&shared.cache) {
                from.copy(g, n_past, to, slot * n_slot_row);
            }
        })?;
        copy.compute()?;
        slots.taken.push(n_past);
        Ok(Some(slot))
    }

    /// Appends tokens to what is in slots, in one pass: of each slot its number and its tokens. Gives the logits after
    /// each token, `[n_vocab]`, slot by slot.
    ///
    /// # Panics
    /// Without any token, with one that is not a row of the embedding, for a slot that is not taken, or with more than
    /// its longest motion has left.
    pub fn step_slots(&mut self, rows: &[(usize, Vec<u32>)]) -> Result<Vec<Vec<Vec<f32>>>> {
        let (model, slots) = (&self.model, &mut self.slots);
        let ([_, n_slot_row], shared) =
            (slots.wanted, slots.shared.as_mut().expect("a slot is taken"));
        let n_ctx = shared.n_ctx();
        let mut ids: Vec<u32> = Vec::new();
        let (mut positions, mut places, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        let mut add = |id, start: usize, position: usize, seen: usize| {
            ids.push(id);
            positions.push(position as i32);
            places.push((start + position) as i32);
            let mut row = vec![HIDDEN; n_ctx];
            row[start + position + 1 - seen..=start + position].fill(SEEN);
            mask.extend(row);
        };
        for (slot, tokens) in rows {
            let n_past = &mut slots.taken[*slot];
            assert!(
                *n_past + tokens.len() < n_slot_row,
                "more steps than the longest motion has tokens"
            );
            for token in tokens {
                add(*token, slot * n_slot_row, *n_past, *n_past + 1);
                *n_past += 1;
            }
        }
        let counts: Vec<usize> = rows.iter().map(|(_, tokens)| tokens.len()).collect();
        let n_real: usize = counts.iter().sum();
        assert!(n_real > 0, "a step is a token or more");
        for _ in n_real..MIN_ROWS {
            add(0, rows[0].0 * n_slot_row, n_slot_row - 1, 1); // looks at itself, and nobody at it
        }
        let n = ids.len();
        let pass = match shared.passes.entry(n) {
            Entry::Occupied(pass) => pass.into_mut(),
            Entry::Vacant(place) => {
                let size = Size { n_id: n, n_row: n, n_kv: n_ctx, n_out: n, scattered: true };
                place.insert(model.pass(&self.backend, &shared.cache, size, None)?)
            }
        };
        pass.set_rows(&positions, &places, &mask);
        let mut logits = pass.run(&device_ids(&ids, model.config.n_vocab))?.into_iter();
        Ok(counts.into_iter().map(|n| logits.by_ref().take(n).collect()).collect())
    }

    /// Takes the last `n` rows of a slot back: tokens that were drafted wrongly.
    pub fn forget_in(&mut self, slot: usize, n: usize) {
        self.slots.taken[slot] -= n;
    }
}
