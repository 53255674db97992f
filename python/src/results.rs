//! What a step gives: numbers as arrays of numpy.

use numpy::{PyArray1, PyArray2};
use openvla::Action;
use openvla::oft::Chunk;
use pyo3::prelude::*;
use serde::Serialize;

/// One motion.
#[pyclass(frozen, get_all, name = "Action", module = "openvla_gguf")]
pub struct PyAction {
    action: Py<PyArray1<f64>>,
    normalized: Py<PyArray1<f64>>,
    tokens: Py<PyArray1<i64>>,
    unconstrained: Py<PyAny>,
    unnorm_key: String,
    timing_ms: Py<PyAny>,
}

impl PyAction {
    pub fn new(py: Python<'_>, action: &Action) -> PyResult<Self> {
        Ok(Self {
            action: PyArray1::from_slice(py, &action.action).unbind(),
            normalized: PyArray1::from_slice(py, &action.normalized).unbind(),
            tokens: PyArray1::from_iter(py, action.tokens.iter().map(|id| i64::from(*id))).unbind(),
            unconstrained: object(py, &action.unconstrained)?,
            unnorm_key: action.unnorm_key.clone(),
            timing_ms: object(py, &action.timing_ms)?,
        })
    }

    pub fn numbers(&self, py: Python<'_>) -> Py<PyAny> {
        self.action.clone_ref(py).into_any()
    }
}

#[pymethods]
impl PyAction {
    fn __repr__(&self, py: Python<'_>) -> String {
        format!("Action({}, unnorm_key={:?})", self.action.bind(py), self.unnorm_key)
    }
}

/// Actions of an OpenVLA-OFT.
#[pyclass(frozen, get_all, name = "Chunk", module = "openvla_gguf")]
pub struct PyChunk {
    actions: Py<PyArray2<f64>>,
    normalized: Py<PyArray2<f64>>,
    tokens: Option<Py<PyArray2<i64>>>,
    normalized_state: Py<PyArray1<f64>>,
    unnorm_key: String,
    timing_ms: Py<PyAny>,
}

impl PyChunk {
    pub fn new(py: Python<'_>, chunk: &Chunk) -> PyResult<Self> {
        let rows = |rows: &[Vec<f64>]| Ok::<_, PyErr>(PyArray2::from_vec2(py, rows)?.unbind());
        let tokens = chunk.tokens.as_ref().map(|tokens| {
            let wide = |ids: &Vec<u32>| ids.iter().map(|id| i64::from(*id)).collect();
            let tokens: Vec<Vec<i64>> = tokens.iter().map(wide).collect();
            Ok::<_, PyErr>(PyArray2::from_vec2(py, &tokens)?.unbind())
        });
        Ok(Self {
            actions: rows(&chunk.actions)?,
            normalized: rows(&chunk.normalized)?,
            tokens: tokens.transpose()?,
            normalized_state: PyArray1::from_slice(py, &chunk.normalized_state).unbind(),
            unnorm_key: chunk.unnorm_key.clone(),
            timing_ms: object(py, &chunk.timing_ms)?,
        })
    }

    pub fn numbers(&self, py: Python<'_>) -> Py<PyAny> {
        self.actions.clone_ref(py).into_any()
    }
}

#[pymethods]
impl PyChunk {
    fn __repr__(&self, py: Python<'_>) -> String {
        format!("Chunk({}, unnorm_key={:?})", self.actions.bind(py), self.unnorm_key)
    }
}

/// What serializes, as the object that Python's `json` would read.
fn object(py: Python<'_>, value: &impl Serialize) -> PyResult<Py<PyAny>> {
    let json = serde_json::to_string(value)
        .map_err(|error| crate::errors::failure(py, &error.to_string(), None))?;
    Ok(py.import("json")?.call_method1("loads", (json,))?.unbind())
}
