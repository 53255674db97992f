//! Random programs: some states, a graph over them and over weights, and two runs of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use openvla_kernels::{
    ALIGNMENT, Backend, Builder, DType, Gguf, Graph, Header, Kernels, Shape, State, Tensor, Weight,
    Weights, shape,
};

use crate::random::Random;

/// A backend, and a file's weights of every type on it: where they are mapped, and in its own layouts.
pub struct Machine {
    backend: Arc<Backend>,
    weights: Vec<(Weight, DType)>,
}

impl Machine {
    pub fn new(kernels: Kernels, n_thread: usize) -> Self {
        let backend = Backend::open(&[], n_thread, kernels).unwrap();
        let mut header = Header::default();
        let mut tensors: Vec<(String, DType, Shape)> = Vec::new();
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_float()) {
            for (k, m) in [(1, 3), (32, 1), (32, 33), (64, 8), (256, 32), (512, 5)] {
                let k = usize::next_multiple_of(k, dtype.block());
                let name = format!("{dtype} {k} {m}");
                if !tensors.iter().any(|(known, ..)| *known == name) {
                    header.tensor(&name, dtype, shape(&[k, m]));
                    tensors.push((name, dtype, shape(&[k, m])));
                }
            }
        }
        let mut random = Random(1);
        let fill = |mut bytes: &mut [u8]| {
            for (_, dtype, dims) in &tensors {
                let numbers: Vec<f32> = (0..dims[0] * dims[1]).map(|_| random.number()).collect();
                let n = dims[1] * dtype.row_bytes(dims[0]).unwrap();
                let (data, rest) = bytes.split_at_mut(n.next_multiple_of(ALIGNMENT));
                dtype.encode(&numbers, dims[0], None, &mut data[..n]);
                bytes = rest;
            }
            Ok::<_, std::io::Error>(())
        };
        let file = Gguf::in_memory("weights", &header, fill).unwrap();
        let mut weights = Vec::new();
        for mut from in [
            Weights::load(&file, &backend).unwrap(),
            Weights::placed(&file, &backend, &[], &|_| 0).unwrap(),
        ] {
            let taken = tensors.iter().map(|(name, dtype, dims)| (from.take(name, *dims), *dtype));
            weights.extend(taken.map(|(weight, dtype)| (weight.unwrap(), dtype)));
        }
        Self { backend, weights }
    }
}

/// What a program does.
pub const OPS: [&str; 19] = [
    "add",
    "sum_with_bias",
    "mul",
    "mul_mat",
    "norm",
    "rms_norm",
    "gelu_erf",
    "relu",
    "swiglu",
    "reshape",
    "permute",
    "slice",
    "contiguous",
    "concat",
    "get_rows",
    "set_rows",
    "rope",
    "flash_attention",
    "patches",
];

/// An operand: a leaf, or what an operation made.
#[derive(Clone, Copy)]
struct Node<'g> {
    tensor: Tensor<'g>,
    dtype: DType,
}

pub struct Program<'a> {
    machine: &'a Machine,
    random: &'a mut Random,
    states: Vec<(State, DType)>,
}

impl<'a> Program<'a> {
    /// Makes states, some of which fit together.
    pub fn new(machine: &'a Machine, random: &'a mut Random) -> Self {
        let mut program = Self { machine, random, states: Vec::new() };
        for _ in 0..4 {
            let dtype =
                if program.random.once_in(2) { DType::F32 } else { program.random.of(&DType::ALL) };
            let dims = program.random.shape(dtype);
            program.state(dtype, dims);
        }
        let (r, kv) = (&mut *program.random, DType::F32);
        let [d, n, n_kv] = [r.size(), r.size(), r.size()];
        let (heads, repeat, kv) = (r.of(&[1, 2]), r.of(&[1, 3]), r.of(&[kv, DType::F16]));
        program.state(DType::F32, [d, n, heads * repeat, 1]);
        program.state(kv, [d, n_kv, heads, 1]);
        program.state(DType::F16, [n_kv, n, 1, 1]);
        program.state(DType::I32, [heads * repeat, 1, 1, 1]);
        for dtype in [DType::I32, DType::I64] {
            let (n, below) = (program.random.size(), program.random.size());
            program.try_to(|p| {
                let state = State::ids(&p.machine.backend, dtype, n, below).unwrap();
                p.states.push((state, dtype));
            });
        }
        let (side, channels) = (program.random.of(&[1, 2, 4]), program.random.of(&[1, 3]));
        program.state(DType::F32, [side, side, channels, 2]);
        program.state(DType::F32, [2 * side, 3 * side, channels, 1]);
        program
    }

    /// Whether it went without a panic.
    fn try_to(&mut self, act: impl FnOnce(&mut Self)) -> bool {
        catch_unwind(AssertUnwindSafe(|| act(self))).is_ok()
    }

    fn state(&mut self, dtype: DType, dims: Shape) {
        self.try_to(|p| {
            if let Ok(state) = State::zeros(&p.machine.backend, dtype, dims) {
                p.states.push((state, dtype));
            }
        });
    }

    /// Writes numbers into a state, some of which may be out of range, or too many.
    fn write(&mut self, i: usize) {
        let (state, dtype) = self.states[i].clone();
        let n = state.shape().iter().product::<usize>() + usize::from(self.random.once_in(20));
        let rows = self.random.of(&[1, 2, 5, 40]);
        let mut row = || match self.random.below(40) {
            0 => self.random.of(&[-1, i64::MAX, i64::MIN, 1 << 20]),
            _ => self.random.below(rows) as i64,
        };
        match dtype {
            DType::I32 => state.write(&(0..n).map(|_| row() as i32).collect::<Vec<_>>()),
            DType::I64 => state.write(&(0..n).map(|_| row()).collect::<Vec<_>>()),
            DType::F16 => {
                let mask = |_| self.random.of(&[0x0000, 0x0000, 0xFC00, 0x3C00, 0x7E00]);
                state.write(&(0..n).map(mask).collect::<Vec<u16>>());
            }
            _ => state.write(&(0..n).map(|_| self.random.float()).collect::<Vec<_>>()),
        }
    }

    /// The names of the operations that were computed, if all went well.
    pub fn run(mut self) -> Vec<&'static str> {
        for i in 0..self.states.len() {
            self.try_to(|p| p.write(i));
        }
        self.try_to(Self::encode);
        let backend = &self.machine.backend;
        let max_nodes = match self.random.below(40) {
            0 => self.random.of(&[0, 1, 2, Graph::MAX_NODES + 1, usize::MAX]),
            _ => 64,
        };
        let mut stored = Vec::new();
        let graph = Graph::build(backend, max_nodes, |g| stored = self.build(g));
        let Ok(mut graph) = graph else { return Vec::new() };
        if graph.compute().is_err() || graph.compute().is_err() {
            return Vec::new();
        }
        stored
    }

    fn build(&mut self, g: &Builder) -> Vec<&'static str> {
        let states = self.states.clone();
        let mut pool: Vec<Node<'_>> = Vec::new();
        pool.extend(states.iter().map(|(s, dtype)| Node { tensor: g.state(s), dtype: *dtype }));
        for _ in 0..3 {
            let (weight, dtype) =
                &self.machine.weights[self.random.below(self.machine.weights.len())];
            pool.push(Node { tensor: g.weight(weight), dtype: *dtype });
        }
        let mut stored = Vec::new();
        for _ in 0..1 + self.random.below(8) {
            let op = self.random.of(&OPS);
            let mut node = None;
            let is_made = self.try_to(|p| node = p.op(op, &pool));
            pool.extend(node);
            if is_made && self.try_to(|p| p.store(g, node.unwrap_or(pool[0]))) {
                stored.push(op);
            }
        }
        stored
    }

    /// Into a new state of some type, or into one that there is.
    fn store(&mut self, g: &Builder, x: Node<'_>) {
        let old = &self.states[self.random.below(self.states.len())].0;
        if self.random.once_in(20) {
            return g.store(x.tensor, old);
        }
        if self.random.once_in(10) {
            return g.compute_in(x.tensor, g.state(old));
        }
        let dtype = match self.random.below(6) {
            0 => self.random.of(&DType::ALL),
            1 => x.dtype,
            _ => DType::F32,
        };
        let new = State::zeros(&self.machine.backend, dtype, x.tensor.shape()).unwrap();
        if self.random.once_in(2) {
            return g.compute_in(x.tensor, g.state(&new));
        }
        g.store(x.tensor, &new);
    }

    /// One that suits, as a rule.
    fn pick<'g>(&mut self, pool: &[Node<'g>], suits: impl Fn(Node<'g>) -> bool) -> Node<'g> {
        let suitable: Vec<_> = pool.iter().copied().filter(|node| suits(*node)).collect();
        let any = suitable.is_empty() || self.random.once_in(16);
        self.random.of(if any { pool } else { &suitable })
    }

    /// Applies an operation to some operands; the type of its result is F32, or theirs.
    fn op<'g>(&mut self, op: &str, pool: &[Node<'g>]) -> Option<Node<'g>> {
        let is_f32 = |node: Node<'g>| node.dtype == DType::F32;
        let Node { tensor: x, .. } = self.pick(pool, is_f32);
        let any = self.random.of(pool);
        let dims = x.shape();
        let f32 = |tensor| Some(Node { tensor, dtype: DType::F32 });
        let like_any = |tensor| Some(Node { tensor, dtype: any.dtype });
        let repeats = |y: Node<'g>| (0..4).all(|i| dims[i].is_multiple_of(y.tensor.shape()[i]));
        match op {
            "add" => f32(x + self.pick(pool, |y| is_f32(y) && repeats(y)).tensor),
            "sum_with_bias" => {
                let other = self.pick(pool, |y| is_f32(y) && y.tensor.shape() == dims).tensor;
                let bias = |y: Node<'g>| is_f32(y) && y.tensor.shape() == [dims[0], 1, 1, 1];
                f32(x.sum_with_bias(other, self.pick(pool, bias).tensor))
            }
            "mul" => f32(x * self.pick(pool, |y| is_f32(y) && repeats(y)).tensor),
            "mul_mat" => {
                let fits = |w: [usize; 4]| w[0] == dims[0] && dims[2].is_multiple_of(w[2]);
                f32(self.pick(pool, |w| fits(w.tensor.shape())).tensor.mul_mat(x))
            }
            "norm" => f32(x.norm(self.random.float())),
            "rms_norm" => f32(x.rms_norm(self.random.float())),
            "gelu_erf" => f32(x.gelu_erf()),
            "relu" => f32(x.relu()),
            "swiglu" => {
                f32(x.swiglu(self.pick(pool, |y| is_f32(y) && y.tensor.shape() == dims).tensor))
            }
            "reshape" => {
                let [a, b, c, d] = any.tensor.shape();
                let absurd = self.random.shape(any.dtype);
                let wrapped = [a, b, c, d.wrapping_add(1 << 62)];
                let ways =
                    [[a * b, c, d, 1], [a, b * c, d, 1], [a * b * c * d, 1, 1, 1], [1, a, b, c]];
                let to = if self.random.once_in(10) {
                    self.random.of(&[absurd, wrapped])
                } else {
                    self.random.of(&ways)
                };
                like_any(any.tensor.reshape(&to))
            }
            "permute" => {
                let to = [[0, 2, 1, 3], [1, 0, 2, 3], [2, 0, 1, 3], [0, 1, 3, 2], [3, 2, 1, 0]];
                like_any(any.tensor.permute(self.random.of(&to)))
            }
            "slice" => {
                let dim = self.random.below(4);
                let n = any.tensor.shape()[dim];
                let start = if self.random.once_in(20) { usize::MAX } else { self.random.below(n) };
                let length = 1 + self.random.below(n.saturating_sub(start).max(1));
                like_any(any.tensor.slice(dim, start, length))
            }
            "contiguous" => like_any(any.tensor.contiguous()),
            "concat" => {
                let dim = self.random.below(5);
                let fits = |y: [usize; 4]| (0..4).all(|i| i == dim || y[i] == dims[i]);
                let y = self.pick(pool, |y| is_f32(y) && fits(y.tensor.shape()));
                f32(x.concat(y.tensor, dim))
            }
            "get_rows" => {
                let ids = self.pick(pool, |ids| ids.dtype == DType::I32);
                f32(any.tensor.get_rows(ids.tensor))
            }
            "set_rows" => {
                let fits = |rows: [usize; 4]| rows[0] == any.tensor.shape()[0];
                let rows = self.pick(pool, |rows| is_f32(rows) && fits(rows.tensor.shape())).tensor;
                let at = self.pick(pool, |at| at.dtype == DType::I64).tensor;
                let n = at.shape()[0].min(rows.shape()[1]);
                any.tensor.set_rows(rows.slice(1, 0, n), at.slice(0, 0, n));
                None
            }
            "rope" => {
                let fits = |at: [usize; 4]| at == [dims[2], 1, 1, 1];
                let at = self.pick(pool, |at| at.dtype == DType::I32 && fits(at.tensor.shape()));
                f32(x.rope(at.tensor, self.random.of(&[1e4, 0.0, -1.0, f32::NAN])))
            }
            "flash_attention" => {
                let [d, n, n_head, _] = dims;
                let fits = |k: [usize; 4]| k[0] == d && n_head.is_multiple_of(k[2]);
                let k = self.pick(pool, |k| fits(k.tensor.shape()));
                let v =
                    self.pick(pool, |v| v.dtype == k.dtype && v.tensor.shape() == k.tensor.shape());
                let mask = [k.tensor.shape()[1], n, 1, 1];
                let mask = self.pick(pool, |m| m.dtype == DType::F16 && m.tensor.shape() == mask);
                let mask = (!self.random.once_in(3)).then_some(mask.tensor);
                f32(x.flash_attention(k.tensor, v.tensor, mask, self.random.float()))
            }
            "patches" => {
                let fits =
                    |k: [usize; 4]| k[0] == k[1] && k[2] == dims[2] && dims[0].is_multiple_of(k[0]);
                f32(x.patches(self.pick(pool, |k| is_f32(k) && fits(k.tensor.shape())).tensor))
            }
            _ => unreachable!("{op} is not an operation"),
        }
    }

    /// Rows of any numbers in any type.
    fn encode(&mut self) {
        let dtype = self.random.of(&DType::ALL);
        let row = self.random.size().next_multiple_of(dtype.block());
        let numbers: Vec<f32> = (0..3 * row).map(|_| self.random.float()).collect();
        let importance = self.random.once_in(2).then(|| &numbers[..row]);
        let mut bytes = vec![0; 3 * dtype.row_bytes(row).unwrap()];
        dtype.encode(&numbers, row, importance, &mut bytes);
        dtype.decode(&bytes);
    }
}
