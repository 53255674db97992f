//! OpenVLA-OFT runs as a user of the program meets them: what is shown, calibrated and refused.

mod common;
#[path = "torch/writer.rs"]
#[allow(dead_code)] // it writes files of all kinds
mod writer;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::{assert_fails, example, openvla_convert, stderr, stdout};
use half::bf16;
use openvla_kernels::{DType, Gguf};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;
use writer::{file, state_dict, tensor};

const HEAD: &str = "action_head--4000_checkpoint.pt";
const WEIGHTS: &str = "model.safetensors";

/// A folder with a copy of the example's run.
fn run() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("run");
    copy(&example("openvla-tabletop-oft"), &to);
    (dir, to)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Converts `run` beside itself.
fn convert(run: &Path, args: &[&str]) -> Output {
    let usual = ["run", "--no-proof", "--outtype", "F32", "-o", "model.gguf"];
    openvla_convert(&[&usual, args].concat(), run.parent().unwrap())
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

#[test]
fn inspect_shows_what_no_file_of_a_checkpoint_says() {
    let (dir, run) = run();
    succeeds(&convert(&run, &["--chunk", "4", "--profile", "libero"]));
    let inspect = |args: &[&str]| {
        stdout(&openvla_convert(&[&["inspect", "model.gguf"], args].concat(), dir.path()))
    };
    let text = inspect(&[]);
    for line in [
        "OpenVLA-OFT: 4 actions of 7 numbers (l1 head) from 2 cameras (full_image, wrist_image), a state of 8; q01 and q99 \
         are -1 and 1\n",
        "  first prepared as `libero`, their center cropped\n",
    ] {
        assert!(text.contains(line), "{line:?} is missing in:\n{text}");
    }
    let json: Value = serde_json::from_str(&inspect(&["--json"])).unwrap();
    assert_eq!(
        json["oft"],
        json!({ "chunk": 4, "action_length": 7, "state_length": 8, "cameras": ["full_image", "wrist_image"],
                "bounds": "q99", "head": "l1", "film": false })
    );
    assert_eq!(
        [&json["image"]["profile"], &json["image"]["center_crop"]],
        [&json!("libero"), &json!(true)]
    );
    assert_eq!(json["general"]["basename"], "OpenVLA-OFT");
}

#[test]
fn a_finetune_is_named_after_its_task() {
    let dir = tempfile::tempdir().unwrap();
    copy(&example("openvla-tabletop-oft"), &dir.path().join("openvla-7b-oft-finetuned-libero-10"));
    let args = ["openvla-7b-oft-finetuned-libero-10", "--no-proof", "--q4"];
    let output = openvla_convert(&args, dir.path());
    succeeds(&output);
    let said = stderr(&output);
    assert!(
        said.contains("OpenVLA-OFT 1M libero-10 v1.0 to OpenVLA-OFT-1M-libero-10-v1.0-Q4_K_M.gguf"),
        "{said}"
    );
}

/// Frames of both cameras, states and instructions beside a model.
fn prompts(dir: &Path) {
    for (folder, picture) in [("front", "tabletop.png"), ("wrist", "tabletop-wrist.png")] {
        fs::create_dir(dir.join(folder)).unwrap();
        for name in ["1.png", "2.png"] {
            fs::copy(example(picture), dir.join(folder).join(name)).unwrap();
        }
    }
    let state = fs::read_to_string(example("tabletop-state.json")).unwrap();
    let line = state.replace('\n', "");
    fs::write(dir.join("states.jsonl"), format!("{line}\n[0, 0, 0, 0, 0, 0, 0, 0]\n")).unwrap();
    fs::write(dir.join("tasks.txt"), "push the red block\nput it down\nlift it\n").unwrap();
}

fn imatrix(dir: &Path, args: &[&str]) -> Output {
    let usual = [
        "imatrix",
        "model.gguf",
        "--images",
        "front",
        "--instructions",
        "tasks.txt",
        "-o",
        "calib.gguf",
    ];
    openvla_convert(&[&usual, args].concat(), dir)
}

#[test]
fn an_importance_matrix_is_of_all_cameras_the_state_and_the_head() {
    let (dir, run) = run();
    succeeds(&convert(&run, &[]));
    prompts(dir.path());
    let output = imatrix(dir.path(), &["--wrist", "wrist", "--states", "states.jsonl"]);
    succeeds(&output);
    assert!(stderr(&output).contains("from 3 prompts"), "{}", stderr(&output));
    let file = Gguf::open(&dir.path().join("calib.gguf")).unwrap();
    let number = |name: &str| {
        let tensor = file.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
        DType::F32.decode(&file.bytes()[tensor.range.clone()])[0]
    };
    for (matrix, rows) in [
        ("projector.fc1.weight", 3 * 2 * 36), // patches of two cameras
        ("oft.state.fc1.weight", 3),
        ("oft.state.fc2.weight", 3),
        ("oft.head.fc1.weight", 3 * 8), // a row for each action of a chunk
        ("oft.head.fc2.weight", 3 * 8),
        ("blk.2.ffn_down.weight", 3 * 8 * 7), // of the last layer, the rows that the head reads
    ] {
        assert_eq!(number(&format!("{matrix}.counts")), rows as f32, "{matrix}");
    }
    let model = Gguf::open(&dir.path().join("model.gguf")).unwrap();
    let matrices = model.tensors().iter().filter(|t| t.shape[1] > 1 && t.name.ends_with(".weight"));
    let unmeasured = matrices.filter(|t| file.tensor(&format!("{}.counts", t.name)).is_none());
    let unmeasured: Vec<_> = unmeasured.map(|t| t.name.as_str()).collect();
    let looked_up = |name: &&str| name.contains("_embd.");
    assert!(unmeasured.iter().all(looked_up), "{unmeasured:?}");

    let quantize = |args: &[&str]| {
        let usual =
            ["run", "--no-proof", "--outtype", "Q4_K_M", "--tensor-type", "oft.head.fc1=Q4_0"];
        succeeds(&openvla_convert(&[&usual[..], &["-o", "q4.gguf"], args].concat(), dir.path()));
        let file = Gguf::open(&dir.path().join("q4.gguf")).unwrap();
        let head = file.tensor("oft.head.fc1.weight").unwrap();
        file.bytes()[head.range.clone()].to_vec()
    };
    assert!(quantize(&[]) != quantize(&["--imatrix", "calib.gguf"]), "the head has other scales");
}

#[test]
fn prompts_that_do_not_fit_the_cameras_or_the_state_are_refused() {
    let (dir, run) = run();
    succeeds(&convert(&run, &[]));
    prompts(dir.path());
    fs::write(dir.path().join("short.jsonl"), "[1, 2]\n[1, 2]\n").unwrap();
    fs::write(dir.path().join("one.jsonl"), "[0, 0, 0, 0, 0, 0, 0, 0]\n").unwrap();
    fs::create_dir(dir.path().join("fewer")).unwrap();
    fs::copy(example("table.png"), dir.path().join("fewer/1.png")).unwrap();
    for (args, words) in [
        (&[][..], &["2 cameras (full_image, wrist_image)", "--wrist, 0 now"][..]),
        (&["--wrist", "wrist"], &["reads the arm's state", "--states"]),
        (&["--wrist", "fewer", "--states", "states.jsonl"], &["front holds 2 images and fewer 1"]),
        (
            &["--wrist", "wrist", "--states", "one.jsonl"],
            &["one.jsonl holds 1 states for 2 images"],
        ),
        (
            &["--wrist", "wrist", "--states", "short.jsonl"],
            &["line 1 of short.jsonl", "has 2 numbers, not 8"],
        ),
        (
            &["--wrist", "wrist", "--states", "tasks.txt"],
            &["tasks.txt holds 3 states for 2 images"],
        ),
    ] {
        assert_fails(&imatrix(dir.path(), args), words);
        assert!(!dir.path().join("calib.gguf").exists());
    }
    let other = example("tabletop.gguf").display().to_string();
    let args = [
        "imatrix",
        &other,
        "--images",
        "front",
        "--wrist",
        "wrist",
        "--instructions",
        "tasks.txt",
        "-o",
        "x",
    ];
    assert_fails(&openvla_convert(&args, dir.path()), &["for OpenVLA-OFT models"]);
}

#[test]
fn a_run_that_does_not_fit_together_is_refused() {
    let (dir, run) = run();
    let refused = |args: &[&str], words: &[&str]| {
        assert_fails(&convert(&run, args), words);
        assert!(!dir.path().join("model.gguf").exists());
    };
    refused(&["--chunk", "0"], &["chunk_length` is 0", "1 to 256"]);
    refused(&["--chunk", "1000000000"], &["chunk_length` is 1000000000", "1 to 256"]);
    refused(&["--cameras", "0"], &["--cameras is 0; 1 to 8"]);
    refused(&["--cameras", "1000000000"], &["--cameras is 1000000000; 1 to 8"]);

    let later = "action_head--5000_checkpoint.pt";
    fs::copy(run.join(HEAD), run.join(later)).unwrap();
    refused(&[], &[HEAD, later, "another step of training"]);
    fs::remove_file(run.join(later)).unwrap();

    let path = run.join("dataset_statistics.json");
    let sound = fs::read_to_string(&path).unwrap();
    let mut statistics: Value = serde_json::from_str(&sound).unwrap();
    statistics["tabletop"].as_object_mut().unwrap().remove("proprio");
    fs::write(&path, statistics.to_string()).unwrap();
    refused(&[], &["tabletop", "proprio.q01"]);
    fs::remove_file(&path).unwrap();
    refused(&[], &["no dataset_statistics.json", "the base model's"]);
    fs::write(&path, sound).unwrap();

    let narrow = state_dict(&[("module.model.fc2.weight", tensor("Float", "0", &[7, 64]))]);
    fs::write(run.join(HEAD), file(narrow, &[("0", vec![0; 4 * 7 * 64])])).unwrap();
    refused(&[], &["fc2.weight has shape [7, 64]", "the Llama's rows have 96 numbers"]);
}

/// The matrices that the adapter changes.
const CHANGED: [&str; 2] =
    ["language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.2.mlp.up_proj"];
const RANK: usize = 2;

fn numbers(n: usize, step: f32) -> Vec<f32> {
    (0..n).map(|i| 0.1 * (i as f32 * step).sin()).collect()
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
}

/// Writes an adapter of rank 2 and alpha 2 into a run, and `times` its difference into the run's weights.
fn merge(base: &Path, run: &Path, times: f32) {
    let of_base = fs::read(base.join(WEIGHTS)).unwrap();
    let of_base = SafeTensors::deserialize(&of_base).unwrap();
    let (mut weights, mut halves) = (Vec::new(), Vec::new());
    for (name, view) in of_base.iter() {
        let shape = view.shape().to_vec();
        let module = name.strip_suffix(".weight").filter(|module| CHANGED.contains(module));
        let Some(module) = module else {
            weights.push((name.to_owned(), shape, view.data().to_vec()));
            continue;
        };
        let (n_out, n_in) = (shape[0], shape[1]);
        let (a, b) = (numbers(RANK * n_in, 0.7), numbers(n_out * RANK, 0.3));
        let merged = view.data().as_chunks().0.iter().enumerate().map(|(i, x)| {
            let product = |r: usize| b[i / n_in * RANK + r] * a[r * n_in + i % n_in];
            bf16::from_le_bytes(*x).to_f32() + times * (0..RANK).map(product).sum::<f32>()
        });
        weights.push((name.to_owned(), shape, bytes(&merged.collect::<Vec<_>>())));
        let half = |half: &str| format!("base_model.model.{module}.lora_{half}.weight");
        halves.push((half("A"), vec![RANK, n_in], bytes(&a)));
        halves.push((half("B"), vec![n_out, RANK], bytes(&b)));
    }
    let write = |tensors: &[(String, Vec<usize>, Vec<u8>)], path: PathBuf| {
        let view = |data, shape: &Vec<usize>| TensorView::new(Dtype::BF16, shape.clone(), data);
        let views = tensors.iter().map(|(name, shape, data)| (name, view(data, shape).unwrap()));
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    };
    write(&weights, run.join(WEIGHTS));
    let adapter = run.join("lora_adapter");
    fs::create_dir_all(&adapter).unwrap();
    write(&halves, adapter.join("adapter_model.safetensors"));
    let config =
        json!({ "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": CHANGED });
    fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn an_adapter_that_was_merged_twice_or_not_at_all_is_noticed() {
    let (dir, run) = run();
    let base = dir.path().join("base");
    copy(&example("openvla-tabletop"), &base);
    for file in ["config.json", WEIGHTS] {
        fs::copy(run.join(file), base.join(file)).unwrap();
    }
    for (times, words) in [
        (2.0, &["differ from those of base by 2.00 times", "merged more than once"][..]),
        (0.0, &["by 0.00 times", "not merged"]),
    ] {
        merge(&base, &run, times);
        assert_fails(&convert(&run, &["--base", "base"]), words);
        assert!(!dir.path().join("model.gguf").exists());
    }
    merge(&base, &run, 1.0);
    let changed = || {
        succeeds(&convert(&run, &["--base", "base"]));
        let file = Gguf::open(&dir.path().join("model.gguf")).unwrap();
        let tensor = file.tensor("blk.2.ffn_up.weight").unwrap();
        DType::F32.decode(&file.bytes()[tensor.range.clone()])
    };
    let with_weights = changed();
    fs::remove_file(run.join(WEIGHTS)).unwrap();
    for (x, y) in changed().iter().zip(with_weights) {
        // BF16's rounding of the sum, and of the adapter's matrices, whose product is below 0.02.
        assert!((x - y).abs() <= 0.01 * x.abs() + 2e-4, "{y} of the run, {x} merged here");
    }
    let file = Gguf::open(&dir.path().join("model.gguf")).unwrap();
    let made_of: Vec<String> = file.get("openvla.source.sha256").unwrap();
    for name in ["base/config.json", "base/model.safetensors", "dataset_statistics.json", HEAD]
        .into_iter()
        .chain(["lora_adapter/adapter_config.json", "lora_adapter/adapter_model.safetensors"])
    {
        assert!(made_of.iter().any(|file| file.ends_with(&format!("  {name}"))), "{made_of:?}");
    }
    let check = |args: &[&str]| {
        let usual = ["verify", "model.gguf", "--source", "run"];
        openvla_convert(&[&usual, args].concat(), dir.path())
    };
    assert_fails(&check(&[]), &["base/config.json", "say with --base where it is"]);
    succeeds(&check(&["--base", "base"]));
    let unmerged = check(&["--base", "run"]);
    assert!(stdout(&unmerged).contains("missing base/model.safetensors"), "{}", stdout(&unmerged));
}
