//! Which device each part of a model is on.
//!
//! Towers, projector and embeddings are on the first device. The Llama's layers follow each other
//! over the GPUs, as many on each as its memory bears, and what is left goes to the CPU; the head is
//! where the last layer is. So a step crosses from device to device once for each.

use std::str::FromStr;

use openvla_kernels::{Device, Gguf};

use crate::config::Config;
use crate::llama::{self, Part};
use crate::{Error, Result};

/// The devices to run on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Devices {
    /// The GPUs there are, else the CPU.
    #[default]
    Auto,
    /// The CPU alone.
    Cpu,
    /// All GPUs of a kind, `cuda` or `vulkan`, or the one of that number.
    Gpu(String, Option<usize>),
}

/// `auto`, `cpu`, `cuda`, `cuda:1`; any kind that ggml was built with.
impl FromStr for Devices {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (kind, number) = match text.split_once(':') {
            Some((kind, number)) => {
                let wrong = |_| format!("`{number}` is not a number; cuda:0 is the first GPU");
                (kind, Some(number.parse().map_err(wrong)?))
            }
            None => (text, None),
        };
        match (kind.to_lowercase().as_str(), number) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("auto" | "cpu", Some(_)) => Err(format!("`{kind}` takes no number")),
            ("", _) => {
                Err("auto, cpu, cuda, vulkan or one of several, such as cuda:1, is wanted"
                    .to_owned())
            }
            (kind, number) => Ok(Self::Gpu(kind.to_owned(), number)),
        }
    }
}

impl Devices {
    /// The GPUs among those there are; none means the CPU.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if it names one that is not there.
    pub fn gpus(&self) -> Result<Vec<Device>> {
        if *self == Self::Cpu {
            return Ok(Vec::new());
        }
        let mut all = Device::all();
        let kinds: Vec<_> = all.iter().map(|gpu| (gpu.kind.as_str(), gpu.is_discrete)).collect();
        let chosen = self.choose(&kinds).ok_or_else(|| {
            let (kind, number) = match self {
                Self::Gpu(kind, number) => (kind.as_str(), *number),
                Self::Auto | Self::Cpu => unreachable!("are always there"),
            };
            let found = all.iter().map(|gpu| format!("{} ({})", gpu.name, gpu.description));
            Error::NoDevice {
                wanted: number.map_or(kind.to_owned(), |number| format!("{kind}:{number}")),
                found: found.collect(),
                why: Device::complaint().filter(|why| concerns(why, kind)),
            }
        })?;
        let mut i = 0..;
        all.retain(|_| chosen.contains(&i.next().expect("counts on")));
        Ok(all)
    }

    /// Why `auto` takes no GPU, where there is one or ggml says why there is none.
    pub fn left_alone(&self) -> Option<String> {
        if *self != Self::Auto {
            return None;
        }
        let all = Device::all();
        match all.first() {
            _ if all.iter().any(|gpu| gpu.is_discrete) => None,
            Some(Device { name, description, kind, .. }) => Some(format!(
                "{name} ({description}) has no memory of its own and is taken only by --device {}",
                kind.to_lowercase()
            )),
            None => Device::complaint().map(|why| format!("no GPU is used: {why}")),
        }
    }

    /// Which of the GPUs, given their kinds and whether they have memory of their own.
    fn choose(&self, all: &[(&str, bool)]) -> Option<Vec<usize>> {
        let of = |kind: &str| {
            let same =
                all.iter().enumerate().filter(move |(_, gpu)| gpu.0.eq_ignore_ascii_case(kind));
            same.map(|(i, _)| i).collect::<Vec<_>>()
        };
        match self {
            Self::Cpu => Some(Vec::new()),
            // Of one kind, since two kinds of library may both list the same GPU.
            Self::Auto => Some(match all.iter().find(|(_, is_discrete)| *is_discrete) {
                Some((kind, _)) => of(kind).into_iter().filter(|i| all[*i].1).collect(),
                None => Vec::new(),
            }),
            Self::Gpu(kind, None) => Some(of(kind)).filter(|found| !found.is_empty()),
            Self::Gpu(kind, Some(number)) => of(kind).get(*number).map(|i| vec![*i]),
        }
    }
}

/// Each layer's device, and what that takes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// The device of every layer; the last is the head's too.
    layers: Vec<usize>,
}

/// What a model takes, in bytes.
#[derive(Debug, Clone)]
pub(crate) struct Needs {
    /// Towers, projector, embeddings: with the first layer.
    front: usize,
    /// Each layer with its cache.
    layers: Vec<usize>,
    /// The head: with the last layer.
    head: usize,
}

/// What a GPU needs beside weights and cache: its driver's context, intermediate tensors,
/// and libraries' own scratch.
const RESERVE: usize = 600 << 20;

/// Rows of cache to reckon with: an image's 256, and a long instruction's.
const N_ROW: usize = 512;

impl Needs {
    /// Of a file, with a cache for prompts longer than most.
    pub fn new(file: &Gguf, config: &Config) -> Self {
        let config = &config.llama;
        let cache = 2 * 2 * N_ROW * config.n_head_kv * config.head_dim(); // f16 keys and values
        let mut needs = Self { front: 0, layers: vec![cache; config.n_layer], head: 0 };
        for info in file.tensors() {
            let part = llama::part(&info.name, config.n_layer);
            *match part {
                Part::Front => &mut needs.front,
                Part::Layer(i) => &mut needs.layers[i],
                Part::Head => &mut needs.head,
            } += info.range.len();
        }
        needs
    }
}

impl Placement {
    /// `n_gpu_layers` of the layers, by default all, on GPUs that have that much memory `free`, in
    /// bytes; the rest on the CPU, which comes after them.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] if one has no room for its part.
    pub fn new(
        needs: &Needs,
        free: &[(String, usize)],
        n_gpu_layers: Option<usize>,
    ) -> Result<Self> {
        let (n_layer, host) = (needs.layers.len(), free.len());
        let n_gpu_layers = n_gpu_layers.unwrap_or(n_layer).min(n_layer);
        if host == 0 {
            return Ok(Self { layers: vec![0; n_layer] });
        }
        let usable = |device: usize| free[device].1.saturating_sub(RESERVE);
        let room: usize = (0..host).map(usable).sum();
        let on_gpus: usize =
            needs.front + needs.head + needs.layers[..n_gpu_layers].iter().sum::<usize>();
        let mut layers = vec![host; n_layer];
        let (mut device, mut taken) = (0, vec![0; host]);
        taken[0] = needs.front;
        for (layer, bytes) in layers.iter_mut().zip(&needs.layers).take(n_gpu_layers) {
            // Each takes a share of the whole like its share of the room.
            let share = on_gpus as f64 * usable(device) as f64 / room.max(1) as f64;
            if device + 1 < host && (taken[device] + bytes / 2) as f64 > share {
                device += 1;
            }
            taken[device] += bytes;
            *layer = device;
        }
        if n_gpu_layers == n_layer {
            taken[device] += needs.head;
        }
        for (device, taken) in taken.iter().enumerate() {
            if *taken > usable(device) {
                let (name, free) = free[device].clone();
                let fits = needs.layers.iter().scan(needs.front, |sum, bytes| {
                    *sum += bytes;
                    Some(*sum)
                });
                let fits = fits.take_while(|sum| *sum <= room).count().min(n_layer - 1);
                let fits = (needs.front <= room).then_some(fits);
                return Err(Error::DeviceMemory {
                    device: name,
                    needed: taken + RESERVE,
                    free,
                    fits,
                });
            }
        }
        Ok(Self { layers })
    }

    /// Bytes on a device.
    pub fn bytes_on(&self, device: usize, needs: &Needs) -> usize {
        let if_here = |at: usize, bytes: usize| if at == device { bytes } else { 0 };
        let layers = self.layers.iter().zip(&needs.layers);
        let layers: usize = layers.map(|(at, bytes)| if_here(*at, *bytes)).sum();
        let last = *self.layers.last().expect("a Llama has layers");
        layers + if_here(0, needs.front) + if_here(last, needs.head)
    }

    /// The device of a tensor.
    pub fn device(&self, name: &str) -> usize {
        match llama::part(name, self.layers.len()) {
            Part::Front => 0,
            Part::Layer(i) => self.layers[i],
            Part::Head => *self.layers.last().expect("a Llama has layers"),
        }
    }
}

/// Whether a complaint of ggml's may be about devices of this kind: not about another kind's module.
fn concerns(complaint: &str, kind: &str) -> bool {
    let mut others = ["cuda", "vulkan"].into_iter().filter(|other| *other != kind);
    !others.any(|other| complaint.contains(&format!("libggml-{other}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_does_not_load_explains_no_other_kind_of_device() {
        let missing =
            "load_backend: failed to load kit/libggml-cuda.so: libcublas.so.13: cannot open";
        assert!(concerns(missing, "cuda") && !concerns(missing, "vulkan"));
        assert!(concerns("CUDA driver version is insufficient", "cuda"));
    }

    const GB: usize = 1 << 30;

    #[test]
    fn devices_are_named_as_people_type_them() {
        let gpu = |kind: &str, number| Ok(Devices::Gpu(kind.to_owned(), number));
        assert_eq!("auto".parse(), Ok(Devices::Auto));
        assert_eq!("CPU".parse(), Ok(Devices::Cpu));
        assert_eq!("cuda".parse(), gpu("cuda", None));
        assert_eq!("CUDA:1".parse(), gpu("cuda", Some(1)));
        for wrong in ["", ":0", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1"] {
            assert!(wrong.parse::<Devices>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_first_kind_of_discrete_gpu_is_taken_and_others_must_be_named() {
        let all = [("Vulkan", false), ("CUDA", true), ("CUDA", true), ("Vulkan", true)];
        let choose = |text: &str| text.parse::<Devices>().unwrap().choose(&all);
        assert_eq!(choose("auto"), Some(vec![1, 2]));
        assert_eq!(choose("cpu"), Some(vec![]));
        assert_eq!(choose("cuda"), Some(vec![1, 2]));
        assert_eq!(choose("cuda:1"), Some(vec![2]));
        assert_eq!(choose("vulkan:0"), Some(vec![0]));
        assert_eq!(choose("cuda:2"), None);
        assert_eq!(choose("metal"), None);
        assert_eq!(Devices::Auto.choose(&all[..1]), Some(vec![]), "a shared GPU is not a gain");
    }

    /// openvla-7b at 4 bits.
    fn needs() -> Needs {
        Needs { front: GB, layers: vec![GB / 8; 32], head: GB / 8 }
    }

    fn place(free: &[usize], n_gpu_layers: Option<usize>) -> Result<Placement> {
        let name = |(i, free): (usize, &usize)| (format!("CUDA{i}"), *free);
        Placement::new(
            &needs(),
            &free.iter().enumerate().map(name).collect::<Vec<_>>(),
            n_gpu_layers,
        )
    }

    #[test]
    fn without_a_gpu_everything_is_on_the_only_device() {
        let placement = place(&[], Some(7)).unwrap();
        for name in ["dinov2.blk.0.ln1.weight", "blk.0.attn_q.weight", "output.weight"] {
            assert_eq!(placement.device(name), 0, "{name}");
        }
    }

    #[test]
    fn the_rest_of_the_layers_and_the_head_stay_on_the_cpu() {
        let placement = place(&[24 * GB], Some(20)).unwrap();
        let device = |name: &str| placement.device(name);
        assert_eq!(device("projector.fc1.weight"), 0);
        assert_eq!(device("token_embd.weight"), 0);
        assert_eq!((device("blk.19.attn_q.weight"), device("blk.20.attn_q.weight")), (0, 1));
        assert_eq!((device("output_norm.weight"), device("action_head.weight")), (1, 1));
        assert_eq!(place(&[24 * GB], None).unwrap().device("output.weight"), 0);
        assert_eq!(place(&[24 * GB], Some(99)).unwrap().device("output.weight"), 0);
    }

    #[test]
    fn what_is_not_on_gpus_is_in_the_machine_s_own_memory() {
        let all = GB + 32 * (GB / 8) + GB / 8;
        let on = |placement: Placement, device| placement.bytes_on(device, &needs());
        assert_eq!(on(place(&[], None).unwrap(), 0), all);
        let placement = place(&[24 * GB], Some(20)).unwrap();
        assert_eq!(placement.bytes_on(0, &needs()), GB + 20 * (GB / 8));
        assert_eq!(on(placement, 1), 12 * (GB / 8) + GB / 8);
        assert_eq!(on(place(&[24 * GB], None).unwrap(), 1), 0);
    }

    #[test]
    fn several_gpus_take_layers_by_their_memory() {
        let placement = place(&[8 * GB, 8 * GB], None).unwrap();
        let on_first = placement.layers.iter().filter(|device| **device == 0).count();
        assert!((11..=14).contains(&on_first), "{on_first} layers beside 1 GB of towers");
        assert!(placement.layers.is_sorted());
        let uneven = place(&[3 * GB, 12 * GB], None).unwrap();
        let fewer = uneven.layers.iter().filter(|device| **device == 0).count();
        assert!(fewer < 6, "{fewer} layers on the small one");
    }

    #[test]
    fn too_little_memory_names_what_would_fit() {
        let Err(Error::DeviceMemory { needed, free, fits, .. }) = place(&[4 * GB], None) else {
            panic!("5.1 GB do not fit into 4");
        };
        assert_eq!((needed, free), (5 * GB + GB / 8 + RESERVE, 4 * GB));
        let fits = fits.unwrap();
        assert!(place(&[4 * GB], Some(fits)).is_ok());
        assert!(place(&[4 * GB], Some(fits + 1)).is_err());
        let none = place(&[GB], None);
        assert!(matches!(none, Err(Error::DeviceMemory { fits: None, .. })), "not even the towers");
    }
}
