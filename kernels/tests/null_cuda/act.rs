//! The child: a process whose GPUs are null CUDA's, which runs a model stage by stage.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use llama_cpp_sys_2 as sys;
use openvla::{OpenVla, Options, cli};
use openvla_kernels::Device;

/// What the parent starts this program with, before [`run`]'s arguments.
pub const WORD: &str = "act";

/// Rounds of all stages: the first run of a graph is direct, the second is captured, the third
/// replayed.
pub const ROUNDS: usize = 3;
/// Steps of decoding in a round.
pub const STEPS: usize = 2;

/// `MODULE MODEL DEVICE LAYERS`; ends as the project's programs do.
pub fn run(arguments: &[String]) -> ExitCode {
    cli::end(act(arguments))
}

fn act(arguments: &[String]) -> Result<()> {
    let [module, model, device, n_gpu_layers] = arguments else { anyhow::bail!("{arguments:?}") };
    ensure!(Device::all().is_empty(), "ggml has started, and there is no GPU yet");
    let path = CString::new(Path::new(module).as_os_str().as_bytes())?;
    // SAFETY: ggml has started, no other thread uses its registry, and the module is one of ggml's.
    ensure!(!unsafe { sys::ggml_backend_load(path.as_ptr()) }.is_null(), "{module} is not loaded");

    let mut options = Options::default();
    options.devices = device.parse().map_err(anyhow::Error::msg)?;
    options.n_gpu_layers = n_gpu_layers.parse().ok();
    options.n_threads = 1;
    options.devices.left_alone().inspect(|why| eprintln!("{why}")); // as the programs say it
    begin("open")?;
    let mut policy = OpenVla::open(model, &options)?;
    let ids = policy.prompt_ids("put eggplant into pot")?;
    let planes = vec![0.5; 6 * 224 * 224];
    let network = policy.network();
    for _ in 0..ROUNDS {
        begin("vision")?;
        let features = network.encode(&planes)?;
        begin("projector")?;
        let soft = network.project(&features)?;
        begin("prefill")?;
        let mut sequence = network.prefill(&ids, &soft)?;
        for _ in 0..STEPS {
            begin("decode")?;
            sequence.step(31_999)?;
        }
    }
    begin("end")?;
    Ok(())
}

/// Notes between the runtime's events what they are of.
fn begin(stage: &str) -> Result<()> {
    let log = std::env::var_os("NULLCUDA_LOG").context("NULLCUDA_LOG is not set")?;
    Ok(writeln!(OpenOptions::new().append(true).create(true).open(log)?, "STAGE {stage}")?)
}
