//! ggml's Vulkan backend under this program, on whatever driver there is: `tests/vulkan` brings a software one.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use common::process::{assert_fails, stderr, stdout};
use common::{Stage, TOLERANCE, convert, of};
use indicatif::ProgressBar;
use openvla::{Devices, Options};
use openvla_bench::compare::compare;
use openvla_convert::Conversion;
use openvla_example::{COMMITTED, Size, Spec};
use serde_json::Value;
use tempfile::TempDir;

/// A step of the trained example on a device, with these variables of ggml's. At F16, where no rounding of
/// activations to 8 bits tells a CPU and a GPU apart: 2 MB.
fn act(device: &str, variables: &[(&str, &str)], more: &[&str]) -> Output {
    static MODEL: LazyLock<TempDir> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = example().join("openvla-tabletop");
        convert(&checkpoint, "F16", &folder.path().join("model.gguf"));
        folder
    });
    let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-run"));
    command.arg("-m").arg(MODEL.path().join("model.gguf")).arg(example().join("tabletop.png"));
    command.args(["put eggplant into pot", "--json", "-t", "1", "--device", device]).args(more);
    command.envs(variables.iter().copied()).output().unwrap()
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("example")
}

fn tokens(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_str::<Value>(&stdout(output)).unwrap()["tokens"].clone()
}

const TWO: (&str, &str) = ("GGML_VK_VISIBLE_DEVICES", "0,0");

#[test]
#[ignore = "needs a Vulkan driver: run tests/vulkan"]
fn one_device_two_and_parts_of_one_act_as_the_cpu() {
    let cpu = tokens(&act("cpu", &[], &["--kernels", "ggml"]));
    for (device, variables, more, on) in [
        ("vulkan", &[][..], &[][..], &["Vulkan0: "][..]),
        ("vulkan", &[], &["-ngl", "1"], &["Vulkan0: ", "CPU: "]),
        ("vulkan", &[TWO], &[], &["Vulkan0: ", "Vulkan1: "]),
        ("vulkan:1", &[TWO], &[], &["Vulkan1: "]),
    ] {
        let output = act(device, variables, more);
        assert_eq!(tokens(&output), cpu, "{device} {variables:?} {more:?}");
        let said = stderr(&output);
        let holds = |name: &&str| said.lines().any(|line| line.starts_with(*name));
        assert!(on.iter().all(holds), "{device} {variables:?} {more:?}: {said}");
    }
}

/// The model's inputs, 1.2 MB, are its largest buffer; its weights, 2 MB, do not fit into one.
#[test]
#[ignore = "needs a Vulkan driver: run tests/vulkan"]
fn weights_lie_in_as_many_buffers_as_the_driver_asks_for() {
    let cpu = tokens(&act("cpu", &[], &["--kernels", "ggml"]));
    for bytes in ["300000", "1300000"] {
        let limits = [
            ("GGML_VK_FORCE_MAX_BUFFER_SIZE", "1300000"),
            ("GGML_VK_SUBALLOCATION_BLOCK_SIZE", bytes),
        ];
        assert_eq!(tokens(&act("vulkan", &limits, &[])), cpu, "{bytes} bytes at most");
    }
}

#[test]
#[ignore = "needs a Vulkan driver: run tests/vulkan"]
fn what_a_driver_refuses_is_an_error_with_words() {
    let limits = |bytes| [("GGML_VK_FORCE_MAX_BUFFER_SIZE", bytes)];
    assert_fails(&act("vulkan", &limits("1000"), &[]), &["Vulkan0 has no room for"]);
    assert_fails(&act("vulkan:7", &[], &[]), &["vulkan:7", "there are: Vulkan0"]);
    assert_fails(&act("cuda", &[], &[]), &["there are: Vulkan0", "--features cuda"]);
}

/// Towers' heads of 64 and 72 numbers and a Llama's of 128, of which the goldens have none. The CPU may be as
/// far from the truth as the device.
#[test]
#[ignore = "needs a Vulkan driver: run tests/vulkan"]
fn heads_of_real_sizes_compute_as_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    for encoding in ["F16", "BF16", "Q8_0", "Q4_K_M"] {
        let spec = Spec { size: Size::Heads, ..COMMITTED };
        let conversion = Conversion::random(&spec, of(encoding).encoding, 2).unwrap();
        conversion.write(&model, &ProgressBar::hidden()).unwrap();
        let mut options = Options::default();
        options.devices = Devices::Gpu("vulkan".to_owned(), None);
        let comparison = compare(&model, &options).unwrap();
        let (_, limits) = TOLERANCE.iter().find(|(name, _)| *name == encoding).unwrap();
        assert_eq!(comparison.stages.len(), 9, "features, soft tokens, seven logits");
        for (i, stage) in comparison.stages.iter().enumerate() {
            eprintln!("{encoding:6} {:11} {:.1e}", stage.stage, stage.error);
            let limit = 2.0 * limits[i.min(Stage::Logits as usize)];
            assert!(stage.error <= limit, "{encoding} {}: {:.1e}", stage.stage, stage.error);
        }
    }
}
