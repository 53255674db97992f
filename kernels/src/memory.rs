//! Tensors that outlive graphs: weights, which are only read, and states, which graphs write.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::observer::Sink;
use crate::repack::{Entry, Layout};
use crate::{Backend, DType, Error, Gguf, Mapped, Observer, Products, Result, Shape, panel};

/// ggml tensors and the buffer they lie in. Kept alive by every handle into it.
pub(crate) struct Home {
    context: NonNull<sys::ggml_context>,
    buffers: Vec<NonNull<sys::ggml_backend_buffer>>,
    pub(crate) backend: Arc<Backend>,
    /// The mapped file that a buffer points into, if it was not copied.
    _file: Option<Gguf>,
    /// What the buffer of panels points into.
    _panels: Option<Mapped>,
}

// SAFETY: after it is built, a home's tensor headers are only read; their data is read and written
// under the backend's lock.
unsafe impl Send for Home {}
// SAFETY: as above.
unsafe impl Sync for Home {}

impl Drop for Home {
    fn drop(&mut self) {
        // SAFETY: handles hold an `Arc` of the home, so none is left; buffers first, as their
        // tensors lie in the context.
        unsafe {
            self.buffers.iter().for_each(|buffer| sys::ggml_backend_buffer_free(buffer.as_ptr()));
            sys::ggml_free(self.context.as_ptr());
        }
    }
}

/// One tensor in a [`Home`].
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) raw: NonNull<sys::ggml_tensor>,
    pub(crate) home: Arc<Home>,
    dtype: DType,
    shape: Shape,
}

// SAFETY: `raw` lies in `home`, which may be shared between threads.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

/// A tensor of the model file. Read-only; cloning it copies a handle.
#[derive(Clone)]
pub struct Weight {
    pub(crate) place: Place,
    /// Gets the squares of what graphs multiply it by, if an [`Observer`] asked for them.
    pub(crate) sink: Option<Sink>,
}

/// A tensor that graphs and the host write: an input, a stage's result, a KV cache.
#[derive(Clone)]
pub struct State(pub(crate) Place);

impl Weight {
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.place.dtype
    }

    /// Sizes, fastest first.
    pub fn shape(&self) -> Shape {
        self.place.shape
    }
}

impl State {
    /// A zeroed tensor on `backend`.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has no room.
    pub fn zeros(backend: &Arc<Backend>, dtype: DType, shape: Shape) -> Result<Self> {
        let context = context(1);
        let raw = new_tensor(context, dtype, &shape);
        let bytes = dtype.row_bytes(shape[0]).expect("plain types have rows of any length")
            * shape[1..].iter().product::<usize>();
        let _idle = backend.lock();
        // SAFETY: the context holds one tensor without data; the backend is live.
        let buffer =
            unsafe { sys::ggml_backend_alloc_ctx_tensors(context.as_ptr(), backend.raw()) };
        let Some(buffer) = NonNull::new(buffer) else {
            // SAFETY: nothing else refers to the context.
            unsafe { sys::ggml_free(context.as_ptr()) };
            let (device, what) = (backend.name().to_owned(), "the model's state".to_owned());
            return Err(Error::Memory { device, what, bytes });
        };
        // SAFETY: a live buffer; no graph knows it yet.
        unsafe { sys::ggml_backend_buffer_clear(buffer.as_ptr(), 0) };
        let backend = backend.clone();
        let home =
            Arc::new(Home { context, buffers: vec![buffer], backend, _file: None, _panels: None });
        Ok(Self(Place { raw, home, dtype, shape }))
    }

    /// Sizes, fastest first.
    pub fn shape(&self) -> Shape {
        self.0.shape
    }

    /// Overwrites the elements from the first on.
    ///
    /// # Panics
    /// If there are too many, or they are of another type than the state's.
    pub fn write<T: Element>(&self, data: &[T]) {
        assert_eq!(T::DTYPE, self.0.dtype, "a state is written in its own type");
        assert!(data.len() <= self.len(), "{} elements into {:?}", data.len(), self.shape());
        let bytes = std::mem::size_of_val(data);
        let _idle = self.0.home.backend.lock();
        // SAFETY: the tensor is allocated and holds at least that many bytes; the lock keeps
        // graphs from running meanwhile.
        unsafe {
            sys::ggml_backend_tensor_set(self.0.raw.as_ptr(), data.as_ptr().cast(), 0, bytes);
        }
    }

    /// All elements.
    ///
    /// # Panics
    /// If `T` is not the state's element type.
    pub fn read<T: Element>(&self) -> Vec<T> {
        assert_eq!(T::DTYPE, self.0.dtype, "a state is read in its own type");
        let mut data = vec![T::default(); self.len()];
        let bytes = std::mem::size_of_val(data.as_slice());
        let _idle = self.0.home.backend.lock();
        // SAFETY: the tensor is allocated and holds exactly that many bytes of plain numbers.
        unsafe {
            sys::ggml_backend_tensor_get(self.0.raw.as_ptr(), data.as_mut_ptr().cast(), 0, bytes);
        }
        data
    }

    fn len(&self) -> usize {
        self.0.shape.iter().product()
    }
}

/// Rust types whose bytes are a tensor's elements.
pub trait Element: Copy + Default + private::Sealed {
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
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for i32 {}
    impl Sealed for i64 {}
    impl Sealed for u16 {}
}

/// The tensors of a model file on a backend, each to be taken exactly once.
pub struct Weights {
    file: String,
    left: BTreeMap<String, Weight>,
}

impl Weights {
    /// Puts the file's tensors on `backend`. The CPU reads them where the file is mapped.
    ///
    /// # Errors
    /// [`Error::Format`] if there are none, [`Error::Memory`] if the device has no room for a copy.
    pub fn load(file: &Gguf, backend: &Arc<Backend>) -> Result<Self> {
        Self::place(file, backend, false, &[], &[])
    }

    /// The same, but with matrices in the layout that they are multiplied fastest by, where there
    /// is one for their type: those are copied, on all of the backend's threads. `tables` names
    /// the tensors that rows are looked up in, which stay as they are.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn repacked(file: &Gguf, backend: &Arc<Backend>, tables: &[&str]) -> Result<Self> {
        let panels = backend.products() == Products::Fastest;
        Self::place(file, backend, panels, &Layout::all(backend), tables)
    }

    fn place(
        file: &Gguf,
        backend: &Arc<Backend>,
        panels: bool,
        layouts: &[Layout],
        tables: &[&str],
    ) -> Result<Self> {
        if file.tensors().is_empty() {
            let why = "it holds no tensors".to_owned();
            return Err(Error::Format { file: file.file().to_owned(), why });
        }
        let context = context(file.tensors().len());
        let raws: Vec<_> =
            file.tensors().iter().map(|t| new_tensor(context, t.dtype, &t.shape)).collect();
        let mut home = Home {
            context,
            buffers: Vec::new(),
            backend: backend.clone(),
            _file: None,
            _panels: None,
        };
        let _idle = backend.lock();
        let no_room = |tensors: &[Entry<'_>]| Error::Memory {
            device: backend.name().to_owned(),
            what: "the weights".to_owned(),
            bytes: tensors.iter().map(|(info, _)| info.range.len()).sum(),
        };
        let mut left: Vec<Entry<'_>> = file.tensors().iter().zip(raws.iter().copied()).collect();
        if panels {
            let (suited, others) = left.into_iter().partition::<Vec<_>, _>(|tensor| {
                !tables.contains(&tensor.0.name.as_str()) && panel::suits(tensor)
            });
            if !suited.is_empty() {
                let (buffer, memory) =
                    panel::copy(file, backend, &suited).ok_or_else(|| no_room(&suited))?;
                home.buffers.push(buffer);
                home._panels = Some(memory);
            }
            left = others;
        }
        for layout in layouts {
            let (suited, others) = left.into_iter().partition::<Vec<_>, _>(|tensor| {
                !tables.contains(&tensor.0.name.as_str()) && layout.suits(backend, tensor)
            });
            if !suited.is_empty() {
                let buffer = layout.copy(file, backend, &suited);
                home.buffers.push(buffer.ok_or_else(|| no_room(&suited))?);
            }
            left = others;
        }
        if !left.is_empty() {
            let mapped = map(file, backend, &left);
            home._file = mapped.is_some().then(|| file.clone());
            let buffer = mapped.or_else(|| copy(file, backend, context, &left));
            home.buffers.push(buffer.ok_or_else(|| no_room(&left))?);
        }
        let usage = sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
        for buffer in &home.buffers {
            // SAFETY: a live buffer.
            unsafe { sys::ggml_backend_buffer_set_usage(buffer.as_ptr(), usage) };
        }
        let home = Arc::new(home);
        let weight = |(info, raw): (&crate::TensorInfo, &NonNull<_>)| {
            let place =
                Place { raw: *raw, home: home.clone(), dtype: info.dtype, shape: info.shape };
            (info.name.clone(), Weight { place, sink: None })
        };
        let left = file.tensors().iter().zip(&raws).map(weight).collect();
        Ok(Self { file: file.file().to_owned(), left })
    }

    /// Makes graphs that multiply by the weights that are taken from now on tell what by. They need
    /// memory for all those inputs together.
    pub fn observe(&mut self) -> Observer {
        let observe = |(name, weight): (&String, &mut Weight)| {
            (name.clone(), weight.sink.get_or_insert_default().clone())
        };
        Observer(self.left.iter_mut().map(observe).collect())
    }

    /// Takes the tensor `name`, which must have exactly this shape.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, was taken before, or has another shape.
    pub fn take(&mut self, name: &str, shape: Shape) -> Result<Weight> {
        let error = |why: String| Error::Tensor { file: self.file.clone(), name: name.into(), why };
        let weight = self.left.remove(name).ok_or_else(|| error("is missing".into()))?;
        if weight.shape() != shape {
            return Err(error(format!("has shape {:?}; {shape:?} is needed", weight.shape())));
        }
        if !weight.dtype().is_float() {
            return Err(error(format!("holds {} elements, not weights", weight.dtype())));
        }
        Ok(weight)
    }

    /// Takes the tensor `name`, which must hold plain f32: norms, biases, embeddings of positions.
    ///
    /// # Errors
    /// As [`Weights::take`], and if its type is another.
    pub fn take_f32(&mut self, name: &str, shape: Shape) -> Result<Weight> {
        let weight = self.take(name, shape)?;
        if weight.dtype() == DType::F32 {
            return Ok(weight);
        }
        let why = format!("is {}; F32 is needed", weight.dtype());
        Err(Error::Tensor { file: self.file.clone(), name: name.to_owned(), why })
    }

    /// Holds that every tensor was taken.
    ///
    /// # Errors
    /// [`Error::Tensor`] names one that is left: the file is of another model than the code.
    pub fn finish(self) -> Result<()> {
        match self.left.into_keys().next() {
            None => Ok(()),
            Some(name) => {
                let why = "belongs to no part of this model".to_owned();
                Err(Error::Tensor { file: self.file, name, why })
            }
        }
    }
}

/// Points the tensors into the file's own bytes, if the backend computes in host memory.
fn map(
    file: &Gguf,
    backend: &Arc<Backend>,
    tensors: &[Entry<'_>],
) -> Option<NonNull<sys::ggml_backend_buffer>> {
    let start = tensors.iter().map(|(info, _)| info.range.start).min()?;
    let end = tensors.iter().map(|(info, _)| info.range.end).max()?;
    let base = file.bytes()[start..end].as_ptr();
    // SAFETY: a live backend has a default buffer type, which is never freed.
    let host = unsafe {
        sys::ggml_backend_buft_is_host(sys::ggml_backend_get_default_buffer_type(backend.raw()))
    };
    if !host || !base.addr().is_multiple_of(crate::ALIGNMENT) {
        return None;
    }
    // SAFETY: the slice outlives the buffer, since `Home` keeps the file. ggml takes a mutable
    // pointer, but writes only where a graph says so, and `Weight` gives graphs no way to.
    let buffer =
        unsafe { sys::ggml_backend_cpu_buffer_from_ptr(base.cast_mut().cast(), end - start) };
    let buffer = NonNull::new(buffer)?;
    for (info, raw) in tensors {
        let address = file.bytes()[info.range.clone()].as_ptr().cast_mut().cast::<c_void>();
        // SAFETY: `Gguf` checked that the tensor's bytes lie inside the file, so inside the buffer,
        // and the tensor has the size that range was computed from.
        let status =
            unsafe { sys::ggml_backend_tensor_alloc(buffer.as_ptr(), raw.as_ptr(), address) };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a host buffer takes any tensor");
    }
    Some(buffer)
}

/// Allocates the tensors on the backend and copies the file's bytes there.
fn copy(
    file: &Gguf,
    backend: &Arc<Backend>,
    context: NonNull<sys::ggml_context>,
    tensors: &[Entry<'_>],
) -> Option<NonNull<sys::ggml_backend_buffer>> {
    // SAFETY: the context holds tensors of which these have no data yet; the backend is live.
    let buffer = unsafe { sys::ggml_backend_alloc_ctx_tensors(context.as_ptr(), backend.raw()) };
    let buffer = NonNull::new(buffer)?;
    for (info, raw) in tensors {
        let bytes = &file.bytes()[info.range.clone()];
        // SAFETY: the tensor is allocated, and its size is what the range was computed from.
        unsafe {
            sys::ggml_backend_tensor_set(raw.as_ptr(), bytes.as_ptr().cast(), 0, bytes.len());
        }
    }
    Some(buffer)
}

/// A ggml context with room for the headers of `n` tensors.
pub(crate) fn context(n: usize) -> NonNull<sys::ggml_context> {
    // SAFETY: reads a constant.
    let overhead = unsafe { sys::ggml_tensor_overhead() };
    let params = sys::ggml_init_params {
        mem_size: (n + 1) * overhead,
        mem_buffer: std::ptr::null_mut(),
        no_alloc: true,
    };
    // SAFETY: the parameters ask ggml to allocate the memory itself.
    NonNull::new(unsafe { sys::ggml_init(params) }).expect("room for a few tensor headers")
}

/// A tensor header in `context`, which has room for it.
fn new_tensor(
    context: NonNull<sys::ggml_context>,
    dtype: DType,
    shape: &Shape,
) -> NonNull<sys::ggml_tensor> {
    let sizes = shape.map(|n| i64::try_from(n).expect("sizes were checked"));
    // SAFETY: the context is live; ggml reads four sizes.
    let raw = unsafe { sys::ggml_new_tensor(context.as_ptr(), dtype.number(), 4, sizes.as_ptr()) };
    NonNull::new(raw).expect("the context has room")
}
