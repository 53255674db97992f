//! The extension module `openvla_gguf._native`: what `package/openvla_gguf/_native.pyi` describes.
//!
//! | file | what it is |
//! |---|---|
//! | `policy` | `OpenVLA` and `Session`: a model behind a lock, used without the interpreter's |
//! | `results` | `Action` and `Chunk` |
//! | `image` | what Python calls an image, to pixels |
//! | `convert` | `convert`, on a thread of its own, so that Ctrl-C is heard |
//! | `tabletop` | `Tabletop`: the repository's table |
//! | `errors` | errors of ours as Python's exceptions |

use pyo3::prelude::*;

mod convert;
mod errors;
mod image;
mod policy;
mod results;
mod tabletop;

/// The module.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<policy::OpenVLA>()?;
    module.add_class::<policy::PySession>()?;
    module.add_class::<results::PyAction>()?;
    module.add_class::<results::PyChunk>()?;
    module.add_class::<tabletop::Tabletop>()?;
    module.add_function(wrap_pyfunction!(convert::convert, module)?)
}
