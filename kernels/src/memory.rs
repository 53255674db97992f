//! Tensors that outlive graphs, and their memory: a file's weights, which are only read.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::buffer::Buffer;
use crate::context::{Context, Entry};
use crate::observer::Sink;
use crate::own::pack::{can_pack, pack};
use crate::repack::Layout;
use crate::usage::Use;
use crate::{Backend, DType, Error, Gguf, Mapped, Observer, Result, Shape, TensorInfo, finite};

/// ggml tensors and the buffers they are in. Kept alive by every handle into it.
pub(crate) struct Home {
    /// Freed before the context of their tensors.
    pub(crate) _buffers: Vec<Buffer>,
    pub(crate) _context: Context,
    pub(crate) backend: Arc<Backend>,
    /// The file in memory that a buffer points into, if it was not copied.
    pub(crate) _file: Option<Gguf>,
    /// What the buffer of packed weights points into.
    pub(crate) _packed: Option<Mapped>,
    /// Other memory that the tensors use.
    pub(crate) _parts: Option<Arc<Home>>,
}

// SAFETY: after it is built, a home's tensor headers are only read; their data is read and written
// under the backend's lock.
unsafe impl Send for Home {}
// SAFETY: as above.
unsafe impl Sync for Home {}

/// One tensor in a [`Home`].
#[derive(Clone)]
pub(crate) struct TensorHandle {
    pub(crate) raw: NonNull<sys::ggml_tensor>,
    pub(crate) home: Arc<Home>,
    pub(crate) device: usize,
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
}

// SAFETY: `raw` belongs to `home`, which may be shared between threads.
unsafe impl Send for TensorHandle {}
// SAFETY: as above.
unsafe impl Sync for TensorHandle {}

/// A tensor of the model file. Read-only; cloning it copies a handle.
#[derive(Clone)]
pub struct Weight {
    pub(crate) name: Arc<str>,
    pub(crate) handle: TensorHandle,
    /// Whether its bytes are packed for our own products, of the backend's instruction set.
    pub(crate) is_packed: bool,
    /// Gets the squares of what graphs multiply it by, if an [`Observer`] asked for them.
    pub(crate) sink: Option<Sink>,
}

impl Weight {
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.handle.dtype
    }

    /// Sizes, fastest first.
    pub fn shape(&self) -> Shape {
        self.handle.shape
    }

    /// Whether our own products read it, in their own layout: they compute each column by itself, whatever the others.
    pub fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// The device of its backend that it is on.
    pub fn device(&self) -> usize {
        self.handle.device
    }

    /// Matrices `[k, m]` as one, `[k, Σ m]`, if they lie in memory as its rows would: of one type and
    /// one after another in the file. A product by it is one launch on a GPU in place of several.
    /// `None` too in ggml's packed layouts, and if an [`Observer`] asked what each is multiplied by.
    ///
    /// # Panics
    /// If there are none.
    pub fn stacked(parts: &[&Self]) -> Option<Self> {
        let Self { name, handle: first, is_packed, .. } = parts[0];
        let backend = &first.home.backend;
        let [k, _, rest @ ..] = first.shape;
        let fits = |part: &&Self| {
            let TensorHandle { home, dtype, shape, .. } = &part.handle;
            let alike = Arc::ptr_eq(home, &first.home)
                && (*dtype, part.is_packed) == (first.dtype, *is_packed);
            alike && *shape == [k, shape[1], 1, 1] && rest == [1, 1] && part.sink.is_none()
        };
        if !parts.iter().all(fits) {
            return None;
        }
        let shape = [k, parts.iter().map(|part| part.shape()[1]).sum(), 1, 1];
        let context = Context::new(1, 0);
        let raw = context.tensor(first.dtype, &shape);
        // SAFETY: tensors of a home are live and have a live buffer.
        let (head, raws) =
            unsafe { (first.raw.as_ref(), parts.iter().map(|part| part.handle.raw.as_ref())) };
        // SAFETY: as above.
        let size = |raw| unsafe { sys::ggml_backend_buffer_get_alloc_size(head.buffer, raw) };
        let packed = Layout::packed(backend);
        let mut end = head.data;
        for part in raws {
            let follows = (part.buffer, part.data) == (head.buffer, end);
            if !follows || Layout::is_one_of(&packed, part) {
                return None;
            }
            end = end.wrapping_byte_add(size(part));
        }
        if size(raw.as_ptr()) != end.addr() - head.data.addr() {
            return None;
        }
        // SAFETY: the tensor has no data yet, and as many bytes as the parts, which lie in the buffer.
        let status =
            unsafe { sys::ggml_backend_tensor_alloc(head.buffer, raw.as_ptr(), head.data) };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a buffer takes what it holds already");
        let home = Home {
            _buffers: Vec::new(),
            _context: context,
            backend: backend.clone(),
            _file: None,
            _packed: None,
            _parts: Some(first.home.clone()),
        };
        let handle = TensorHandle { raw, home: Arc::new(home), shape, ..first.clone() };
        // Panels of all parts one after the other are those of the whole.
        Some(Self { name: name.clone(), handle, is_packed: *is_packed, sink: None })
    }
}

/// The tensors of a model file on a backend, each to be taken exactly once.
pub struct Weights {
    file: String,
    left: BTreeMap<String, Weight>,
}

impl Weights {
    /// The file's tensors for the CPU, in the layout that they have in the file.
    ///
    /// # Errors
    /// [`Error::Format`] if there are none, [`Error::Tensor`] if one holds a number that is not finite,
    /// [`Error::Memory`] if there is no room.
    pub fn load(file: &Gguf, backend: &Arc<Backend>) -> Result<Self> {
        Self::new(file, backend, &|_| false, &[], &|_, _| false)
    }

    /// Puts each tensor on the device that `place` names, in the layout that this device computes
    /// fastest with, if it has one; those are copied, on all of the backend's threads. What a GPU
    /// cannot compute with goes to the CPU. `tables` names the tensors that rows are looked up in.
    ///
    /// # Errors
    /// [`Error::Format`] if there are none, [`Error::Tensor`] if one holds a number that is not finite,
    /// [`Error::Memory`] if a device has no room.
    pub fn placed(
        file: &Gguf,
        backend: &Arc<Backend>,
        tables: &[&str],
        place: &dyn Fn(&str) -> usize,
    ) -> Result<Self> {
        let is_table = |info: &TensorInfo| tables.contains(&info.name.as_str());
        let is_at = |info: &TensorInfo, device| place(&info.name) == device;
        let is_packed = |tensor: &Entry<'_>| {
            let is_here = backend.isa().is_some() && is_at(tensor.0, backend.host());
            is_here && !is_table(tensor.0) && can_pack(tensor)
        };
        let suits = |layout: &Layout, tensor: &Entry<'_>| {
            let (info, _) = tensor;
            let here = is_at(info, layout.device) || layout.device == backend.host();
            here && layout.suits(backend, tensor, is_table(info))
        };
        Self::new(file, backend, &is_packed, &Layout::all(backend), &suits)
    }

    fn new(
        file: &Gguf,
        backend: &Arc<Backend>,
        is_packed: &dyn Fn(&Entry<'_>) -> bool,
        layouts: &[Layout],
        suits: &dyn Fn(&Layout, &Entry<'_>) -> bool,
    ) -> Result<Self> {
        if file.tensors().is_empty() {
            let why = "it holds no tensors".to_owned();
            return Err(Error::Format { file: file.file().to_owned(), why });
        }
        finite::check(file, backend.n_threads())?;
        let context = Context::new(file.tensors().len(), 0);
        let raws: Vec<_> =
            file.tensors().iter().map(|t| context.tensor(t.dtype, &t.shape)).collect();
        let no_room = |device: usize, tensors: &[Entry<'_>]| Error::Memory {
            device: backend.name(device).to_owned(),
            what: "the weights".to_owned(),
            bytes: tensors.iter().map(|(info, _)| info.range.len()).sum(),
        };
        let _idle = backend.lock();
        let mut buffers: Vec<Buffer> = Vec::new();
        let mut devices = BTreeMap::new();
        let mut left: Vec<Entry<'_>> = file.tensors().iter().zip(raws.iter().copied()).collect();
        let (to_pack, others): (Vec<_>, _) = left.into_iter().partition(is_packed);
        let mut packed = None;
        if let Some(isa) = backend.isa().filter(|_| !to_pack.is_empty()) {
            let copied = pack(isa, file, backend, &to_pack);
            let (buffer, memory) = copied.ok_or_else(|| no_room(backend.host(), &to_pack))?;
            buffers.push(buffer);
            packed = Some(memory);
        }
        let packed_names: BTreeSet<_> =
            to_pack.iter().map(|(info, _)| info.name.as_str()).collect();
        left = others;
        for layout in layouts {
            let (here, others): (Vec<_>, _) = left.into_iter().partition(|t| suits(layout, t));
            if !here.is_empty() {
                let copied = layout.copy(file, backend, &here);
                buffers.extend(copied.ok_or_else(|| no_room(layout.device, &here))?);
                devices.extend(here.iter().map(|(info, _)| (info.name.as_str(), layout.device)));
            }
            left = others;
        }
        let mut in_place = None;
        if !left.is_empty() {
            // What is mapped is copied: a policy must not change, or end, with its file.
            let buffer = if file.is_mapped() { None } else { point_into(file, backend, &left) };
            in_place = buffer.is_some().then(|| file.clone());
            let copied = match buffer {
                Some(buffer) => Some(vec![buffer]),
                None => Layout::plain(backend).copy(file, backend, &left),
            };
            buffers.extend(copied.ok_or_else(|| no_room(backend.host(), &left))?);
        }
        let backend = backend.clone();
        let home = Arc::new(Home {
            _buffers: buffers,
            _context: context,
            backend,
            _file: in_place,
            _packed: packed,
            _parts: None,
        });
        let weight = |(info, raw): (&TensorInfo, &NonNull<_>)| {
            let device = devices.get(info.name.as_str()).copied();
            let device = device.unwrap_or(home.backend.host());
            let (dtype, shape) = (info.dtype, info.shape);
            let handle = TensorHandle { raw: *raw, home: home.clone(), device, dtype, shape };
            let is_packed = packed_names.contains(info.name.as_str());
            let weight = Weight { name: info.name.as_str().into(), handle, is_packed, sink: None };
            (info.name.clone(), weight)
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

    /// Checks that every tensor was taken.
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

/// Points the tensors into the file's own bytes, unless they are not aligned.
fn point_into(file: &Gguf, backend: &Arc<Backend>, tensors: &[Entry<'_>]) -> Option<Buffer> {
    let start = tensors.iter().map(|(info, _)| info.range.start).min()?;
    let end = tensors.iter().map(|(info, _)| info.range.end).max()?;
    let base = file.bytes()[start..end].as_ptr();
    let bytes = tensors.iter().map(|(info, _)| info.range.len()).sum(); // there may be others between them
    if !base.addr().is_multiple_of(crate::ALIGNMENT) {
        return None;
    }
    // SAFETY: the slice outlives the buffer, since `Home` keeps the file. ggml takes a mutable
    // pointer, but writes only where a graph says so, and `Weight` gives graphs no way to.
    let buffer = unsafe {
        let raw = sys::ggml_backend_cpu_buffer_from_ptr(base.cast_mut().cast(), end - start);
        Buffer::new(raw, backend, backend.host(), Use::Weights, bytes)
    }?;
    for (info, raw) in tensors {
        let address = file.bytes()[info.range.clone()].as_ptr().cast_mut().cast::<c_void>();
        // SAFETY: `Gguf` checked that the tensor's bytes lie inside the file, so inside the buffer,
        // and the tensor has the size that range was computed from.
        let status = unsafe { sys::ggml_backend_tensor_alloc(buffer.raw(), raw.as_ptr(), address) };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a host buffer takes any tensor");
    }
    Some(buffer)
}
