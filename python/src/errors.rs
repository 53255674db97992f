//! Errors of ours as Python's exceptions, which `package/openvla_gguf/_errors.py` has.

use pyo3::exceptions::PyFileNotFoundError;
use pyo3::prelude::*;

/// `OpenVLAError`, or `InputError` for what was passed with a step.
pub fn exception(py: Python<'_>, error: &openvla::Error) -> PyErr {
    use openvla::Error as E;
    let class = match error {
        E::Image { .. }
        | E::Observation { .. }
        | E::InstructionTooLong { .. }
        | E::UnknownStatistics { .. }
        | E::AmbiguousStatistics { .. } => "InputError",
        _ => "OpenVLAError",
    };
    // Options of the command line are arguments here.
    let hint =
        error.hint().map(|hint| hint.replace("--unnorm-key", "unnorm_key").replace("--", ""));
    build(py, class, &error.to_string(), hint.as_deref())
}

/// `InputError`.
pub fn input(py: Python<'_>, message: &str, hint: Option<&str>) -> PyErr {
    build(py, "InputError", message, hint)
}

/// `OpenVLAError`.
pub fn failure(py: Python<'_>, message: &str, hint: Option<&str>) -> PyErr {
    build(py, "OpenVLAError", message, hint)
}

fn build(py: Python<'_>, class: &str, message: &str, hint: Option<&str>) -> PyErr {
    let exception = py
        .import("openvla_gguf._errors")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.call1((message, hint)));
    exception.map_or_else(|error| error, PyErr::from_value)
}

/// The number of threads, if one was passed.
///
/// # Errors
/// `InputError` if it is out of bounds.
pub fn thread_count(py: Python<'_>, n: Option<usize>) -> PyResult<Option<usize>> {
    match n {
        Some(n) if !(1..=512).contains(&n) => {
            Err(input(py, &format!("threads: {n} is not from 1 to 512"), None))
        }
        n => Ok(n),
    }
}

/// Raises `FileNotFoundError` for a path that does not exist, whichever reader it is passed to.
pub fn check_file(path: &std::path::Path) -> PyResult<()> {
    if path.exists() {
        return Ok(());
    }
    Err(PyFileNotFoundError::new_err(format!("{} does not exist", path.display())))
}
