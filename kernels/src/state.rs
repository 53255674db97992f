//! Tensors that graphs and the host write.

use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::buffer::Buffer;
use crate::context::Context;
use crate::exceptions::{openvla_buffer_clear, openvla_tensor_get, openvla_tensor_set};
use crate::header::bytes_of;
use crate::memory::{Home, TensorHandle};
use crate::usage::Use;
use crate::{Backend, DType, Error, Result, Shape, Weight};

/// A tensor that graphs and the host write: an input, a stage's result, a KV cache.
#[derive(Clone)]
pub struct State {
    pub(crate) handle: TensorHandle,
    /// What every element stays below, if it is a row number: see [`State::ids`].
    pub(crate) below: Option<usize>,
}

impl State {
    /// A zeroed tensor on the first device of `backend`.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has no room.
    ///
    /// # Panics
    /// If a size is zero, or a row is not a whole number of the type's blocks.
    pub fn zeros(backend: &Arc<Backend>, dtype: DType, shape: Shape) -> Result<Self> {
        Self::on(backend, 0, dtype, shape)
    }

    /// `n` row numbers, which all stay below `below`: of i32 for [`crate::Tensor::get_rows`], of i32 or i64
    /// for [`crate::Tensor::set_rows`]. They start as zeros, and [`State::write`] checks the rest.
    ///
    /// # Errors
    /// As [`State::zeros`].
    ///
    /// # Panics
    /// If `dtype` is not an integer type, or `n` or `below` is zero.
    pub fn ids(backend: &Arc<Backend>, dtype: DType, n: usize, below: usize) -> Result<Self> {
        Self::ids_on(backend, 0, dtype, n, below)
    }

    /// As [`State::ids`], on the device that `weight` is on.
    ///
    /// # Errors
    /// As [`State::zeros`].
    ///
    /// # Panics
    /// As [`State::ids`].
    pub fn ids_beside(weight: &Weight, dtype: DType, n: usize, below: usize) -> Result<Self> {
        Self::ids_on(&weight.handle.home.backend, weight.handle.device, dtype, n, below)
    }

    fn ids_on(
        backend: &Arc<Backend>,
        device: usize,
        dtype: DType,
        n: usize,
        below: usize,
    ) -> Result<Self> {
        assert!(!dtype.is_float(), "{dtype} elements are not row numbers");
        assert!(below > 0, "no row number is below zero");
        let state = Self::on(backend, device, dtype, [n, 1, 1, 1])?;
        Ok(Self { below: Some(below), ..state })
    }

    /// A zeroed tensor on the device that `weight` is on.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has no room.
    ///
    /// # Panics
    /// As [`State::zeros`].
    pub fn beside(weight: &Weight, dtype: DType, shape: Shape) -> Result<Self> {
        Self::on(&weight.handle.home.backend, weight.handle.device, dtype, shape)
    }

    fn on(backend: &Arc<Backend>, device: usize, dtype: DType, shape: Shape) -> Result<Self> {
        assert!(!shape.contains(&0), "a state of shape {shape:?} holds nothing");
        let whole = shape[0].is_multiple_of(dtype.block());
        assert!(whole, "rows of {} elements are not whole blocks of {dtype}", shape[0]);
        let no_room = |bytes| Error::Memory {
            device: backend.name(device).to_owned(),
            what: "the model's state".to_owned(),
            bytes,
        };
        let bytes = bytes_of(dtype, &shape).ok_or_else(|| no_room(usize::MAX))?;
        if !is_countable(&shape) {
            return Err(no_room(bytes));
        }
        let context = Context::new(1, 0);
        let raw = context.tensor(dtype, &shape);
        let _idle = backend.lock();
        // SAFETY: the context holds one tensor without data; the backend is live, and the buffer
        // is nobody else's.
        let buffer = unsafe {
            let buffer = sys::ggml_backend_alloc_ctx_tensors(context.raw(), backend.raw(device));
            Buffer::new(buffer, backend, device, Use::States, bytes)
        };
        let buffer = buffer.ok_or_else(|| no_room(bytes))?;
        // SAFETY: a live buffer; no graph knows it yet.
        unsafe { openvla_buffer_clear(buffer.raw()) };
        let home = Arc::new(Home {
            _buffers: vec![buffer],
            _context: context,
            backend: backend.clone(),
            _file: None,
            _packed: None,
            _parts: None,
        });
        Ok(Self { handle: TensorHandle { raw, home, device, dtype, shape }, below: None })
    }

    /// Sizes, fastest first.
    pub fn shape(&self) -> Shape {
        self.handle.shape
    }

    /// Overwrites the elements from the first on.
    ///
    /// # Panics
    /// If there are too many, they are of another type than the state's, or a row number is not below
    /// the bound of [`State::ids`].
    pub fn write<T: Element>(&self, data: &[T]) {
        assert_eq!(T::DTYPE, self.handle.dtype, "a state is written in its own type");
        assert!(data.len() <= self.len(), "{} elements into {:?}", data.len(), self.shape());
        if let Some(below) = self.below {
            for id in data {
                let inside = id.row().is_some_and(|row| row < below);
                assert!(inside, "row number {id:?} is not below {below}");
            }
        }
        let bytes = std::mem::size_of_val(data);
        let _idle = self.handle.home.backend.lock();
        // SAFETY: the tensor is allocated and holds at least that many bytes; the lock keeps
        // graphs from running meanwhile.
        unsafe { openvla_tensor_set(self.handle.raw.as_ptr(), data.as_ptr().cast(), bytes) };
    }

    /// All elements.
    ///
    /// # Panics
    /// If `T` is not the state's element type.
    pub fn read<T: Element>(&self) -> Vec<T> {
        assert_eq!(T::DTYPE, self.handle.dtype, "a state is read in its own type");
        let mut data = vec![T::default(); self.len()];
        let bytes = std::mem::size_of_val(data.as_slice());
        let _idle = self.handle.home.backend.lock();
        // SAFETY: the tensor is allocated and holds exactly that many bytes of plain numbers.
        unsafe { openvla_tensor_get(self.handle.raw.as_ptr(), data.as_mut_ptr().cast(), bytes) };
        data
    }

    fn len(&self) -> usize {
        self.handle.shape.iter().product()
    }
}

/// Rust types whose bytes are a tensor's elements.
pub trait Element: Copy + Default + std::fmt::Debug + private::Sealed {
    /// The same type in ggml.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

impl Element for i64 {
    const DTYPE: DType = DType::I64;
}

/// f16 travels as its bits: [`State::write`] of a mask needs no arithmetic on it.
impl Element for u16 {
    const DTYPE: DType = DType::F16;
}

mod private {
    /// Keeps [`super::Element`] to types that are plain bytes.
    pub trait Sealed: Sized {
        /// As a row number, if it can be one.
        fn row(self) -> Option<usize> {
            None
        }
    }
    impl Sealed for f32 {}
    impl Sealed for u16 {}
    impl Sealed for i32 {
        fn row(self) -> Option<usize> {
            self.try_into().ok()
        }
    }
    impl Sealed for i64 {
        fn row(self) -> Option<usize> {
            self.try_into().ok()
        }
    }
}

/// Whether ggml can count a tensor's elements, some of which it does in 32 bits.
pub(crate) fn is_countable(shape: &Shape) -> bool {
    let count = shape.iter().try_fold(1, |count: usize, n| count.checked_mul(*n));
    count.is_some_and(|count| i32::try_from(count).is_ok())
}
