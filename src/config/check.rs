//! What graphs and arithmetic rely on, held against a [`Config`] before anything uses it.

use super::{Config, OftConfig, cards, key};
use crate::action::ActionSpace;
use crate::preprocess::Normalize;
use crate::profile::SIZES;
use crate::statistics::Scale;
use crate::{Error, Result};

/// Larger than any width of an OpenVLA: what a wrong size can make a device allocate ends here.
const MAX_SIZE: usize = 1 << 16;
/// More blocks than any. ggml walks a tower's graph by recursion, which needs stack.
const MAX_BLOCKS: usize = 128;
/// More rows than any Llama-2 was made for: a prompt's mask is their number squared.
const MAX_ROWS: usize = 1 << 14;
/// More than any tower's class and register tokens.
const MAX_PREFIX: usize = 64;
/// More than any projector's, which are three or four.
const MAX_WIDTHS: usize = 8;

impl Config {
    /// What graphs and arithmetic rely on. The converter calls this too, before it writes anything.
    ///
    /// # Errors
    /// [`Error::Model`] names a number that cannot be, or says which two do not fit together.
    pub fn check(&self) -> Result<()> {
        self.check_numbers()?;
        let (size, patch) = (self.preprocess.size as usize, self.patch_size);
        demand(size.is_multiple_of(patch), || {
            format!("`{}` is {size}, no whole number of patches of {patch}", key::IMAGE_SIZE)
        })?;
        let l = &self.llama;
        demand(self.n_patch() < l.n_ctx, || {
            let (rows, n_patch) = (key::N_CTX, self.n_patch());
            format!("`{rows}` is {}, which the image's {n_patch} patches do not fit", l.n_ctx)
        })?;
        let joined: usize = self.towers.iter().map(|t| t.dim).sum();
        demand((self.projector[0], self.projector.last()) == (joined, Some(&l.dim)), || {
            let (key, widths) = (key::PROJECTOR, &self.projector);
            format!("`{key}` is {widths:?}; from the towers' {joined} to {} is needed", l.dim)
        })?;
        for t in &self.towers {
            demand(t.dim.is_multiple_of(t.n_head), || {
                let key = t.key("attention.head_count");
                format!("`{key}` is {}, which does not divide {} channels", t.n_head, t.dim)
            })?;
        }
        let fit = l.dim.is_multiple_of(2 * l.n_head) && l.n_head.is_multiple_of(l.n_head_kv);
        demand(fit, || {
            let (q, kv) = (key::N_HEAD, key::N_HEAD_KV);
            format!("`{q}` is {} and `{kv}` {} for {} channels", l.n_head, l.n_head_kv, l.dim)
        })?;
        self.check_ids()?;
        if let Some(oft) = &self.oft {
            oft.check(self.towers.len(), self.n_patch(), l.n_ctx)?;
            self.check_datasets(oft)?;
        }
        cards::check(&self.cards, &self.statistics)
    }

    /// That every data set is of the arm that the head and the state projector are for.
    fn check_datasets(&self, oft: &OftConfig) -> Result<()> {
        for (name, dataset) in self.statistics.datasets() {
            let n_state = dataset.state.as_ref().map_or(0, Scale::n);
            demand((dataset.action.n(), n_state) == (oft.n_action, oft.n_state), || {
                format!(
                    "its statistics of `{name}` are of {} numbers an action and {n_state} of state; the model's have {} and {}",
                    dataset.action.n(),
                    oft.n_action,
                    oft.n_state
                )
            })?;
        }
        Ok(())
    }

    /// Each number by itself: it may be a divisor, and decides how much is allocated.
    fn check_numbers(&self) -> Result<()> {
        let n_tower = self.towers.len();
        demand((1..=2).contains(&n_tower), || {
            format!("`{}` names {n_tower} vision towers, not 1 or 2", key::TOWERS)
        })?;
        let sizes = SIZES;
        demand(sizes.contains(&self.preprocess.size), || {
            let (least, most) = (sizes.start(), sizes.end());
            format!("`{}` is {}, not {least} to {most}", key::IMAGE_SIZE, self.preprocess.size)
        })?;
        let widths = &self.projector;
        let possible = widths.iter().all(|n| (1..=MAX_SIZE).contains(n));
        demand(possible && (2..=MAX_WIDTHS).contains(&widths.len()), || {
            let shown = &widths[..widths.len().min(MAX_WIDTHS)];
            format!("`{}` is {} widths, {shown:?}", key::PROJECTOR, widths.len())
        })?;
        for (key, n, [least, most]) in self.sizes() {
            demand((least..=most).contains(&n), || {
                format!("`{key}` is {n}; {least} to {most} is possible")
            })?;
        }
        let l = &self.llama;
        let towers = self.towers.iter().map(|t| (t.key("attention.layer_norm_epsilon"), t.eps));
        let own = [(key::EPS, l.eps), (key::ROPE_BASE, l.rope_base)];
        for (key, x) in towers.chain(own.map(|(key, x)| (key.to_owned(), x))) {
            demand(x.is_finite() && x > 0.0, || format!("`{key}` is {x}; more than 0 is needed"))?;
        }
        for (tower, Normalize { mean, std }) in self.towers.iter().zip(&self.preprocess.towers) {
            let sound =
                mean.iter().all(|x| x.is_finite()) && std.iter().all(|x| x.is_finite() && *x > 0.0);
            demand(sound, || {
                let (means, stds) = (tower.key("image_mean"), tower.key("image_std"));
                format!("`{means}` is {mean:?} and `{stds}` {std:?}; one cannot be")
            })?;
        }
        Ok(())
    }

    /// Counts and widths by key, with the least and the most they can be.
    fn sizes(&self) -> Vec<(String, usize, [usize; 2])> {
        let l = &self.llama;
        let own = [
            (key::PATCH_SIZE, self.patch_size, MAX_SIZE),
            (key::DIM, l.dim, MAX_SIZE),
            (key::N_LAYER, l.n_layer, MAX_BLOCKS),
            (key::N_HEAD, l.n_head, MAX_SIZE),
            (key::N_HEAD_KV, l.n_head_kv, MAX_SIZE),
            (key::N_FF, l.n_ff, MAX_SIZE),
            (key::N_VOCAB, l.n_vocab, MAX_SIZE),
            (key::N_CTX, l.n_ctx, MAX_ROWS),
        ];
        let mut sizes = own.map(|(key, n, most)| (key.to_owned(), n, [1, most])).to_vec();
        for t in &self.towers {
            sizes.extend([
                (t.key("embedding_length"), t.dim, [1, MAX_SIZE]),
                (t.key("block_count"), t.n_layer, [1, MAX_BLOCKS]),
                (t.key("attention.head_count"), t.n_head, [1, MAX_SIZE]),
                (t.key("feed_forward_length"), t.n_ff, [1, MAX_SIZE]),
                (t.key("prefix_length"), t.n_prefix, [0, MAX_PREFIX]),
            ]);
        }
        sizes
    }

    /// Ids that index embeddings and logits.
    fn check_ids(&self) -> Result<()> {
        let (n_vocab, n_token) = (self.llama.n_vocab, self.vocabulary.tokens.len());
        demand(n_token == n_vocab, || {
            format!("`{}` has {n_token} pieces for {n_vocab} embeddings", key::TOKENS)
        })?;
        let ActionSpace { end, n_bin } = self.actions;
        // There are other ids on both sides: BOS among those before, padding after.
        demand((3..end).contains(&n_bin) && (end as usize) < n_vocab, || {
            let (count, last) = (key::ACTION_BINS, key::ACTION_END);
            format!("`{count}` is {n_bin} and `{last}` {end} in a vocabulary of {n_vocab}")
        })?;
        let suffix = self.prompt.suffix;
        demand((suffix as usize) < n_vocab && suffix != self.vocabulary.bos, || {
            format!("`{}` is {suffix}, which cannot end a prompt", key::SUFFIX)
        })
    }
}

/// [`Error::Model`] unless `holds`.
pub(super) fn demand(holds: bool, why: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Model { why: why() }) }
}
