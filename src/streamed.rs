//! The same networks part by part, for weights that are not in memory all at once: a converter
//! computes in f32 with a layer's worth of room, whatever the size of the checkpoint.
//!
//! A part is all tensors with a prefix: a tower, the projector, the embedding, a layer, the head.
//! All cases run through a part before the next is asked for, so a layer is asked for once per
//! token, and everything else once.

use std::collections::BTreeMap;
use std::sync::Arc;

use openvla_kernels::{Backend, Builder, DType, Gguf, Graph, State, Tensor, Weights, shape};

use crate::action::argmax;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::layers::RmsNorm;
use crate::llama::{Layer, LayerCache, Rows, TABLES, mask_row};
use crate::projector::Projector;
use crate::vision::{Modulation, Tower};

/// What a motion depends on.
#[derive(Debug, Clone)]
pub struct Case {
    /// Normalised planes `[size, size, 3 · n_tower · n_camera]`.
    pub planes: Vec<f32>,
    /// The prompt: BOS and more.
    pub ids: Vec<u32>,
    /// The arm's state in -1..1: `[n_state]`.
    pub state: Vec<f32>,
}

/// What a case comes to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decoded {
    /// The best of the action ids at each step.
    pub tokens: Vec<u32>,
    /// Logits of the action ids at each step.
    pub logits: Vec<Vec<f32>>,
}

/// Decodes `n_token` tokens of every case, greedily among the action ids. `part` gives the tensors
/// whose names start with a prefix; their embedding is F32.
///
/// # Errors
/// What `part` says, or [`Error`] if a part does not fit the config or the device has no room.
///
/// # Panics
/// If a case's planes are of another size, or its ids are not a prompt.
pub fn decode<E: From<Error>>(
    config: &Config,
    backend: &Arc<Backend>,
    cases: &[Case],
    n_token: usize,
    mut part: impl FnMut(&str) -> std::result::Result<Gguf, E>,
) -> std::result::Result<Vec<Decoded>, E> {
    let run = OneShot { config, backend };
    let load = |file: Gguf| Ok::<_, Error>(Weights::load(&file, backend)?);
    let mut features = vec![Vec::new(); cases.len()];
    for (i, tower) in config.towers.iter().enumerate() {
        let mut weights = load(part(&format!("{}.", tower.name))?)?;
        let tower = Tower::load(&mut weights, config, tower)?;
        for (case, features) in cases.iter().zip(&mut features) {
            features.push(run.tower(&tower, i, &case.planes, &|_, _| None)?);
        }
    }
    let soft = run.project(&mut load(part("projector.")?)?, &features)?;
    let ids = cases.iter().flat_map(|case| case.ids.iter().copied()).chain(config.actions.ids());
    let embedding = Embedding::of(&part("token_embd.")?, config, ids)?;
    let norm = RmsNorm::load(
        &mut load(part("output_norm.")?)?,
        "output_norm",
        config.llama.dim,
        config.llama.eps,
    )?;
    let n_bin = config.actions.n_bin as usize;
    let head = load(part("action_head.")?)?
        .take("action_head.weight", shape(&[config.llama.dim, n_bin]))
        .map_err(Error::from)?;

    let begin = |(case, soft): (&Case, &Vec<f32>)| {
        Sequence::begin(&run, embedding.prompt(case, soft), n_token)
    };
    let mut sequences: Vec<_> = cases.iter().zip(&soft).map(begin).collect::<Result<_>>()?;
    for step in 0..n_token {
        for i in 0..config.llama.n_layer {
            let mut weights = load(part(&format!("blk.{i}."))?)?;
            let layer = Layer::load(&mut weights, &config.llama, i)?;
            for sequence in &mut sequences {
                sequence.pass(&run, &layer, i)?;
            }
        }
        for sequence in &mut sequences {
            let last = &sequence.rows[sequence.rows.len() - config.llama.dim..];
            let logits = run.once(8, last, &[config.llama.dim], &[n_bin], |g, x| {
                g.weight(&head).mul_mat(norm.build(g, x))
            })?;
            let best = argmax(&logits, 0..n_bin as u32, step)?;
            sequence.append(config.actions.ids().start + best, logits, &embedding);
        }
    }
    Ok(sequences.into_iter().map(|sequence| sequence.decoded).collect())
}

/// FiLM's scale and shift of a block.
pub(crate) type TowerFilm<'f> = dyn for<'g> Fn(&'g Builder, usize) -> Modulation<'g> + 'f;

/// Runs graphs that are used once.
pub(crate) struct OneShot<'a> {
    pub config: &'a Config,
    pub backend: &'a Arc<Backend>,
}

impl OneShot<'_> {
    /// `x` of the shape `from` to the elements of `to`.
    pub fn once(
        &self,
        max_nodes: usize,
        x: &[f32],
        from: &[usize],
        to: &[usize],
        build: impl for<'g> FnOnce(&'g Builder, Tensor<'g>) -> Tensor<'g>,
    ) -> Result<Vec<f32>> {
        let state = |dims: &[usize]| State::zeros(self.backend, DType::F32, shape(dims));
        let (input, output) = (state(from)?, state(to)?);
        input.write(x);
        let mut graph = Graph::build(self.backend, max_nodes, |g| {
            g.store(build(g, g.state(&input)), &output);
        })?;
        graph.compute()?;
        Ok(output.read())
    }

    /// Planes to the features of one tower, `[dim, n_patch · n_camera]`.
    pub fn tower(
        &self,
        tower: &Tower,
        i: usize,
        planes: &[f32],
        film: &TowerFilm<'_>,
    ) -> Result<Vec<f32>> {
        let size = self.config.preprocess.size as usize;
        let from = [size, size, 3 * self.config.towers.len()];
        let to = [self.config.towers[i].dim, self.config.n_patch()];
        let mut features = Vec::new();
        for planes in planes.chunks(from.iter().product()) {
            features.extend(self.once(tower.max_nodes(), planes, &from, &to, |g, planes| {
                tower.build(g, planes.slice(2, 3 * i, 3), &|block| film(g, block))
            })?);
        }
        Ok(features)
    }

    /// Features of each case's towers to its soft tokens, `[dim, n_patch · n_camera]`.
    pub fn project(
        &self,
        weights: &mut Weights,
        features: &[Vec<Vec<f32>>],
    ) -> Result<Vec<Vec<f32>>> {
        let projector = Projector::load(weights, self.config)?;
        let soft = |towers: &Vec<Vec<f32>>| {
            let features = join(towers, self.config);
            let n_patch = features.len() / self.config.projector[0];
            let (from, to) =
                ([self.config.projector[0], n_patch], [self.config.llama.dim, n_patch]);
            self.once(projector.max_nodes(), &features, &from, &to, |g, x| projector.build(g, x))
        };
        features.iter().map(soft).collect()
    }
}

/// The towers' channels side by side: `[Σ dim, n_patch · n_camera]`.
fn join(towers: &[Vec<f32>], config: &Config) -> Vec<f32> {
    let rows = |patch: usize| {
        let towers = towers.iter().zip(&config.towers);
        towers.flat_map(move |(x, tower)| &x[patch * tower.dim..][..tower.dim])
    };
    let n_patch = towers[0].len() / config.towers[0].dim;
    (0..n_patch).flat_map(rows).copied().collect()
}

/// The rows of the embedding that cases and motions need, by id.
pub(crate) struct Embedding(BTreeMap<u32, Vec<f32>>);

impl Embedding {
    pub fn of(file: &Gguf, config: &Config, ids: impl Iterator<Item = u32>) -> Result<Self> {
        let table = file
            .tensor(TABLES[0])
            .filter(|t| t.dtype == DType::F32 && t.shape[0] == config.llama.dim);
        let table = table.ok_or_else(|| Error::Model {
            why: format!("its embedding is no F32 of {} columns", config.llama.dim),
        })?;
        let row_bytes = 4 * config.llama.dim;
        let bytes = &file.bytes()[table.range.clone()];
        let row = |id: u32| DType::F32.decode(&bytes[id as usize * row_bytes..][..row_bytes]);
        Ok(Self(ids.map(|id| (id, row(id))).collect()))
    }

    /// `[dim]`
    pub fn row(&self, id: u32) -> &[f32] {
        &self.0[&id]
    }

    /// `[emb(BOS)] + soft tokens + emb(the other ids)`: `[dim, n_row]`
    pub fn prompt(&self, case: &Case, soft: &[f32]) -> Vec<f32> {
        let (bos, rest) = case.ids.split_first().expect("a prompt has BOS");
        let rest = rest.iter().flat_map(|id| &self.0[id]);
        self.0[bos].iter().chain(soft).chain(rest).copied().collect()
    }
}

/// A case on its way through the layers.
struct Sequence {
    /// Of this sweep, `[dim, n_row]`: what the next layer reads.
    rows: Vec<f32>,
    /// Rows of the sweeps before.
    n_past: usize,
    n_ctx: usize,
    /// Of every layer.
    cache: Vec<LayerCache>,
    decoded: Decoded,
}

impl Sequence {
    fn begin(run: &OneShot<'_>, rows: Vec<f32>, n_token: usize) -> Result<Self> {
        let c = &run.config.llama;
        let n_ctx = (rows.len() / c.dim + n_token).next_multiple_of(32);
        let zeros = |shape| Ok(State::zeros(run.backend, DType::F32, shape)?);
        let layer = |_| LayerCache::new(c, n_ctx, zeros);
        let cache = (0..c.n_layer).map(layer).collect::<Result<_>>()?;
        Ok(Self { rows, n_past: 0, n_ctx, cache, decoded: Decoded::default() })
    }

    /// Through layer `i`.
    fn pass(&mut self, run: &OneShot<'_>, layer: &Layer, i: usize) -> Result<()> {
        let c = &run.config.llama;
        let n_row = self.rows.len() / c.dim;
        let at = self.n_past..self.n_past + n_row;
        let state = |dtype, dims: &[usize]| State::zeros(run.backend, dtype, shape(dims));
        let positions = State::ids(run.backend, DType::I32, n_row, self.n_ctx)?;
        let mask = state(DType::F16, &[self.n_ctx, n_row])?;
        positions.write(&at.clone().map(|row| row as i32).collect::<Vec<_>>());
        mask.write(&at.flat_map(|row| mask_row(row, self.n_ctx)).collect::<Vec<_>>());
        let shape = [c.dim, n_row];
        self.rows = run.once(Layer::MAX_NODES, &self.rows, &shape, &shape, |g, x| {
            let positions = g.state(&positions);
            let rows = Rows { x, positions, places: positions, mask: g.state(&mask) };
            layer.build(g, &rows, &self.cache[i], rows.x.shape()[1], c)
        })?;
        Ok(())
    }

    /// Ends a sweep with a token, whose embedding begins the next.
    fn append(&mut self, token: u32, logits: Vec<f32>, embedding: &Embedding) {
        self.n_past += self.rows.len() / embedding.0[&token].len();
        self.rows.clone_from(&embedding.0[&token]);
        self.decoded.tokens.push(token);
        self.decoded.logits.push(logits);
    }
}
