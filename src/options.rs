//! How a model is opened: where it runs, and how.

use std::sync::Arc;

use openvla_kernels::{Backend, Device, Gguf, Kernels};

use crate::Result;
use crate::config::Config;
use crate::placement::{Devices, Needs, Placement};
use crate::profile::Profile;
use crate::speculative::Draft;

/// How a model is opened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// The devices to run on.
    pub devices: Devices,
    /// How many of the Llama's layers are on GPUs, if there are any. The default is all.
    pub n_gpu_layers: Option<usize>,
    /// CPU threads. The default is one for each core.
    pub n_threads: usize,
    /// What a token may be.
    pub decoding: Decoding,
    /// Whether tokens are drafted in a session.
    pub draft: Draft,
    /// Whose functions a CPU computes with.
    pub kernels: Kernels,
    /// What is done to pictures. The default is what the file says.
    pub profile: Option<Profile>,
    /// Whether only the center of pictures is shown. The default is what the file says.
    pub center_crop: Option<bool>,
    /// Whether the networks note what their weights are multiplied by: see [`crate::Network::load`].
    pub observe: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            devices: Devices::default(),
            n_gpu_layers: None,
            n_threads: std::thread::available_parallelism().map_or(1, usize::from),
            decoding: Decoding::default(),
            draft: Draft::default(),
            kernels: Kernels::default(),
            profile: None,
            center_crop: None,
            observe: false,
        }
    }
}

impl Options {
    /// What the file says about itself, with what they say about pictures in its place.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn config(&self, file: &Gguf) -> Result<Config> {
        let mut config = Config::read(file)?;
        let preprocess = &mut config.preprocess;
        preprocess.profile = self.profile.unwrap_or(preprocess.profile);
        preprocess.center_crop = self.center_crop.unwrap_or(preprocess.center_crop);
        Ok(config)
    }

    /// Bytes of weights and cache that a model of this file would take in the machine's own memory, now that GPUs have
    /// so much free.
    ///
    /// # Errors
    /// [`crate::Error::DeviceMemory`] if a GPU has no room for its part, [`crate::Error::NoDevice`], and as
    /// [`Config::read`].
    pub fn host_bytes(&self, file: &Gguf) -> Result<usize> {
        let gpus = self.devices.gpus()?;
        let needs = Needs::new(file, &self.config(file)?);
        let placement = Placement::new(&needs, &free(&gpus), self.n_gpu_layers)?;
        Ok(placement.bytes_on(gpus.len(), &needs))
    }
}

/// What the next token is chosen among.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decoding {
    /// The 256 action ids: every token is a motion.
    #[default]
    Actions,
    /// All ids, as the reference does: an id that is not an action is clipped into the first or last
    /// bin, and EOS ends the motion early, whose missing tokens are then taken from the prompt.
    Reference,
}

/// The memory that GPUs have free, in bytes.
fn free(gpus: &[Device]) -> Vec<(String, usize)> {
    gpus.iter().map(|gpu| (gpu.name.clone(), gpu.memory().0)).collect()
}

/// The devices of a model, and where each tensor of its file goes.
pub(crate) struct ModelDevices {
    pub backend: Arc<Backend>,
    /// Whether there are GPUs among the devices.
    pub has_gpus: bool,
    placement: Placement,
}

impl ModelDevices {
    pub fn new(file: &Gguf, config: &Config, options: &Options) -> Result<Self> {
        let gpus = options.devices.gpus()?;
        let needs = Needs::new(file, config);
        let placement = Placement::new(&needs, &free(&gpus), options.n_gpu_layers)?;
        let backend = Backend::open(&gpus, options.n_threads, options.kernels)?;
        Ok(Self { backend, has_gpus: !gpus.is_empty(), placement })
    }

    /// The device of a tensor.
    pub fn device(&self, name: &str) -> usize {
        self.placement.device(name)
    }
}
