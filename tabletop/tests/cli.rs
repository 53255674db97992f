//! `tabletop` as a user meets it.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use openvla_tabletop::{Learner, Scene, Suite, World, picture, quantile};
use serde_json::Value;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tabletop"));
    command.args(args).stdin(Stdio::null());
    command
}

fn tabletop(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn assert_fails(output: &Output, code: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty() && !said.contains("panicked"), "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{words:?} in\n{said}");
}

#[test]
fn the_expert_is_evaluated_when_no_model_is_named() {
    let said = stdout(&tabletop(&["eval", "-n", "5", "--json"]));
    let reports: Vec<Value> = said.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let suites: Vec<_> = reports.iter().map(|r| r["suite"].as_str().unwrap()).collect();
    assert_eq!(suites, ["base", "visual", "motion", "physical", "semantic", "language"]);
    assert!(reports.iter().all(|report| report["rate"] == 1.0), "{said}");
    let said = stdout(&tabletop(&["eval", "-n", "5", "--suite", "motion", "--hz", "5"]));
    assert!(said.starts_with("motion    100.0 %"), "{said}");
}

/// A file of the examples.
fn example(name: &str) -> String {
    format!("{}/../example/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// It moves without meaning, and in the data set's own units.
#[test]
fn a_model_file_acts() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/example.gguf");
    let example = example.to_str().unwrap();
    let args = ["eval", "-m", example, "-n", "2", "--suite", "base", "--steps", "2", "--json"];
    let once = stdout(&tabletop(&args));
    let report: Value = serde_json::from_str(&once).unwrap();
    assert_eq!((&report["successes"], &report["episodes"]), (&0.into(), &2.into()));
    assert!(report["error"]["metres"].as_f64().unwrap() > 0.001);
    let alone = stdout(&tabletop(&[&args[..], &["--threads", "1"]].concat()));
    assert_eq!(alone, once, "whatever the threads");
}

/// In closed loop, at int4. Of 200 scenes it does 99 % and more; the floor leaves room for processors
/// that round otherwise.
#[test]
fn the_built_in_model_does_what_it_is_asked() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/tabletop.gguf");
    for suite in ["base", "language"] {
        let model = ["eval", "-m", model.to_str().unwrap(), "--json", "-n", "20"];
        let scenes = ["--suite", suite, "--seed", "500", "--draft", "auto"];
        let said = stdout(&tabletop(&[&model[..], &scenes].concat()));
        let report: Value = serde_json::from_str(&said).unwrap();
        assert!(report["rate"].as_f64().unwrap() >= 0.75, "{said}");
        assert!((1.0..=7.0).contains(&report["passes"].as_f64().unwrap()), "{said}");
        assert!(report["accepted"].as_f64().unwrap() > 0.0, "{said}");
    }
}

#[test]
fn an_episode_becomes_a_film_and_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let [film, first] = ["film.gif", "first.png"].map(|name| dir.path().join(name));
    let args = ["play", "--seed", "3", "--size", "64", "-o", film.to_str().unwrap()];
    let said = stdout(&tabletop(&[&args[..], &["--picture", first.to_str().unwrap()]].concat()));
    assert!(said.contains("put eggplant on plate: done in 10 steps"), "{said}");
    assert!(std::fs::read(&film).unwrap().starts_with(b"GIF89a"));
    let first = openvla::decode(&std::fs::read(&first).unwrap()).unwrap();
    assert_eq!(first.dimensions(), (64, 64));
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(names.len(), 2, "nothing is left beside them");
}

/// How it goes in ten scenes of suite base.
fn eval_oft(args: &[&str]) -> Value {
    let oft = example("tabletop-oft.gguf");
    let fixed = ["eval", "-m", &oft, "-n", "10", "--suite", "base", "--json"];
    serde_json::from_str(&stdout(&tabletop(&[&fixed, args].concat()))).unwrap()
}

#[test]
fn the_oft_example_does_what_it_is_asked_in_chunks() {
    let all = eval_oft(&[]);
    assert!(all["successes"].as_u64().unwrap() >= 8, "it did 10 of 10 when it was measured: {all}");
    let [steps, calls] = ["steps", "calls"].map(|key| all[key].as_f64().unwrap());
    assert!(calls < steps / 4.0, "eight steps a call, but for the last: {all}");
    assert_eq!(eval_oft(&["--execute", "8", "--threads", "1"]), all);
    let two = eval_oft(&["--execute", "2"]);
    assert!(two["successes"].as_u64().unwrap() >= 8, "it did 10 of 10 when it was measured: {two}");
    assert!(two["calls"].as_f64().unwrap() > 2.0 * calls, "{two}");
}

#[test]
fn the_oft_examples_film_shows_both_cameras() {
    let dir = tempfile::tempdir().unwrap();
    let film = dir.path().join("film.gif");
    let oft = example("tabletop-oft.gguf");
    let args = ["play", "-m", &oft, "--suite", "language", "--seed", "137", "--size", "64"];
    let said = stdout(&tabletop(&[&args[..], &["-o", film.to_str().unwrap()]].concat()));
    assert!(said.contains("put eggplant into pot: done"), "{said}");
    let size = std::fs::read(&film).unwrap()[6..10].to_vec();
    assert_eq!(size, [128, 0, 64, 0], "wide, then high");
}

#[test]
fn the_examples_wrist_picture_and_state_are_of_the_same_scene() {
    let dir = tempfile::tempdir().unwrap();
    let files = ["film.gif", "wrist.png", "state.json"].map(|name| dir.path().join(name));
    let [film, wrist, state] = files.each_ref().map(|path| path.to_str().unwrap());
    let args = ["play", "--suite", "language", "--seed", "137", "--size", "240", "-o", film];
    let written = ["--wrist-picture", wrist, "--state", state];
    stdout(&tabletop(&[&args[..], &written].concat()));
    let [_, wrist, state] = files.map(|path| std::fs::read(path).unwrap());
    let kept = |name: &str| std::fs::read(example(name)).unwrap();
    let decoded = |png: &[u8]| openvla::decode(png).unwrap();
    let again = "tabletop play --suite language --seed 137 --size 240 --wrist-picture --state";
    assert!(decoded(&wrist) == decoded(&kept("tabletop-wrist.png")), "{again} draws it");
    assert!(state == kept("tabletop-state.json"), "{again} writes it");
}

#[test]
fn the_examples_picture_is_the_first_of_its_scene() {
    let scene = Scene::new(Suite::Language, 137);
    assert_eq!(scene.instruction, "put eggplant into pot");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/tabletop.png");
    let found = openvla::decode(&std::fs::read(path).unwrap()).unwrap();
    let again = "tabletop play --suite language --seed 137 --size 240 --picture FILE draws it";
    assert!(found == picture(&World::new(scene), 240), "{again}");
}

#[test]
fn a_data_set_holds_what_a_trainer_needs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("data");
    let args = ["record", "-n", "6", "--size", "32", "-o", out.to_str().unwrap()];
    stdout(&tabletop(&args));
    let lines = std::fs::read_to_string(out.join("steps.jsonl")).unwrap();
    let steps: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(steps.last().unwrap()["episode"], 5);
    for step in &steps {
        let picture = std::fs::read(out.join(step["image"].as_str().unwrap())).unwrap();
        assert_eq!(openvla::decode(&picture).unwrap().dimensions(), (32, 32));
    }
    let text = std::fs::read_to_string(out.join("dataset_statistics.json")).unwrap();
    let known: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(known["tabletop"]["num_transitions"], steps.len());
    let mut dx: Vec<f64> = steps.iter().map(|step| step["action"][0].as_f64().unwrap()).collect();
    dx.sort_by(f64::total_cmp);
    assert_eq!(known["tabletop"]["action"]["q99"][0], quantile(&dx, 0.99));
    let statistics = openvla::Statistics::parse(text).unwrap();
    assert_eq!(
        statistics.select(None).unwrap().1.action.mask,
        [true, true, true, true, true, true, false]
    );
    assert!(out.join("tokenizer.model").exists() && out.join("tokenizer.json").exists());
    assert_fails(&tabletop(&args), 1, &["is not empty", "name a new folder"]);
}

#[test]
fn a_data_set_for_oft_has_the_wrist_and_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("data");
    stdout(&tabletop(&["record", "--oft", "-n", "4", "--size", "32", "-o", out.to_str().unwrap()]));
    let lines = std::fs::read_to_string(out.join("steps.jsonl")).unwrap();
    let steps: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let mut x: Vec<f64> = Vec::new();
    for step in &steps {
        let [front, wrist] = ["image", "wrist_image"].map(|key| {
            let picture = std::fs::read(out.join(step[key].as_str().unwrap())).unwrap();
            openvla::decode(&picture).unwrap()
        });
        assert!(front.dimensions() == (32, 32) && wrist.dimensions() == (32, 32) && front != wrist);
        assert_eq!(step["state"].as_array().unwrap().len(), 8);
        x.push(step["state"][0].as_f64().unwrap());
    }
    x.sort_by(f64::total_cmp);
    let text = std::fs::read_to_string(out.join("dataset_statistics.json")).unwrap();
    let known: Value = serde_json::from_str(&text).unwrap();
    let proprio = &known["tabletop"]["proprio"];
    assert_eq!(
        (&proprio["q01"][0], &proprio["max"][0]),
        (&quantile(&x, 0.01).into(), &x[x.len() - 1].into())
    );
    let statistics =
        openvla::Statistics::parse_with(text, openvla::Bounds::Quantiles, true).unwrap();
    let state = statistics.select(None).unwrap().1.state.clone().unwrap();
    assert_eq!(state.mask, [true, true, true, false, false, false, true, true]);
}

#[test]
fn a_stream_ends_when_no_one_reads_on() {
    let mut child = command(&["stream", "--size", "16"]).stdout(Stdio::piped()).spawn().unwrap();
    let n_byte = Learner::OpenVla.step_bytes(16);
    let mut steps = vec![0; 3 * n_byte];
    child.stdout.take().unwrap().read_exact(&mut steps).unwrap(); // then closes it
    let instruction = &steps[n_byte - 96..n_byte];
    assert!(String::from_utf8_lossy(instruction).contains("the "), "{instruction:?}");
    assert!(child.wait().unwrap().success());
}

#[test]
fn worlds_of_the_gym_take_turns_with_a_policy() {
    take_turns(&[], Learner::OpenVla, 3 * 16 * 16);
    take_turns(&["--oft"], Learner::Oft, 2 * 3 * 16 * 16);
}

/// The first action of a chunk is the next one.
fn take_turns(flags: &[&str], learner: Learner, n_pixel: usize) {
    let args = ["gym", "-n", "2", "--size", "16", "--suite", "language"];
    let mut child = command(&[&args, flags].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let world = 1 + learner.step_bytes(16);
    let mut worlds = vec![0; 2 * world];
    let expert = 1 + n_pixel..1 + n_pixel + 28;
    for _ in 0..40 {
        out.read_exact(&mut worlds).unwrap();
        for world in worlds.chunks(world) {
            input.write_all(&world[expert.clone()]).unwrap();
        }
    }
    drop(input);
    assert!([worlds[0], worlds[world]] == [1, 1], "the expert's own actions lead there");
    out.read_to_end(&mut worlds).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn mistakes_are_named() {
    assert_fails(&tabletop(&["eval", "-m", "no-such.gguf"]), 1, &["no-such.gguf"]);
    assert_fails(&tabletop(&["eval", "--hz", "5", "--blocking"]), 2, &["--blocking"]);
    assert_fails(&tabletop(&["eval", "--latency-ms", "5"]), 2, &["--hz"]);
    assert_fails(&tabletop(&["eval", "--hz", "NaN"]), 2, &["0.01 to 1000"]);
    let eight = tabletop(&["eval", "-m", &example("example.gguf"), "--execute", "8"]);
    assert_fails(&eight, 1, &["--execute", "one motion at a time"]);
    let oft = example("tabletop-oft.gguf");
    assert_fails(&tabletop(&["eval", "-m", &oft, "--execute", "9"]), 1, &["9 of the 8", "1 to 8"]);
    let draft = tabletop(&["eval", "-m", &oft, "--draft", "auto"]);
    assert_fails(&draft, 1, &["nothing to draft", "leave out --draft"]);
    assert_fails(&tabletop(&["play", "-o", "/no-such-folder/film.gif"]), 1, &["cannot write"]);
}
