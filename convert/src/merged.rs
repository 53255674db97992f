//! How often an adapter was merged into the weights of an OpenVLA-OFT run: a run's folder has the adapter that its
//! weights contain, and scripts that merge it once more leave no other trace.
//!
//! ref: openvla-oft `vla-scripts/merge_lora_weights_and_save.py`

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::checkpoint::{ADAPTER_FOLDER, read_weights};
use crate::lora::Adapter;
use crate::tensors::Tensors;

/// Matrices that are looked at, and rows of each: a few hundred thousand numbers, whose rounding errors cancel out.
const MATRICES: usize = 4;
/// See [`MATRICES`].
const ROWS: usize = 64;

/// Checks that the weights of a run contain its adapter once, given the model `base` that it was trained from.
///
/// # Errors
/// Says how often it was merged, or names what is missing or damaged.
pub fn check(run: &Path, base: &Path) -> Result<()> {
    let ((weights, _), (original, _)) = (read_weights(run)?, read_weights(base)?);
    let adapter = Adapter::open(&run.join(ADAPTER_FOLDER), &original)?;
    let (shown, base) = (run.display(), base.display());
    let times = times_merged(&weights, &original, &adapter)?;
    let times = times.with_context(|| {
        format!(
            "the adapter of {shown} changes no matrix of {base}; was it trained from another model?"
        )
    })?;
    match times {
        0.5..1.5 => Ok(()),
        ..0.5 => bail!(
            "the weights of {shown} differ from those of {base} by {times:.2} times what its adapter adds, so that was not \
             merged; remove the weights, and it will be"
        ),
        _ => bail!(
            "the weights of {shown} differ from those of {base} by {times:.2} times what its adapter adds: it was merged \
             more than once. Remove the weights, and it will be merged once"
        ),
    }
}

/// The least-squares `k` of `W - base = k · scale · B·A` over some matrices; nothing if the adapter is zero there.
fn times_merged(weights: &Tensors, base: &Tensors, adapter: &Adapter) -> Result<Option<f64>> {
    let is_changed = |name: &&String| {
        name.starts_with("language_model.")
            && adapter.changes(name)
            && weights.entries().contains_key(*name)
    };
    let changed: Vec<&String> = base.entries().keys().filter(is_changed).collect();
    let (mut along, mut square) = (0.0, 0.0);
    for i in 0..MATRICES.min(changed.len()) {
        let name = changed[i * changed.len() / MATRICES.min(changed.len())];
        let Some(delta) = adapter.delta(name)? else { continue };
        [weights, base].iter().try_for_each(|tensors| tensors.check_type(name))?;
        let (got, from) = (weights.matrix(name)?, base.matrix(name)?);
        if (got.row, got.n_row) != (from.row, from.n_row) {
            bail!("{name} of the run has another shape than the base model's");
        }
        let mut rows = [vec![0.0; got.row], vec![0.0; got.row], vec![0.0; got.row]];
        let n_row = ROWS.min(got.n_row);
        for row in (0..n_row).map(|j| j * got.n_row / n_row) {
            let [x, y, added] = &mut rows;
            got.read(row * got.row, x);
            from.read(row * got.row, y);
            added.fill(0.0);
            delta.add(row * got.row, added);
            for ((x, y), added) in x.iter().zip(&*y).zip(&*added) {
                let added = f64::from(*added);
                along += (f64::from(*x) - f64::from(*y)) * added;
                square += added * added;
            }
        }
    }
    Ok((square > 0.0).then(|| along / square))
}
