//! The same network part by part, for weights that are not in memory all at once: see [`crate::streamed`].

use std::sync::Arc;

use openvla_kernels::{Backend, DType, Gguf, Graph, State, Weights, shape};

use super::film::TowerFilm;
use super::head::{Head, Mlp};
use super::network::StateProjector;
use crate::config::{Config, OftConfig, OftHead};
use crate::error::{Error, Result};
use crate::layers::RmsNorm;
use crate::llama::Layer;
use crate::streamed::{Case, Embedding, OneShot};
use crate::vision::Tower;

/// Runs all cases through each part before the next is asked for, so that every part is asked for once. Returns what
/// the head makes of each case: `[n_action, chunk]` numbers, or `[n_bin, n_action · chunk]` logits of the action ids.
/// `part` returns the tensors whose names start with a prefix; their embedding is F32.
///
/// # Errors
/// What `part` says, or [`Error`] if a part does not fit the config or the device has no room.
///
/// # Panics
/// If the config is not an OpenVLA-OFT's, or a case does not fit it.
pub fn outputs<E: From<Error>>(
    config: &Config,
    backend: &Arc<Backend>,
    cases: &[Case],
    mut part: impl FnMut(&str) -> std::result::Result<Gguf, E>,
) -> std::result::Result<Vec<Vec<f32>>, E> {
    let oft = config.oft.as_ref().expect("an OpenVLA-OFT's config");
    let (run, c) = (OneShot { config, backend }, &config.llama);
    let load = |file: Gguf| Ok::<_, Error>(Weights::load(&file, backend)?);
    let stop = config.vocabulary.eos;
    let ids = cases.iter().flat_map(|case| case.ids.iter().copied()).chain([stop]);
    let embedding = Embedding::of(&part("token_embd.")?, config, ids)?;
    let mut features = vec![Vec::new(); cases.len()];
    for (i, tower) in config.towers.iter().enumerate() {
        let mut weights = load(part(&format!("{}.", tower.name))?)?;
        let film = || TowerFilm::load(&mut weights, config, tower, backend);
        let film = oft.film.then(film).transpose()?;
        let tower = Tower::load(&mut weights, config, tower)?;
        for (case, features) in cases.iter().zip(&mut features) {
            if let Some(film) = &film {
                modulate(film, backend, &language(&embedding, case, stop))?;
            }
            let vectors = film.as_ref();
            features.push(run.tower(&tower, i, &case.planes, &|g, block| {
                vectors.map(|film| film.vectors(g, block))
            })?);
        }
    }
    let mut soft = run.project(&mut load(part("projector.")?)?, &features)?;
    if oft.n_state > 0 {
        let mut weights = load(part("oft.state.")?)?;
        let projector = StateProjector::load(&mut weights, oft.n_state, c.dim)?;
        for (case, soft) in cases.iter().zip(&mut soft) {
            let (from, to) = ([oft.n_state], [c.dim, 1]);
            let n_node = StateProjector::MAX_NODES;
            soft.extend(run.once(n_node, &case.state, &from, &to, |g, x| projector.build(g, x))?);
        }
    }
    let sequence = |(case, soft): (&Case, &Vec<f32>)| {
        let zeros = vec![0.0; c.dim * oft.n_slot()];
        [&embedding.prompt(case, soft), &zeros, embedding.row(stop)].concat()
    };
    let mut sequences: Vec<Vec<f32>> = cases.iter().zip(&soft).map(sequence).collect();
    for i in 0..c.n_layer {
        let layer = Layer::load(&mut load(part(&format!("blk.{i}."))?)?, c, i)?;
        for rows in &mut sequences {
            *rows = pass(&run, &layer, rows, (i + 1 == c.n_layer).then_some(oft))?;
        }
    }
    let norm = RmsNorm::load(&mut load(part("output_norm.")?)?, "output_norm", c.dim, c.eps)?;
    let (from, n_bin) = ([c.dim, oft.n_slot()], config.actions.n_bin as usize);
    let outputs: Result<Vec<Vec<f32>>> = match oft.head {
        OftHead::L1 => {
            let mlp = Mlp::load(&mut load(part("oft.head.")?)?, c.dim, oft)?;
            let to = [oft.n_action, oft.chunk];
            let head = |rows: &Vec<f32>| {
                run.once(Head::MAX_NODES, rows, &from, &to, |g, x| mlp.build(g, norm.build(g, x)))
            };
            sequences.iter().map(head).collect()
        }
        OftHead::Tokens => {
            let mut weights = load(part("action_head.")?)?;
            let table = weights.take("action_head.weight", shape(&[c.dim, n_bin]));
            let table = table.map_err(Error::from)?;
            let to = [n_bin, oft.n_slot()];
            let head = |rows: &Vec<f32>| {
                run.once(8, rows, &from, &to, |g, x| g.weight(&table).mul_mat(norm.build(g, x)))
            };
            sequences.iter().map(head).collect()
        }
    };
    Ok(outputs?)
}

/// The mean of a prompt's embeddings and the stop token's: `[dim]`
fn language(embedding: &Embedding, case: &Case, stop: u32) -> Vec<f32> {
    let mut mean = vec![0.0; embedding.row(stop).len()];
    let share = ((case.ids.len() + 1) as f32).recip();
    for id in case.ids.iter().chain([&stop]) {
        mean.iter_mut().zip(embedding.row(*id)).for_each(|(mean, x)| *mean += share * x);
    }
    mean
}

/// Computes a tower's vectors.
fn modulate(film: &TowerFilm, backend: &Arc<Backend>, mean: &[f32]) -> Result<()> {
    let input = State::zeros(backend, DType::F32, shape(&[mean.len(), 1]))?;
    input.write(mean);
    let mut graph =
        Graph::build(backend, 8 + film.max_nodes(), |g| film.build(g, g.state(&input)))?;
    Ok(graph.compute()?)
}

/// All rows through a layer; of the `last` one, only those that the head reads come out.
fn pass(
    run: &OneShot<'_>,
    layer: &Layer,
    rows: &[f32],
    last: Option<&OftConfig>,
) -> Result<Vec<f32>> {
    let c = &run.config.llama;
    let n_row = rows.len() / c.dim;
    let taken = last.map_or(0..n_row, |oft| {
        let first = n_row - 1 - oft.n_slot() - 1;
        first..first + oft.n_slot()
    });
    let positions = State::ids(run.backend, DType::I32, n_row, n_row)?;
    positions.write(&(0..n_row as i32).collect::<Vec<_>>());
    run.once(Layer::MAX_NODES, rows, &[c.dim, n_row], &[c.dim, taken.len()], |g, x| {
        layer.build_bidirectional(g, x, g.state(&positions), taken, c)
    })
}
