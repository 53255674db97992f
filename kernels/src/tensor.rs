//! The operations OpenVLA needs, one short method each. Shapes are asserted before ggml sees them.

use llama_cpp_sys_2 as sys;

use crate::builder::Tensor;
use crate::{DType, Shape, custom, own, shape};

/// Sum. The right side repeats over the left, as a bias over rows.
impl<'g> std::ops::Add for Tensor<'g> {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.broadcasts(other, "add");
        let (context, raw) = self.args();
        // SAFETY: both are live, f32, of one graph, and `other` repeats over `self`.
        self.builder.node(unsafe { sys::ggml_add(context, raw, other.raw.as_ptr()) })
    }
}

/// Product, element by element. The right side repeats over the left, as a scale over rows.
impl<'g> std::ops::Mul for Tensor<'g> {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        self.broadcasts(other, "mul");
        let (context, raw) = self.args();
        // SAFETY: both are live, f32, of one graph, and `other` repeats over `self`.
        self.builder.node(unsafe { sys::ggml_mul(context, raw, other.raw.as_ptr()) })
    }
}

impl<'g> Tensor<'g> {
    /// `self + other + bias`: rows `[k, n]` both, and a vector `[k]` that repeats over them. In one launch on CUDA,
    /// which adds several terms at once where all on the right sides are of one layout: so the bias is on the left.
    pub fn sum_with_bias(self, other: Self, bias: Self) -> Self {
        let [k, n, one, also_one] = self.shape();
        assert_eq!((one, also_one), (1, 1), "sum_with_bias: {:?} is not a matrix", self.shape());
        assert_eq!(self.shape(), other.shape(), "sum_with_bias: shapes differ");
        assert_eq!(bias.shape(), [k, 1, 1, 1], "sum_with_bias: the bias' shape");
        bias.rows("sum_with_bias");
        let (context, raw) = bias.args();
        // SAFETY: live, and the view has all of its elements.
        let mut rows = self.builder.node(unsafe { sys::ggml_view_1d(context, raw, k as i64, 0) });
        // The bias as `n` rows that are the same memory. ggml makes no view of more elements than what it views has,
        // but sums take any strides.
        // SAFETY: the view is live and nobody else's, and with a stride of zero every row is the first.
        let header = unsafe { rows.raw.as_mut() };
        (header.ne[1], header.nb[1]) = (n as i64, 0);
        rows + self + other
    }

    /// Matrix product: `[k, m] · [k, n] → [m, n]`. `self` is the weight, `x` the activations.
    /// Further dimensions of `self` repeat over those of `x`.
    pub fn mul_mat(self, x: Tensor<'g>) -> Tensor<'g> {
        let (a, b) = (self.shape(), x.shape());
        self.same_graph(x);
        assert!(self.dtype().is_float(), "mul_mat: {} is not a weight type", self.dtype());
        assert_eq!(a[0], b[0], "mul_mat: inner sizes differ, {a:?} · {b:?}");
        let repeats = b[2].is_multiple_of(a[2]) && b[3].is_multiple_of(a[3]);
        assert!(repeats && x.is_f32(), "mul_mat: {a:?} does not repeat over {b:?} in f32");
        assert!(self.is_contiguous() && x.is_contiguous(), "mul_mat: operands have gaps");
        let x = self.observe(x);
        if let Some(product) = own::mul_mat(self, x) {
            return product;
        }
        let guard = if self.dtype().is_quantized() { self.guard(x) } else { None };
        let (context, raw) = self.args();
        // SAFETY: both are live, of one graph, contiguous, and of sizes that fit.
        let mut product =
            self.builder.node(unsafe { sys::ggml_mul_mat(context, raw, x.raw.as_ptr()) });
        if self.dtype() == DType::F16 {
            // Else GPUs multiply and add in 16 bits.
            // SAFETY: the node is a live product and nobody else's yet.
            unsafe { sys::ggml_mul_mat_set_prec(product.raw.as_ptr(), sys::GGML_PREC_F32) }
        }
        if let Some(guard) = guard {
            // SAFETY: the node is live and nobody else's yet. A product reads two sources; a third one only
            // makes the guard run where the product does.
            unsafe { product.raw.as_mut() }.src[2] = guard.raw.as_ptr();
        }
        product
    }

    /// `x`, which this weight is multiplied by: if somebody observes it, an output of the graph.
    fn observe(self, x: Self) -> Self {
        let Some(sink) = self.builder.sink(self) else { return x };
        let x = x.retain_as_output();
        self.builder.observe(x, sink);
        x
    }

    /// The same numbers, to be read after the whole graph has run. No other node gets their memory;
    /// a state's, which others may write, are copied, which takes a node.
    fn retain_as_output(self) -> Self {
        let output = if self.is_leaf() { self.contiguous() } else { self };
        // SAFETY: live, as is what it views; it flags both, and ggml's allocator spares outputs.
        unsafe { sys::ggml_set_output(output.raw.as_ptr()) };
        output
    }

    /// A node that makes [`crate::Graph::compute`] fail if `x`, which ggml's kernels multiply this quantized
    /// weight by, is not finite.
    fn guard(self, x: Self) -> Option<Self> {
        self.builder.guard(self, x, |guard| {
            let n = x.shape().iter().product();
            // SAFETY: the source is contiguous f32, and the node's one element is not written.
            unsafe {
                custom::node(DType::F32, [1; 4], &[x], move |job| {
                    guard.look(&job.slice(0, n)[job.thread_range(n)]);
                })
            }
        })
    }

    fn broadcasts(self, other: Tensor<'_>, op: &str) {
        let (a, b) = (self.shape(), other.shape());
        self.same_graph(other);
        let repeats = a.iter().zip(&b).all(|(a, b)| a.is_multiple_of(*b));
        assert!(repeats, "{op}: {b:?} does not repeat over {a:?}");
        assert!(self.is_f32() && other.is_f32(), "{op}: operands are not f32");
        assert!(other.strides()[0] == 4 && self.strides()[0] == 4, "{op}: rows have gaps");
    }

    /// LayerNorm of each row, without its affine part.
    pub fn norm(self, eps: f32) -> Tensor<'g> {
        self.rows("norm");
        assert!(eps >= 0.0, "norm: epsilon is {eps}");
        let (context, raw) = self.args();
        // SAFETY: live and f32 with contiguous rows.
        self.builder.node(unsafe { sys::ggml_norm(context, raw, eps) })
    }

    /// RMSNorm of each row, without its scale.
    pub fn rms_norm(self, eps: f32) -> Tensor<'g> {
        self.rows("rms_norm");
        assert!(eps >= 0.0, "rms_norm: epsilon is {eps}");
        let (context, raw) = self.args();
        // SAFETY: live and f32 with contiguous rows.
        self.builder.node(unsafe { sys::ggml_rms_norm(context, raw, eps) })
    }

    /// GELU in its exact form, through erf.
    pub fn gelu_erf(self) -> Tensor<'g> {
        self.rows("gelu_erf");
        assert!(self.is_plainly_contiguous(), "gelu_erf: operand has gaps");
        if let Some(node) = own::gelu_erf(self) {
            return node;
        }
        let (context, raw) = self.args();
        // SAFETY: live, f32 and contiguous.
        self.builder.node(unsafe { sys::ggml_gelu_erf(context, raw) })
    }

    /// ReLU: what is negative becomes 0. What is not a number stays so, which ggml's own ReLU would turn into 0.
    pub fn relu(self) -> Tensor<'g> {
        self.rows("relu");
        assert!(self.is_plainly_contiguous(), "relu: operand has gaps");
        let (context, raw) = self.args();
        // SAFETY: live, f32 and contiguous.
        let is_positive = self.builder.node(unsafe { sys::ggml_step(context, raw) });
        self * is_positive
    }

    /// `silu(self) * up`.
    pub fn swiglu(self, up: Tensor<'g>) -> Tensor<'g> {
        self.same_graph(up);
        assert_eq!(self.shape(), up.shape(), "swiglu: shapes differ");
        assert!(self.is_f32() && up.is_f32(), "swiglu: operands are not f32");
        let in_rows = self.has_plain_rows() && up.has_plain_rows();
        assert!(in_rows, "swiglu: operands have gaps in rows");
        if let Some(node) = own::swiglu(self, up) {
            return node;
        }
        let (context, raw) = self.args();
        // SAFETY: both are live, f32, of rows without gaps and of one shape.
        self.builder.node(unsafe { sys::ggml_swiglu_split(context, raw, up.raw.as_ptr()) })
    }

    pub(crate) fn rows(self, op: &str) {
        assert!(self.is_f32() && self.strides()[0] == 4, "{op}: rows are not contiguous f32");
    }

    /// The same elements, in the same order, under other sizes.
    pub fn reshape(self, dims: &[usize]) -> Tensor<'g> {
        let new = shape(dims);
        let count = |s: Shape| s.iter().try_fold(1, |count: usize, n| count.checked_mul(*n));
        assert_eq!(count(self.shape()), count(new), "reshape: {:?} to {new:?}", self.shape());
        assert!(self.is_contiguous(), "reshape: operand has gaps");
        assert!(self.dtype().row_bytes(new[0]).is_some(), "reshape: inside blocks");
        let (context, raw) = self.args();
        let [a, b, c, d] = new.map(|n| n as i64);
        // SAFETY: live, contiguous, and of the same number of elements.
        self.builder.node(unsafe { sys::ggml_reshape_4d(context, raw, a, b, c, d) })
    }

    /// Moves dimension `i` to place `to[i]`. Nothing is copied.
    pub fn permute(self, to: [usize; 4]) -> Tensor<'g> {
        assert!((0..4).all(|axis| to.contains(&axis)), "permute: {to:?} is not a permutation");
        assert!(to[0] == 0 || !self.dtype().is_quantized(), "permute: inside blocks");
        let (context, raw) = self.args();
        let [a, b, c, d] = to.map(|axis| axis as i32);
        // SAFETY: live, and a permutation of the four dimensions.
        self.builder.node(unsafe { sys::ggml_permute(context, raw, a, b, c, d) })
    }

    /// `length` places of dimension `dim` from `start`. Nothing is copied.
    pub fn slice(self, dim: usize, start: usize, length: usize) -> Tensor<'g> {
        let mut new = self.shape();
        let end = start.checked_add(length);
        let inside = length > 0 && end.is_some_and(|end| end <= new[dim]);
        assert!(inside, "slice: {length} from {start} of dimension {dim} of {new:?}");
        assert!(dim > 0 || self.dtype().block() == 1, "slice: inside blocks");
        assert!(self.is_packed(), "slice: rows have gaps");
        new[dim] = length;
        let strides = self.strides();
        let (context, raw) = self.args();
        let [a, b, c, d] = new.map(|n| n as i64);
        let [_, row, plane, cube] = strides;
        let offset = start * strides[dim];
        // SAFETY: live, and the view lies inside the tensor's own extent.
        self.builder
            .node(unsafe { sys::ggml_view_4d(context, raw, a, b, c, d, row, plane, cube, offset) })
    }

    /// A copy without gaps, in the order of the dimensions.
    pub fn contiguous(self) -> Tensor<'g> {
        let (context, raw) = self.args();
        // SAFETY: live. Blocks are whole and in a row, since `permute` and `slice` keep them so.
        self.builder.node(unsafe { sys::ggml_cont(context, raw) })
    }

    /// `self`, then `other`, along dimension `dim`.
    pub fn concat(self, other: Tensor<'g>, dim: usize) -> Tensor<'g> {
        self.same_graph(other);
        let (a, b) = (self.shape(), other.shape());
        let fit = (0..4).all(|i| i == dim || a[i] == b[i]) && dim < 4;
        assert!(fit, "concat: {a:?} and {b:?} along {dim}");
        assert!(self.is_f32() && other.is_f32(), "concat: operands are not f32");
        let (context, raw) = self.args();
        // SAFETY: both are live, f32, and differ in `dim` at most.
        self.builder.node(unsafe { sys::ggml_concat(context, raw, other.raw.as_ptr(), dim as i32) })
    }

    /// Rows of a table `[k, n_row]` by number: `ids [n]` of i32, a [`crate::State::ids`] below `n_row`, to
    /// `[k, n]` in f32.
    pub fn get_rows(self, ids: Tensor<'g>) -> Tensor<'g> {
        self.same_graph(ids);
        let [_, n, one, also_one] = ids.shape();
        assert_eq!((n, one, also_one), (1, 1, 1), "get_rows: ids are not a vector");
        assert_eq!(ids.dtype(), DType::I32, "get_rows: ids are not i32");
        assert_eq!(self.shape()[2..], [1, 1], "get_rows: the table is not a matrix");
        assert!(self.dtype().is_float() && self.is_packed(), "get_rows: the table's rows");
        let n_row = self.shape()[1];
        assert!(
            self.builder.are_below(ids, n_row),
            "get_rows: ids are not bound to stay below {n_row}"
        );
        let (context, raw) = self.args();
        // SAFETY: both are live, a matrix and a vector of i32, whose numbers are those of rows: what writes
        // such a state checks them, and nothing in a graph can.
        self.builder.node(unsafe { sys::ggml_get_rows(context, raw, ids.raw.as_ptr()) })
    }

    /// Writes `rows [k, n]` into this state `[k, n_row]`, converted to its type, at the places
    /// `at [n]`, a [`crate::State::ids`] below `n_row`. Runs before anything that is added later.
    pub fn set_rows(self, rows: Tensor<'g>, at: Tensor<'g>) {
        self.same_graph(rows);
        self.same_graph(at);
        let (table, new) = (self.shape(), rows.shape());
        let matrices = table[2..] == [1, 1] && new[2..] == [1, 1];
        assert!(matrices && table[0] == new[0], "set_rows: {new:?} are not rows of {table:?}");
        assert_eq!(at.shape(), [new[1], 1, 1, 1], "set_rows: one place per row");
        assert!(!at.dtype().is_float(), "set_rows: places are {}", at.dtype());
        rows.rows("set_rows");
        assert!(self.dtype().is_float() && self.is_packed(), "set_rows: the table's rows");
        assert!(!self.is_weight(), "set_rows: weights are only read");
        assert!(self.is_leaf(), "set_rows: only states are written");
        let n_row = table[1];
        assert!(
            self.builder.are_below(at, n_row),
            "set_rows: places are not bound to stay below {n_row}"
        );
        let (context, raw) = self.args();
        let (rows, at) = (rows.raw.as_ptr(), at.raw.as_ptr());
        // SAFETY: all are live and of sizes that fit, and places are those of rows, as in `get_rows`.
        let node = self.builder.node(unsafe { sys::ggml_set_rows(context, raw, rows, at) });
        self.builder.run(node);
    }

    /// Cuts planes `[width, height, channels]` (`self`) into the patches that a convolution with
    /// `kernel [side, side, channels, _]` and step `side` sees: `[side·side·channels, n_patch]`,
    /// patches row by row, each ordered x, then y, then channel.
    pub fn patches(self, kernel: Tensor<'g>) -> Tensor<'g> {
        self.same_graph(kernel);
        let ([width, height, channels, one], k) = (self.shape(), kernel.shape());
        let side = k[0];
        let fit = (k[1], k[2], one) == (side, channels, 1);
        let whole = width.is_multiple_of(side) && height.is_multiple_of(side);
        assert!(fit && whole, "patches: {k:?} does not divide {:?}", self.shape());
        assert!(self.is_f32() && kernel.is_f32(), "patches: operands are not f32");
        assert!(self.is_contiguous(), "patches: planes have gaps");
        let (context, raw) = self.args();
        let (kernel, step, f32) = (kernel.raw.as_ptr(), side as i32, sys::GGML_TYPE_F32);
        // SAFETY: both are live, with the same number of channels, and windows fit the image.
        let node = self.builder.node(unsafe {
            sys::ggml_im2col(context, kernel, raw, step, step, 0, 0, 1, 1, true, f32)
        });
        node.reshape(&[side * side * channels, (width / side) * (height / side)])
    }
}
