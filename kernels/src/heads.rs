//! Attention's operations: rows by heads, rotary positions, attention itself.

use std::ffi::c_int;

use llama_cpp_sys_2 as sys;

use crate::{DType, Tensor, own};

/// ggml's rotation, into another tensor or where it is.
type Rope = unsafe extern "C" fn(
    *mut sys::ggml_context,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    c_int,
    c_int,
    c_int,
    f32,
    f32,
    f32,
    f32,
    f32,
    f32,
) -> *mut sys::ggml_tensor;

impl<'g> Tensor<'g> {
    /// Rows `[head_dim · n_head, n]`, between which there may be gaps, by heads: `[head_dim, n_head, n]`.
    pub fn heads(self, head_dim: usize) -> Tensor<'g> {
        let [k, n, one, also_one] = self.shape();
        let fit = head_dim > 0 && k.is_multiple_of(head_dim) && (one, also_one) == (1, 1);
        assert!(fit, "heads: {:?} by {head_dim}", self.shape());
        assert!(self.is_packed() && self.dtype().block() == 1, "heads: gaps in rows, or blocks");
        let ([element, row, ..], (context, raw)) = (self.strides(), self.args());
        let [d, n_head, n] = [head_dim, k / head_dim, n].map(|n| n as i64);
        // SAFETY: live, and the view has the elements that its rows have.
        self.builder.node(unsafe {
            sys::ggml_view_3d(context, raw, d, n_head, n, element * head_dim, row, 0)
        })
    }

    /// Slices `[k_i, n]` of one tensor's rows that follow each other there, as the one slice `[Σ k_i, n]`
    /// that they are parts of. `None` if they are not.
    ///
    /// # Panics
    /// If there are none, or they belong to several graphs.
    pub fn side_by_side(parts: &[Self]) -> Option<Self> {
        let (first, mut end) = (parts[0], parts[0].offset());
        let [_, row, ..] = first.strides();
        for part in parts {
            first.same_graph(*part);
            let alike = part.viewed() == first.viewed() && part.strides()[1] == row;
            let follows = alike && part.offset() == end && part.is_packed();
            if !follows || part.shape() != [part.shape()[0], first.shape()[1], 1, 1] {
                return None;
            }
            end += part.strides()[0] * part.shape()[0];
        }
        let (context, whole) = (first.builder.context_for_one(), first.viewed().as_ptr());
        let k: usize = parts.iter().map(|part| part.shape()[0]).sum();
        let [k, n] = [k, first.shape()[1]].map(|n| n as i64);
        // SAFETY: live, and the view has the elements that its parts have.
        let view = unsafe { sys::ggml_view_2d(context, whole, k, n, row, first.offset()) };
        Some(first.builder.node(view))
    }

    /// Heads `[head_dim, n_head, n]` side by side: `[head_dim · n_head, n]`. The same as a reshape, but a view,
    /// in which form ggml's CUDA backend runs it in one kernel with the rotation before and the cache's
    /// write after.
    pub fn heads_as_rows(self) -> Tensor<'g> {
        let [head_dim, n_head, n, one] = self.shape();
        assert!(self.is_contiguous() && one == 1, "heads_as_rows: {:?} with gaps", self.shape());
        assert!(self.is_f32(), "heads_as_rows: operand is not f32");
        let (context, raw) = self.args();
        let k = head_dim * n_head;
        // SAFETY: live and contiguous, and the view has as many elements.
        self.builder.node(unsafe { sys::ggml_view_2d(context, raw, k as i64, n as i64, 4 * k, 0) })
    }

    /// Rotary positions for `[head_dim, n_head, n]`: turns the channels `(2i, 2i + 1)` of each head
    /// by `positions[row] · base^(-2i/head_dim)`. Neighbouring pairs are llama.cpp's layout of Llama,
    /// which our files hold; Hugging Face pairs `(i, i + head_dim/2)`, so q and k rows are permuted
    /// when a file is written.
    pub fn rope(self, positions: Tensor<'g>, base: f32) -> Tensor<'g> {
        self.turned(positions, base, sys::ggml_rope_ext)
    }

    /// Rows `[k, n]` of which [`Tensor::rope`] turned the first `turned` channels, heads of `head_dim`, where
    /// they are: nothing is copied, and `self` holds the same from then on.
    ///
    /// # Panics
    /// If `self` is a weight's, or sizes do not fit.
    pub fn rope_first(
        self,
        turned: usize,
        head_dim: usize,
        positions: Tensor<'g>,
        base: f32,
    ) -> Tensor<'g> {
        assert!(!self.is_weight(), "rope_first: weights are only read");
        let heads = self.slice(0, 0, turned).heads(head_dim);
        let heads = heads.turned(positions, base, sys::ggml_rope_ext_inplace);
        let ([k, n, ..], [_, row, ..]) = (self.shape().map(|n| n as i64), self.strides());
        let (context, raw) = heads.args();
        // SAFETY: live, and from where the turned channels begin, rows are as they were.
        self.builder.node(unsafe { sys::ggml_view_2d(context, raw, k, n, row, 0) })
    }

    fn turned(self, positions: Tensor<'g>, base: f32, rope: Rope) -> Tensor<'g> {
        self.same_graph(positions);
        let [head_dim, _, n, one] = self.shape();
        assert!(head_dim.is_multiple_of(2) && one == 1, "rope: {:?}", self.shape());
        assert_eq!(positions.shape(), [n, 1, 1, 1], "rope: one position per row");
        assert_eq!(positions.dtype(), DType::I32, "rope: positions are not i32");
        assert!(positions.is_packed(), "rope: positions have gaps");
        self.rows("rope");
        let (context, raw) = self.args();
        let (dims, none, at) = (head_dim as i32, std::ptr::null_mut(), positions.raw.as_ptr());
        let mode = sys::LLAMA_ROPE_TYPE_NORM;
        // SAFETY: both are live with one position per row; no frequency factors, and the numbers
        // after `base` switch YaRN's extrapolation off.
        self.builder.node(unsafe {
            rope(context, raw, at, none, dims, mode, 0, base, 1.0, 0.0, 1.0, 0.0, 0.0)
        })
    }

    /// Keys and values of f32 as attention reads them: on GPUs in f16, to which theirs would convert each by
    /// itself, and elsewhere as they are.
    pub fn as_attention_reads(self) -> Tensor<'g> {
        if !self.builder.has_gpu() {
            return self;
        }
        self.rows("as_attention_reads");
        let (context, raw) = self.args();
        // SAFETY: live, and f32, of which ggml converts rows with any strides.
        self.builder.node(unsafe { sys::ggml_cast(context, raw, DType::F16.number()) })
    }

    /// Attention: queries `[head_dim, n, n_head]` (`self`), keys and values
    /// `[head_dim, n_kv, n_head_kv]`, mask `[n_kv, n]` in f16 or none: zeros for the first keys, those
    /// that the query sees, then minus infinity.
    /// Returns `[head_dim, n_head, n]`. Rows must be contiguous, further strides may be any.
    pub fn flash_attention(
        self,
        k: Tensor<'g>,
        v: Tensor<'g>,
        mask: Option<Tensor<'g>>,
        scale: f32,
    ) -> Tensor<'g> {
        let ([d, n, n_head, one], kv) = (self.shape(), k.shape());
        self.same_graph(k);
        self.same_graph(v);
        assert_eq!((kv, one), (v.shape(), 1), "attention: keys and values differ");
        let fit = kv[0] == d && n_head.is_multiple_of(kv[2]) && kv[3] == 1;
        assert!(fit, "attention: queries {:?}, keys {kv:?}", self.shape());
        let packed = self.is_packed() && k.is_packed() && v.is_packed();
        assert!(self.is_f32() && packed, "attention: gaps in rows");
        assert_eq!(k.dtype(), v.dtype(), "attention: keys and values are of two types");
        assert!(matches!(k.dtype(), DType::F32 | DType::F16), "attention: {} keys", k.dtype());
        if let Some(mask) = mask {
            self.same_graph(mask);
            assert_eq!(mask.shape(), [kv[1], n, 1, 1], "attention: the mask's shape");
            assert!(mask.dtype() == DType::F16 && mask.is_contiguous(), "attention: the mask");
        }
        if let Some(node) = own::attention([self, k, v], mask, scale) {
            return node;
        }
        let mask = mask.map_or(std::ptr::null_mut(), |mask| mask.raw.as_ptr());
        let (context, raw) = self.args();
        let (k, v) = (k.raw.as_ptr(), v.raw.as_ptr());
        // SAFETY: all are live, of one graph, and of shapes, types and strides that fit.
        let node = unsafe {
            let node = sys::ggml_flash_attn_ext(context, raw, k, v, mask, scale, 0.0, 0.0);
            sys::ggml_flash_attn_ext_set_prec(node, sys::GGML_PREC_F32);
            node
        };
        self.builder.node(node)
    }
}
