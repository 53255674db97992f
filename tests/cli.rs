//! `openvla-run` as a user meets it: what it prints, where, and how it ends.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::process::{assert_fails, stderr, stdout};
use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn table() -> String {
    root().join("example/table.png").display().to_string()
}

fn openvla_run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-run"));
    command.args(args).env_remove("OPENVLA_MODEL").stdin(Stdio::null()).output().unwrap()
}

#[test]
fn people_read_a_line_for_each_dimension() {
    let output = openvla_run(&[&table(), "put eggplant into pot"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stdout(&output);
    let first: Vec<&str> = said.lines().filter_map(|l| l.split_whitespace().next()).collect();
    let names = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper", "in"];
    assert_eq!(first, names, "{said}");
    assert!(said.contains("-0.060000 … 0.060000"), "the range it came from: {said}");
    assert!(stderr(&output).contains("built-in example"), "says which model it took");
}

#[test]
fn it_says_its_name_and_version() {
    let said = stdout(&openvla_run(&["--version"]));
    assert_eq!(said, concat!("openvla-run ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn the_instruction_may_come_after_options() {
    let output = openvla_run(&[&table(), "--json", "put eggplant into pot"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = openvla_run(&[&table(), "--wrist", &table(), "--state", "[-1]", "put it down"]);
    assert_fails(&output, &["--wrist and --state are for OpenVLA-OFT"]);
    let output = openvla_run(&[&table(), "--json"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("an image and an instruction are needed"));
}

#[test]
fn an_explanation_is_a_picture_of_each_token() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("why.png");
    let explain = ["--explain", file.to_str().unwrap()];
    let run = |args: &[&str]| openvla_run(&[args, &explain, &["put eggplant into pot"]].concat());
    let output = run(&[&table()]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("dx "), "and the motion as ever");
    let picture = openvla::decode(&std::fs::read(&file).unwrap()).unwrap();
    // The picture and seven tokens, four in a row.
    assert_eq!(picture.dimensions().0, 12 + 4 * (224 + 12));
    let panel = |x: u32, y: u32| (0..224 * 224).map(move |i| (x + i % 224, y + i / 224));
    let colors = |x, y| panel(x, y).filter(|(x, y)| picture.get_pixel(*x, *y).0[0] > 150).count();
    assert!((1..7).all(|i| colors(12 + i % 4 * 236, 23 + i / 4 * 325) > 20), "patches that shine");
    std::fs::remove_file(&file).unwrap();
    assert_fails(&run(&[&table(), &table()]), &["--explain draws one image"]);
    let oft = root().join("example/tabletop-oft.gguf").display().to_string();
    assert_fails(&run(&["-m", &oft, &table()]), &["--explain is for OpenVLA models"]);
    assert!(!file.exists());
}

#[test]
fn what_an_openvla_oft_cannot_use_is_named() {
    let [model, front, wrist, state] =
        ["tabletop-oft.gguf", "tabletop.png", "tabletop-wrist.png", "tabletop-state.json"]
            .map(|name| root().join("example").join(name).display().to_string());
    let act = |args: &[&str]| {
        openvla_run(&[&["-m", &model, &front][..], args, &["put it down"]].concat())
    };
    let output = act(&["--wrist", &wrist, "--state", &state, "--json"]);
    let chunk: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(chunk["actions"].as_array().unwrap().len(), 8);
    for (args, words) in [
        (&[][..], "the arm's state of 8 numbers is missing"),
        (&["--state", &state], "there are 1 pictures; the model has 2 cameras: full_image, wrist"),
        (&["--wrist", &wrist, "--wrist", &wrist, "--state", &state], "there are 3 pictures"),
        (&["--wrist", &wrist, "--state", "[0, 1]"], "the arm's state has 2 numbers, not 8"),
        (&["--wrist", &wrist, "--state", "[0, 0, 0, 1e999, 0, 0, 0, 0]"], "number out of range"),
        (&["--wrist", &wrist, "--state", "[0, 0, 0, NaN, 0, 0, 0, 0]"], "--state, such as [0.1"),
        (&["--wrist", &wrist, "--state", "none.json"], "cannot read the state none.json"),
        (&["--wrist", "none.png", "--state", &state], "cannot read the image none.png"),
        (&[&front, "--wrist", &wrist, "--state", &state], "one picture of its third-person camera"),
        (&["--wrist", &wrist, "--state", &state, "--draft", "auto"], "nothing to draft"),
        (&["--wrist", &wrist, "--state", &state, "--unnorm-key", "x"], "this model has: tabletop"),
    ] {
        let output = act(args);
        assert_fails(&output, &[words]);
        assert_eq!(stdout(&output), "", "{args:?}");
    }
}

#[test]
fn programs_read_one_object() {
    let output = openvla_run(&[&table(), "put eggplant into pot", "--json"]);
    let said = stdout(&output);
    assert_eq!(said.lines().count(), 1, "{said}");
    let object: Value = serde_json::from_str(&said).unwrap();
    for key in ["action", "normalized", "tokens"] {
        assert_eq!(object[key].as_array().unwrap().len(), 7, "{key}");
    }
    assert_eq!(object["unnorm_key"], "tabletop");
    assert_eq!(object["unconstrained"]["all_actions"], true);
    let timing = object["timing_ms"].as_object().unwrap();
    let stages = ["decode", "prefill", "preprocess", "projector", "total", "vision"];
    assert!(stages.iter().all(|stage| timing[*stage].as_f64().unwrap() > 0.0));
}

#[test]
fn the_same_step_gives_the_same_numbers_whatever_the_threads() {
    let tokens = |threads: &str| {
        let output = openvla_run(&[&table(), "put eggplant into pot", "--json", "-t", threads]);
        serde_json::from_str::<Value>(&stdout(&output)).unwrap()["tokens"].clone()
    };
    assert_eq!(tokens("1"), tokens("3"));
}

/// A stack as large as the address space makes every start of a thread fail.
#[test]
#[cfg(target_os = "linux")]
fn where_no_thread_can_be_started_one_is_enough_and_two_are_an_error() {
    let run = |threads| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-run"));
        command.env("RUST_MIN_STACK", (1_u64 << 47).to_string());
        command.args(["--device", "cpu", "-t", threads, &table(), "pick up the red cube"]);
        command.output().unwrap()
    };
    let alone = run("1");
    assert!(alone.status.success(), "{}", stderr(&alone));
    assert_fails(&run("2"), &["only 1 of 2 threads", "--threads", "ulimit -u"]);
}

#[test]
fn it_says_what_it_ran_on_and_a_device_that_is_not_there_is_named() {
    let output = openvla_run(&[&table(), "put eggplant into pot", "--device", "cpu", "-ngl", "2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("CPU: "), "the device and its memory: {}", stderr(&output));
    let output = openvla_run(&[&table(), "put eggplant into pot", "--device", "nothing:7"]);
    assert_fails(&output, &["no device `nothing:7`", "hint: --device auto"]);
    let output = openvla_run(&[&table(), "put eggplant into pot", "--device", "cuda:x"]);
    assert_eq!(output.status.code(), Some(2), "usage");
    assert!(stderr(&output).contains("`x` is not a number"), "{}", stderr(&output));
}

#[test]
fn an_image_may_come_from_stdin() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_openvla-run"))
        .args(["-", "put eggplant into pot", "--json"])
        .env_remove("OPENVLA_MODEL")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&std::fs::read(table()).unwrap()).unwrap();
    let piped: Value = serde_json::from_str(&stdout(&child.wait_with_output().unwrap())).unwrap();
    let named = openvla_run(&[&table(), "put eggplant into pot", "--json"]);
    let named: Value = serde_json::from_str(&stdout(&named)).unwrap();
    assert_eq!(piped["action"], named["action"]);
}

/// One robot's images, step after step: with drafts, the same image again takes one pass.
#[test]
fn several_images_are_one_session() {
    let images = |flags: &[&str]| {
        openvla_run(&[&[&table(), &table(), &table(), "put eggplant into pot"], flags].concat())
    };
    let steps = |draft: &str| {
        let output = images(&["--json", "--draft", draft]);
        let said = stdout(&output);
        let steps = said.lines().map(|line| serde_json::from_str(line).unwrap());
        steps.collect::<Vec<Value>>()
    };
    let (plain, drafted) = (steps("off"), steps("auto"));
    assert_eq!((plain.len(), drafted.len()), (3, 3));
    let passes = |steps: &[Value]| -> Vec<u64> {
        steps.iter().map(|step| step["draft"]["passes"].as_u64().unwrap()).collect()
    };
    assert_eq!(passes(&plain), [7, 7, 7]);
    assert_eq!(passes(&drafted), [7, 1, 1]);
    for step in &drafted {
        assert_eq!(step["tokens"], plain[0]["tokens"]);
    }
    let totals = &drafted[2]["draft"]["session"];
    assert_eq!((&totals["actions"], &totals["passes_per_action"]), (&3.into(), &3.0.into()));
    assert_eq!(totals["accepted"], Value::from(vec![2; 6]));
    assert_eq!(stdout(&images(&[])).lines().count(), 3 * 8, "a table for each");
}

#[test]
fn an_image_that_cannot_be_read_ends_the_run_after_the_steps_before_it() {
    let output = openvla_run(&[&table(), "nowhere.png", &table(), "wave", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
    assert!(stderr(&output).contains("nowhere.png"), "{}", stderr(&output));
    let twice = openvla_run(&["-", &table(), "-", "wave"]);
    assert_eq!(twice.status.code(), Some(2));
    assert!(stderr(&twice).contains("once"), "{}", stderr(&twice));
    assert_eq!(openvla_run(&["wave"]).status.code(), Some(2), "an image is needed");
    let draft = openvla_run(&[&table(), "wave", "--draft", "on"]);
    assert_eq!(draft.status.code(), Some(2));
}

/// A full disk, and a pipe whose reader is gone.
fn unwritable() -> [Stdio; 2] {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let (_, pipe) = std::io::pipe().unwrap();
    [full.into(), pipe.into()]
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing_and_a_result_that_cannot_is_an_error() {
    let run = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-run"));
        command.args([&table(), "wave"]).env_remove("OPENVLA_MODEL");
        command
    };
    for log in unwritable() {
        let output = run().stderr(log).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(stdout(&output).lines().count(), 8);
    }
    for log in unwritable() {
        let missing = run().arg("nowhere.png").stderr(log).output().unwrap();
        assert_eq!(missing.status.code(), Some(1), "the error is lost, its code is not");
    }
    for results in unwritable() {
        let output = run().stdout(results).stderr(Stdio::piped()).output().unwrap();
        assert_fails(&output, &["os error"]);
    }
}

#[test]
fn probable_mistakes_with_the_instruction_are_warned_of() {
    for empty in ["", " \n"] {
        let output = openvla_run(&[&table(), empty, "--json"]);
        assert!(output.status.success(), "as the reference has it");
        assert!(stderr(&output).contains("warning: the instruction is empty"), "{empty:?}");
    }
    let whole = openvla_run(&[&table(), "In: What action should the robot take to go?\nOut:"]);
    assert!(stderr(&whole).contains("give only the task"), "{}", stderr(&whole));
    let swapped = openvla_run(&["put eggplant into pot", &table()]);
    assert_fails(&swapped, &["put eggplant into pot", "images come first, then the instruction"]);
    let misspelled = openvla_run(&["put eggplant into pot", "nowhere.JPG"]);
    assert_fails(&misspelled, &["images come first, then the instruction"]);
    let forgotten = openvla_run(&[&table(), &table()]);
    assert!(stderr(&forgotten).contains("images come first"), "{}", stderr(&forgotten));
    let sound = openvla_run(&[&table(), "put the cup on a mat."]);
    assert!(!stderr(&sound).contains("warning: "), "{}", stderr(&sound));
}

#[test]
fn the_model_comes_from_the_flag_or_else_the_environment() {
    let example = root().join("example/example.gguf");
    let missing = "no-such-model.gguf";
    let with = |flag: Option<&Path>, environment: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-run"));
        command.arg(table()).arg("wave").env("OPENVLA_MODEL", environment);
        flag.map(|model| command.arg("-m").arg(model));
        command.output().unwrap()
    };
    assert_fails(&with(None, missing), &[missing, "No such file"]);
    let said = stderr(&with(Some(Path::new(missing)), ""));
    assert_eq!(said.matches("No such file").count(), 1, "once is enough: {said}");
    let unset = with(None, "");
    assert!(unset.status.success() && stderr(&unset).contains("built-in"), "{}", stderr(&unset));
    let output = with(Some(&example), missing);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("built-in"));
}

#[test]
fn reference_decoding_is_a_flag() {
    let output = openvla_run(&[&table(), "", "--json", "--reference-decoding"]);
    let object: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(
        object["tokens"], object["unconstrained"]["tokens"],
        "an empty instruction is legal"
    );
}

#[test]
fn mistakes_with_images_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let png = std::fs::read(table()).unwrap();
    let run = |path: &str| openvla_run(&[path, "wave"]);
    assert_fails(&run("nowhere.png"), &["nowhere.png", "No such file"]);
    assert_fails(&run(&file("empty.png", b"")), &["image"]);
    assert_fails(&run(&file("cut.png", &png[..png.len() / 2])), &["image"]);
    assert_fails(&run(&file("text.png", b"not an image")), &["image", "PNG"]);
    assert_fails(&run(&dir.path().display().to_string()), &["directory"]);
    // A header that claims 100,000 × 1 pixels, and one of no width.
    let sized = |name: &str, width: u32| {
        let mut bytes = png.clone();
        bytes[16..20].copy_from_slice(&width.to_be_bytes());
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        file(name, &bytes)
    };
    assert_fails(&run(&sized("wide.png", 100_000)), &["100000", "16384"]);
    assert_fails(&run(&sized("none.png", 0)), &["image"]);
}

/// PNG's checksum, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 * (crc & 1)))
    })
}

#[test]
fn mistakes_with_instructions_and_data_sets_are_named() {
    let long = "put the eggplant into the pot and ".repeat(500);
    assert_fails(&openvla_run(&[&table(), &long]), &["too long", "2048", "fewer words"]);
    let key = openvla_run(&[&table(), "wave", "--unnorm-key", "tabeltop"]);
    assert_fails(&key, &["`tabeltop`", "did you mean `tabletop`?"]);
    let dir = tempfile::tempdir().unwrap();
    let three = several_data_sets(dir.path());
    let three = three.to_str().unwrap();
    assert_fails(
        &openvla_run(&["-m", three, &table(), "wave"]),
        &["3 data sets", "--unnorm-key", "example_bimanual", "example_six_axes"],
    );
    for (key, n) in [("example_tabletop", 7), ("example_six_axes", 6), ("example_bimanual", 14)] {
        let output = openvla_run(&["-m", three, &table(), "wave", "--unnorm-key", key, "--json"]);
        let object: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(object["action"].as_array().unwrap().len(), n, "{key}");
    }
}

/// A converted model with statistics of three data sets.
fn several_data_sets(dir: &Path) -> PathBuf {
    let variant = openvla_example::Variant::V01;
    let spec = openvla_example::Spec { variant, seed: 1, shards: 2, ..openvla_example::COMMITTED };
    openvla_example::write(dir, &spec).unwrap();
    let model = dir.join("model.gguf");
    common::convert(dir, "Q8_0", &model);
    model
}
