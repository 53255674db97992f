//! `OpenVLA` and `Session`: a model behind a lock, used without the interpreter's.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use openvla::image::RgbImage;
use openvla::oft::Observation;
use openvla::{Config, Options, Policy, Session};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyString};

use crate::errors::{self, exception, failure, input};
use crate::image::pixels;
use crate::results::{PyAction, PyChunk};

/// A policy.
#[pyclass(frozen, module = "openvla_gguf")]
pub struct OpenVLA {
    /// None once it was closed.
    policy: Mutex<Option<Policy>>,
    config: Config,
    unnorm_key: Option<String>,
    /// The process that opened it: its threads are not in another.
    process: u32,
}

/// One robot at one task.
#[pyclass(frozen, name = "Session", module = "openvla_gguf")]
pub struct PySession {
    policy: Py<OpenVLA>,
    session: Mutex<Session>,
    #[pyo3(get)]
    name: String,
}

/// What a robot sees and is asked, in memory of its own.
struct Step {
    images: Vec<RgbImage>,
    state: Option<Vec<f64>>,
    instruction: String,
    unnorm_key: Option<String>,
}

/// What came of it.
enum Motion {
    Action(openvla::Action),
    Chunk(openvla::oft::Chunk),
}

#[pymethods]
impl OpenVLA {
    #[new]
    #[pyo3(signature = (path, unnorm_key=None, *, device="auto", threads=None, n_gpu_layers=None, draft="off", profile=None, center_crop=None))]
    #[expect(clippy::too_many_arguments, reason = "all but two are named")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        unnorm_key: Option<String>,
        device: &str,
        threads: Option<usize>,
        n_gpu_layers: Option<usize>,
        draft: &str,
        profile: Option<&str>,
        center_crop: Option<bool>,
    ) -> PyResult<Self> {
        errors::check_file(&path)?;
        let wrong = |what: &str, why: String| input(py, &format!("{what}: {why}"), None);
        let mut options = Options::default();
        options.devices = device.parse().map_err(|why| wrong("device", why))?;
        options.draft = draft.parse().map_err(|why| wrong("draft", why))?;
        options.n_gpu_layers = n_gpu_layers;
        options.center_crop = center_crop;
        options.profile = profile
            .map(|name| name.parse().map_err(|why: String| wrong("profile", why)))
            .transpose()?;
        if let Some(n) = errors::thread_count(py, threads)? {
            options.n_threads = n;
        }
        let opened = py.detach(|| Policy::open(&path, &options));
        let policy = opened.map_err(|error| exception(py, &error))?;
        let config = policy.config().clone();
        if unnorm_key.is_some() {
            let chosen = config.statistics.select(unnorm_key.as_deref());
            chosen.map_err(|error| exception(py, &error))?;
        }
        let process = std::process::id();
        Ok(Self { policy: Mutex::new(Some(policy)), config, unnorm_key, process })
    }

    #[pyo3(signature = (image, instruction, *, wrist=None, state=None, unnorm_key=None))]
    fn act(
        &self,
        image: &Bound<'_, PyAny>,
        instruction: String,
        wrist: Option<Vec<Bound<'_, PyAny>>>,
        state: Option<Vec<f64>>,
        unnorm_key: Option<String>,
    ) -> PyResult<Py<PyAny>> {
        let step = self.step(image, instruction, &wrist.unwrap_or_default(), state, unnorm_key)?;
        self.run(image.py(), &step, &Mutex::default())
    }

    #[pyo3(signature = (image, instruction, unnorm_key=None, *, wrist=None, state=None))]
    fn predict_action(
        &self,
        image: &Bound<'_, PyAny>,
        instruction: String,
        unnorm_key: Option<String>,
        wrist: Option<Vec<Bound<'_, PyAny>>>,
        state: Option<Vec<f64>>,
    ) -> PyResult<Py<PyAny>> {
        let py = image.py();
        let motion = self.act(image, instruction, wrist, state, unnorm_key)?;
        let motion = motion.bind(py);
        Ok(match motion.cast::<PyAction>() {
            Ok(action) => action.get().numbers(py),
            Err(_) => motion.cast::<PyChunk>()?.get().numbers(py),
        })
    }

    #[pyo3(signature = (name=""))]
    fn session(slf: Py<Self>, name: &str) -> PySession {
        PySession { policy: slf, session: Mutex::default(), name: name.to_owned() }
    }

    fn close(&self, py: Python<'_>) {
        // Whoever acts at the moment is waited for, and may need the interpreter to end.
        py.detach(|| drop(self.policy.lock().unwrap_or_else(PoisonError::into_inner).take()));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*args))]
    fn __exit__(&self, py: Python<'_>, args: &Bound<'_, PyAny>) {
        let _ = args;
        self.close(py);
    }

    #[getter]
    fn name(&self) -> &str {
        &self.config.general.name
    }

    #[getter]
    fn unnorm_keys(&self) -> Vec<&str> {
        self.config.statistics.datasets().keys().map(String::as_str).collect()
    }

    #[getter]
    fn cameras(&self) -> Vec<String> {
        self.config.oft.as_ref().map_or_else(|| vec![String::new()], |oft| oft.cameras.clone())
    }

    #[getter]
    fn chunk(&self) -> usize {
        self.config.oft.as_ref().map_or(1, |oft| oft.chunk)
    }

    #[getter]
    fn state_length(&self) -> usize {
        self.config.oft.as_ref().map_or(0, |oft| oft.n_state)
    }

    fn __repr__(&self) -> String {
        format!("OpenVLA({:?}, unnorm_key={:?})", self.config.general.name, self.unnorm_key)
    }
}

impl OpenVLA {
    /// Copies what was passed, so that nobody can change it while the model runs.
    fn step(
        &self,
        image: &Bound<'_, PyAny>,
        instruction: String,
        wrist: &[Bound<'_, PyAny>],
        state: Option<Vec<f64>>,
        unnorm_key: Option<String>,
    ) -> PyResult<Step> {
        let py = image.py();
        let oft = self.config.oft.as_ref();
        if oft.is_none() && (!wrist.is_empty() || state.is_some()) {
            let message = "wrist and state are for OpenVLA-OFT models; this is an OpenVLA, which sees one camera";
            return Err(input(py, message, None));
        }
        let is_named = image.cast::<PyMapping>().is_ok() && !image.is_instance_of::<PyString>();
        let mut images = Vec::new();
        match oft {
            Some(oft) if is_named => {
                if !wrist.is_empty() {
                    return Err(input(py, "image has the cameras by name; leave out wrist", None));
                }
                let named = image.cast::<PyMapping>()?.items()?;
                let named: Vec<(String, Bound<'_, PyAny>)> = named.extract()?;
                let places: Vec<_> =
                    named.iter().enumerate().map(|(i, (name, _))| (&**name, i)).collect();
                for i in oft.in_order(&places).map_err(|error| exception(py, &error))? {
                    images.push(pixels(&named[i].1)?);
                }
            }
            None if is_named => {
                return Err(PyTypeError::new_err("a mapping of cameras is for OpenVLA-OFT models"));
            }
            _ => {
                images.push(pixels(image)?);
                for wrist in wrist {
                    images.push(pixels(wrist)?);
                }
            }
        }
        let unnorm_key = unnorm_key.or_else(|| self.unnorm_key.clone());
        Ok(Step { images, state, instruction, unnorm_key })
    }

    /// Runs a step while other threads of Python go on.
    fn run(&self, py: Python<'_>, step: &Step, session: &Mutex<Session>) -> PyResult<Py<PyAny>> {
        if std::process::id() != self.process {
            let hint = "open the model in the process that acts, after the fork";
            return Err(failure(py, "the model was opened by another process", Some(hint)));
        }
        let Step { images, state, instruction, unnorm_key } = step;
        let motion = py.detach(|| {
            // A step that panicked left nothing half done that the next one reads.
            let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
            let mut policy = self.policy.lock().unwrap_or_else(PoisonError::into_inner);
            Some(match policy.as_mut()? {
                Policy::OpenVla(policy) => policy
                    .act_in(&mut session, &images[0], instruction, unnorm_key.as_deref())
                    .map(Motion::Action),
                Policy::Oft(policy) => {
                    let images: Vec<&RgbImage> = images.iter().collect();
                    let seen = Observation { images: &images, state: state.as_deref() };
                    policy.act(&seen, instruction, unnorm_key.as_deref()).map(Motion::Chunk)
                }
            })
        });
        let motion = motion.ok_or_else(|| failure(py, "the model was closed", None))?;
        Ok(match motion.map_err(|error| exception(py, &error))? {
            Motion::Action(action) => Py::new(py, PyAction::new(py, &action)?)?.into_any(),
            Motion::Chunk(chunk) => Py::new(py, PyChunk::new(py, &chunk)?)?.into_any(),
        })
    }
}

#[pymethods]
impl PySession {
    #[pyo3(signature = (image, instruction, *, wrist=None, state=None, unnorm_key=None))]
    fn act(
        &self,
        image: &Bound<'_, PyAny>,
        instruction: String,
        wrist: Option<Vec<Bound<'_, PyAny>>>,
        state: Option<Vec<f64>>,
        unnorm_key: Option<String>,
    ) -> PyResult<Py<PyAny>> {
        let py = image.py();
        let policy = self.policy.get();
        let step =
            policy.step(image, instruction, &wrist.unwrap_or_default(), state, unnorm_key)?;
        policy.run(py, &step, &self.session)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*args))]
    fn __exit__(&self, args: &Bound<'_, PyAny>) {
        let _ = args;
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Session::default();
    }

    fn __repr__(&self) -> String {
        format!("Session({:?})", self.name)
    }
}
