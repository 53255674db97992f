//! `Tabletop`: the repository's table, for policies and harnesses in Python.

use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::ndarray::Array3;
use numpy::{IntoPyArray, PyArray1, PyArray3};
use openvla::image::RgbImage;
use openvla_tabletop::{Action, Scene, Suite, World, expert, picture, wrist_picture};
use pyo3::prelude::*;

use crate::errors::input;

/// A gripper over a small table.
#[pyclass(frozen, module = "openvla_gguf")]
pub struct Tabletop {
    suite: Suite,
    size: u32,
    world: Mutex<World>,
}

type Picture<'py> = Bound<'py, PyArray3<u8>>;

#[pymethods]
impl Tabletop {
    #[new]
    #[pyo3(signature = (suite="base", *, size=224))]
    fn new(py: Python<'_>, suite: &str, size: u32) -> PyResult<Self> {
        let suite = suite.parse().map_err(|why: String| input(py, &why, None))?;
        if !(16..=2048).contains(&size) {
            return Err(input(py, &format!("size: {size} is not from 16 to 2048 pixels"), None));
        }
        Ok(Self { suite, size, world: Mutex::new(World::new(Scene::new(suite, 0))) })
    }

    fn reset<'py>(&self, py: Python<'py>, seed: u64) -> (Picture<'py>, String) {
        *self.world() = World::new(Scene::new(self.suite, seed));
        (self.image(py), self.instruction())
    }

    fn step<'py>(&self, py: Python<'py>, action: Vec<f64>) -> PyResult<(Picture<'py>, f64, bool)> {
        let action: Action = match action.try_into() {
            Ok(action) => action,
            Err(other) => {
                let message = format!("an action of {} numbers; seven are wanted", other.len());
                return Err(input(py, &message, None));
            }
        };
        if let Some(i) = action.iter().position(|x| !x.is_finite()) {
            return Err(input(py, &format!("action[{i}] is {}", action[i]), None));
        }
        let done = {
            let mut world = self.world();
            world.step(&action);
            world.is_done()
        };
        Ok((self.image(py), f64::from(u8::from(done)), done))
    }

    fn expert<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_slice(py, &expert(&self.world()))
    }

    #[getter]
    fn image<'py>(&self, py: Python<'py>) -> Picture<'py> {
        self.see(py, picture)
    }

    #[getter]
    fn wrist_image<'py>(&self, py: Python<'py>) -> Picture<'py> {
        self.see(py, wrist_picture)
    }

    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_slice(py, &self.world().gripper.state())
    }

    #[getter]
    fn instruction(&self) -> String {
        self.world().scene.instruction.clone()
    }

    #[getter]
    fn done(&self) -> bool {
        self.world().is_done()
    }
}

impl Tabletop {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn see<'py>(&self, py: Python<'py>, camera: fn(&World, u32) -> RgbImage) -> Picture<'py> {
        let picture = py.detach(|| camera(&self.world(), self.size)).into_raw();
        let side = self.size as usize;
        let shape = (side, side, 3);
        Array3::from_shape_vec(shape, picture).expect("as many bytes as pixels").into_pyarray(py)
    }
}
