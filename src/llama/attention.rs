//! Where the Llama looks: the attention that its other graphs compute and do not keep, in a pass of its own.
//!
//! in   prompt ids, `[4096, n_patch]` soft tokens, and the motion's tokens but the last
//! out  for each token of the motion, how much its row looks at each row before: `[n_row]`

use openvla_kernels::{DType, Graph, State, shape};

use super::{Inputs, Layer, Llama, Size, device_ids};
use crate::Result;

impl Llama {
    /// Attention of the rows that `tokens`, and one more after them, were chosen by: of each, `[n_row]` that sum to one,
    /// the mean over all heads of the last `n_layer` layers. The prompt `ids` is that of the last prefill.
    ///
    /// Scores are ordinary products of the graph, whose other nodes are those of every pass; their softmax is taken here,
    /// in f64.
    ///
    /// # Panics
    /// Without a prefill of so many ids before, or if there are as many tokens as the longest motion has.
    pub fn attention(
        &mut self,
        ids: &[u32],
        soft: &State,
        tokens: &[u32],
        n_layer: usize,
    ) -> Result<Vec<Vec<f64>>> {
        assert!(tokens.len() < self.n_token_max, "more tokens than the longest motion has");
        let (model, c) = (&self.model, &self.model.config);
        let graphs = self.graphs.as_ref().expect("a prefill comes first");
        assert_eq!(graphs.n_id, ids.len(), "a prefill of this prompt comes first");
        let all = device_ids(&[ids, tokens].concat(), c.n_vocab);
        let (n_row, n) = (graphs.n_row + tokens.len(), 1 + tokens.len());
        let explained = c.n_layer.saturating_sub(n_layer)..c.n_layer;

        let embedded = State::ids(&self.backend, DType::I32, all.len(), c.n_vocab)?;
        let size = Size { n_id: all.len(), n_row, n_kv: n_row, n_out: n, scattered: false };
        let inputs = Inputs::by_device(&model.layers, &graphs.cache, &size)?;
        let scores = |layer: &Layer| {
            Ok(State::beside(layer.keys(), DType::F32, shape(&[n_row, n, c.n_head]))?)
        };
        let scores: Vec<State> =
            model.layers[explained.clone()].iter().map(scores).collect::<Result<_>>()?;
        let max_nodes = 64 + 2 * Layer::MAX_NODES * c.n_layer;
        let mut graph = Graph::build(&self.backend, max_nodes, |g| {
            let x = model.embed(g, g.state(&embedded), Some(g.state(soft)));
            model.layers.iter().enumerate().fold(x, |x, (i, layer)| {
                let (rows, cache) = (inputs[&layer.keys().device()].rows(g, x), &graphs.cache[i]);
                let y = layer.build(g, &rows, cache, n_row, c); // writes the keys
                if let Some(i) = i.checked_sub(explained.start) {
                    g.store(layer.scores(g, &rows, cache, n, c), &scores[i]);
                }
                y
            });
        })?;
        let n_soft = soft.shape()[1];
        // The order of `Model::embed`: soft tokens, BOS, the rest.
        let at = (1..=n_soft).chain([0]).chain(n_soft + 1..n_row);
        inputs.values().for_each(|inputs| inputs.set_positions(at.clone()));
        embedded.write(&all);
        graph.compute()?;

        let scale = (c.head_dim() as f64).sqrt().recip();
        let mut looks = vec![vec![0.0; n_row]; n];
        for scores in &scores {
            let heads: Vec<f32> = scores.read();
            for (i, scores) in heads.chunks_exact(n_row).enumerate() {
                let row = i % n;
                let seen = 0..n_row - n + row + 1;
                add_softmax(&mut looks[row][seen.clone()], &scores[seen], scale);
            }
        }
        let n_head = (c.n_head * explained.len()) as f64;
        looks.iter_mut().flatten().for_each(|look| *look /= n_head);
        Ok(looks)
    }
}

/// Adds the softmax of scaled scores.
fn add_softmax(to: &mut [f64], scores: &[f32], scale: f64) {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: &f32| (scale * f64::from(x - highest)).exp();
    let weights: Vec<f64> = scores.iter().map(weight).collect();
    let sum: f64 = weights.iter().sum();
    to.iter_mut().zip(weights).for_each(|(to, weight)| *to += weight / sum);
}
