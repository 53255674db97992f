//! `openvla-bench` as a user meets it, on the built-in example.

#[path = "../../tests/common/process.rs"]
mod process;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use openvla_bench::project::LAUNCHES;
use openvla_bench::results::{Chunks, Results, VERSION};
use openvla_bench::{plot, report};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use openvla_convert::random::{Spec, Variant};
use openvla_kernels::Kernels;
use process::{assert_fails, stderr, stdout};
use serde_json::Value;

fn openvla_bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-bench"));
    command.args(args).env_remove("OPENVLA_MODEL").output().unwrap()
}

/// A short measurement, made once for all tests.
static MEASURED: LazyLock<String> = LazyLock::new(|| {
    let output = openvla_bench(&["-r", "2", "-t", "1", "-o", "json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains('\r'), "no progress bar where nobody watches");
    stdout(&output)
});

fn file(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// The measurement with something changed.
fn changed(change: impl FnOnce(&mut Value)) -> String {
    let mut value: Value = serde_json::from_str(&MEASURED).unwrap();
    change(&mut value);
    value.to_string()
}

#[test]
fn a_result_says_what_was_measured_where() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "result.json", &MEASURED);
    let r = Results::read(path.as_ref()).unwrap();
    assert_eq!(r.version, VERSION);
    assert_eq!(r.origin.command, "openvla-bench -r 2 -t 1 -o json");
    assert_eq!((r.origin.machine.device.as_str(), r.origin.machine.threads), ("CPU", 1));
    assert_eq!(r.origin.machine.kernels, Kernels::default().resolve().to_string());
    assert!(r.origin.date.ends_with('Z') && r.origin.date.len() == 20, "{}", r.origin.date);
    assert!(!r.origin.commit.is_empty());
    assert_eq!(r.model.r#type.as_deref(), Some("Q4_K_M"));
    let names: Vec<_> = r.stages.iter().map(|stage| stage.name.as_str()).collect();
    let parts = ["preprocess", "vision", "projector", "prefill", "decode_token", "decode", "step"];
    assert_eq!(names[..7], parts);
    assert_eq!(names[7..], ["drafted_step"]);
    assert!(r.drafted_passes.is_some_and(|n| (1.0..=7.0).contains(&n)), "{:?}", r.drafted_passes);
    let rows = |name| r.stage(name).unwrap().rows;
    assert_eq!((rows("prefill"), rows("decode"), rows("step")), (Some(292), Some(6), None));
    assert!(r.stages.iter().all(|stage| stage.ms.n == 2 && stage.ms.min <= stage.ms.p50));
    let ms = |name| r.stage(name).unwrap().ms.min;
    let sum: f64 = ["preprocess", "vision", "projector", "prefill", "decode"].map(ms).iter().sum();
    assert!(sum <= r.stage("step").unwrap().ms.max, "stages are parts of the step");
    let work = |name| r.stage(name).unwrap().work;
    assert_eq!(work("decode").flop, 6 * work("decode_token").flop);
    // 2 layers of 64 channels and an MLP of 96; attention over 292 rows; a head of 768 and 256 rows.
    let flop = 2 * (2 * 64 * (4 * 64 + 3 * 96) + 4 * 64 * 292) + 2 * 64 * (768 + 256);
    assert_eq!(work("decode_token").flop, flop);
    let memory = |name: &str| r.memory.iter().find(|part| part.component == name).unwrap().bytes;
    let (cache, planes) = (2 * 2 * 64 * 2 * 320, 4 * 6 * 224 * 224); // f16, 298 rows and some
    let states = memory("CPU: keys, values, states");
    assert!((cache + planes..3 * (cache + planes)).contains(&states), "{states}");
    assert!(r.memory.iter().all(|part| part.bytes > 0), "{:?}", r.memory);
    assert!(r.peak_bytes.is_none_or(|bytes| bytes > 1 << 20));
    let limits = [
        r.limits.copy_bytes_per_s,
        r.limits.product_f32_flop_per_s,
        r.limits.product_f16_flop_per_s,
    ];
    assert!(limits.iter().all(|limit| *limit > 1e8 && limit.is_finite()), "{limits:?}");
}

/// A measurement of a small OpenVLA-OFT with two cameras, made once for all tests.
static OFT: LazyLock<String> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let path = oft_file(dir.path());
    let words = ["--instruction", "put carrot into pot"];
    let output =
        openvla_bench(&[&["-m", &path, "-r", "2", "-t", "1", "-o", "json"], &words[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
});

fn oft_file(dir: &Path) -> String {
    let path = dir.join("oft.gguf");
    let variant = Variant::Oft { n_camera: 2 };
    let spec = Spec { variant, ..Spec::EXAMPLE };
    let conversion = Conversion::random(&spec, Encoding::default(), 1).unwrap();
    conversion.write(&path, &indicatif::ProgressBar::hidden()).unwrap();
    path.display().to_string()
}

#[test]
fn an_oft_is_measured_by_its_own_stages() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "oft.json", &OFT);
    let r = Results::read(path.as_ref()).unwrap();
    assert_eq!(r.model.chunks, Some(Chunks { cameras: 2, actions: 8 }));
    let names: Vec<_> = r.stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["preprocess", "vision", "projector", "forward", "head", "step"]);
    assert_eq!(r.drafted_passes, None);
    let stage = |name| r.stage(name).unwrap();
    assert_eq!((stage("vision").rows, stage("head").rows), (Some(2 * 256), Some(8 * 7)));
    let n_row = stage("forward").rows.unwrap();
    assert!(n_row > 2 * 256 + 1 + 8 * 7 + 4, "soft tokens, state, actions, words: {n_row}");
    let ms = |name| stage(name).ms.min;
    let sum: f64 = names[..5].iter().map(|name| ms(name)).sum();
    assert!(sum <= stage("step").ms.max, "stages are parts of the step");
    // Two layers of 64 channels and an MLP of 96, of which the last computes 56 rows of all; the state's projector.
    let layer =
        |n: usize| 2 * (3 * 64 * 64 * n_row + (64 * 64 + 3 * 64 * 96) * n) + 4 * 64 * n * n_row;
    let flop = layer(n_row) + layer(56) + 2 * 64 * (8 + 64);
    assert_eq!(stage("forward").work.flop, flop as u64);
    assert_eq!(stage("head").work.flop, (2 * 64 * (7 * 64 + 2 * 64 + 7) * 8) as u64);
    let one = Results::read(file(dir.path(), "r.json", &MEASURED).as_ref()).unwrap();
    let flop = |r: &Results, name| r.stage(name).unwrap().work.flop;
    assert!(["vision", "projector"].iter().all(|n| flop(&r, n) == 2 * flop(&one, n)));
    assert!(r.memory.iter().any(|part| part.component.contains("OpenVLA-OFT")), "{:?}", r.memory);
    assert!(!one.memory.iter().any(|part| part.component.contains("OpenVLA-OFT")));
}

#[test]
fn an_oft_has_a_table_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (one, oft) = (file(dir.path(), "a.json", &MEASURED), file(dir.path(), "b.json", &OFT));
    let said = stdout(&openvla_bench(&["table", &oft, &one]));
    let tables: Vec<&str> = said.split("\n\n").collect();
    assert_eq!(tables.len(), 2, "{said}");
    assert!(tables[0].contains("| prefill |") && !tables[0].contains("cameras"), "{said}");
    assert!(tables[1].contains("| Q4_K_M, 2 cameras, chunks of 8 |"), "{said}");
    let r = Results::read(oft.as_ref()).unwrap();
    let rate = report::significant(8.0 * r.stage("step").unwrap().hz());
    assert!(tables[1].contains(&format!("| {rate} |")), "{rate} actions per second: {said}");
    for text in [report::markdown(&r), report::csv(&r)] {
        assert!(text.contains("forward") && text.contains("head"), "{text}");
    }
    let picture = dir.path().join("hz.svg").display().to_string();
    let drawn = openvla_bench(&["plot", &one, &oft, "-o", &picture]);
    assert!(drawn.status.success(), "{}", stderr(&drawn));
    let wanted = plot::svg(&[Results::read(one.as_ref()).unwrap()]).unwrap();
    assert_eq!(std::fs::read_to_string(&picture).unwrap(), wanted, "steps of one kind alone");
    assert_fails(&openvla_bench(&["plot", &oft, "-o", &picture]), &["OpenVLA-OFT", "table"]);
    assert_fails(&openvla_bench(&["project", &oft]), &["OpenVLA-OFT"]);
}

#[test]
fn people_and_spreadsheets_read_tables() {
    let dir = tempfile::tempdir().unwrap();
    let r = Results::read(file(dir.path(), "r.json", &MEASURED).as_ref()).unwrap();
    let text = report::markdown(&r);
    for word in ["| prefill | 292 |", "of a copy", "weights: vision", "at its peak", "| warm |"] {
        assert!(text.contains(word), "{word:?} is missing in:\n{text}");
    }
    let csv = report::csv(&r);
    let lines: Vec<_> = csv.lines().collect();
    assert_eq!(lines.len(), 1 + r.stages.len());
    let columns = lines[0].split(',').count();
    // The name of a processor may hold commas.
    assert!(lines[1..].iter().all(|line| line.split(',').count() >= columns), "{csv}");
    assert_eq!(openvla_bench(&["-o", "xml"]).status.code(), Some(2));
    assert_eq!(openvla_bench(&["-r", "0"]).status.code(), Some(2));
    assert_fails(&openvla_bench(&["-m", "nowhere.gguf"]), &["nowhere.gguf"]);
}

#[test]
fn results_become_a_table_and_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let one = file(dir.path(), "a.json", &MEASURED);
    let other = changed(|value| {
        value["machine"]["cpu"] = "A|B & <C>".into();
        value["machine"]["kernels"] = "ggml".into();
        value["model"]["type"] = "Q8_0".into();
    });
    let other = file(dir.path(), "b.json", &other);
    let output = openvla_bench(&["table", &one, &other]);
    let said = stdout(&output);
    assert_eq!(said.lines().count(), 4, "{said}");
    assert!(said.contains("| A\\|B & <C>, 1 thread, ggml | Q8_0 |"), "{said}");
    assert_eq!(said, stdout(&openvla_bench(&["table", &other, &one])), "in whichever order");
    let picture = dir.path().join("hz.svg");
    let output = openvla_bench(&["plot", &one, &other, "-o", &picture.display().to_string()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let svg = std::fs::read_to_string(&picture).unwrap();
    for word in ["<svg", "Q4_K_M: ", "Q8_0: ", "&lt;C&gt;", "</svg>"] {
        assert!(svg.contains(word), "{word:?} is missing in:\n{svg}");
    }
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(files, 3, "nothing is left beside the picture");
}

/// The first column of a table of some title, without the lines of its head.
fn first_column(tables: &str, title: &str) -> Vec<String> {
    let lines = tables.lines().skip_while(|line| !line.starts_with(&format!("| {title} |")));
    let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.split('|').nth(1).unwrap().trim().to_owned()).collect()
}

#[test]
fn a_step_is_projected_to_more_cores_stage_by_stage() {
    let dir = tempfile::tempdir().unwrap();
    let oft = oft_file(dir.path());
    for (model, llama) in [(&[][..], ["prefill", "decode"]), (&["-m", &oft], ["forward", "head"])] {
        let more = ["cores", "-t", "3", "-r", "1", "--device", "cpu"];
        let said = stdout(&openvla_bench(&[&more, model].concat()));
        let stages = ["preprocess", "vision", "projector", llama[0], llama[1], "step"];
        for title in ["measured | threads: 1 | threads: 2 | threads: 3", "projected | threads: 1"] {
            assert_eq!(first_column(&said, title), stages, "{said}");
        }
    }
    assert_fails(&openvla_bench(&["cores", "-t", "1"]), &["one thread", "two or more"]);
}

#[test]
fn robots_and_many_steps_have_tables() {
    let robots = stdout(&openvla_bench(&["robots", "-r", "1", "--device", "cpu"]));
    assert_eq!(first_column(&robots, "robots"), ["1", "2", "4", "8"], "{robots}");
    if cfg!(target_os = "linux") {
        let jitter = stdout(&openvla_bench(&["jitter", "-r", "40", "--device", "cpu"]));
        let rows = ["the faster half", "up to 90 %", "up to 99 %"];
        assert_eq!(first_column(&jitter, "steps"), rows, "{jitter}");
    }
}

#[test]
fn cards_that_were_not_measured_are_projected() {
    let dir = tempfile::tempdir().unwrap();
    let one = file(dir.path(), "a.json", &MEASURED);
    let said = stdout(&openvla_bench(&["project", &one]));
    assert!(said.contains("Projections, not measurements") && said.contains("| H200 |"), "{said}");
    let said = stdout(&openvla_bench(&["project", &one, "--card", "rtx 4090"]));
    assert_eq!(said.lines().count(), 5, "{said}");
    assert!(said.contains("| RTX 4090 |") && said.contains("llama.cpp on this card"), "{said}");
    assert_fails(&openvla_bench(&["project", &one, "--card", "RTX 1"]), &["RTX 1", "RTX 4090"]);
    let float = changed(|value| value["model"]["type"] = "F32".into());
    let float = file(dir.path(), "b.json", &float);
    assert_fails(&openvla_bench(&["project", &float]), &["16 bits and less", "F32"]);
}

/// On openvla-7b's numbers at Q4_0.
#[test]
fn a_projection_is_the_formulas() {
    let dir = tempfile::tempdir().unwrap();
    let full = changed(|value| {
        for stage in value["stages"].as_array_mut().unwrap() {
            let (ms, bytes, flop) = match stage["name"].as_str().unwrap() {
                "preprocess" => (2.0, 0, 0),
                "vision" => (1.0, 0, 370_000_000_000_u64),
                "projector" => (1.0, 0, 40_000_000_000),
                "prefill" => (1.0, 0, 3_660_000_000_000),
                "decode" => (1.0, 6 * 3_640_000_000_u64, 0),
                _ => (1.0, 0, 0),
            };
            stage["ms"]["p50"] = ms.into();
            stage["work"] = serde_json::json!({ "bytes": bytes, "flop": flop });
        }
    });
    let full = file(dir.path(), "full.json", &full);
    let said = stdout(&openvla_bench(&["project", &full, "--card", "RTX 4090"]));
    let cells: Vec<&str> = said.lines().last().unwrap().split('|').map(str::trim).collect();
    let number = |cell: &str| cell.trim_end_matches(" ms").parse::<f64>().unwrap();
    // Of 186 tokens a second, 616 launches of 2.16 us have what reading 3.75 GB at 927 GB/s leaves; of 11993
    // rows a second, products at 163.6 TOP/s what 996 launches leave.
    let work = [2.262, 0.2445, 22.37, 23.55];
    let times = [1, 1, 1, 6]; // a launch is one of each token
    let launched = LAUNCHES.iter().zip(times).map(|((_, n), times)| 2.163e-3 * (n * times) as f64);
    let stages: Vec<_> =
        work.iter().zip(launched).map(|(work, launched)| work + launched).collect();
    let step = 2.0 + stages.iter().sum::<f64>(); // with the picture's preprocessing
    for (cell, wanted) in cells[2..].iter().zip(stages.into_iter().chain([step, 1e3 / step])) {
        assert!((number(cell) / wanted - 1.0).abs() < 0.005, "{wanted}: {said}");
    }
    assert_eq!(cells[8..10], ["30", "decode: reading weights"], "goal, and what holds it back");
}

#[test]
fn mistakes_with_result_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let other = file(dir.path(), "v2.json", &changed(|value| value["version"] = 2.into()));
    let cut = file(dir.path(), "cut.json", &MEASURED[..MEASURED.len() / 2]);
    let lacking = changed(|value| value["stages"].as_array_mut().unwrap().truncate(2));
    let lacking = file(dir.path(), "lacking.json", &lacking);
    let out = dir.path().join("hz.svg").display().to_string();
    for (result, words) in [
        (other, ["v2.json", "version 2", "reads 1"]),
        (cut, ["cut.json", "not a result of openvla-bench", "measure again"]),
        (lacking, ["lacking.json", "not a result of openvla-bench", "projector"]),
        (
            dir.path().join("none.json").display().to_string(),
            ["none.json", "cannot read", "No such"],
        ),
    ] {
        assert_fails(&openvla_bench(&["table", &result]), &words);
        assert_fails(&openvla_bench(&["plot", &result, "-o", &out]), &words);
        assert_fails(&openvla_bench(&["project", &result]), &words);
    }
    for command in [["table"].as_slice(), &["plot", "-o", &out]] {
        assert_fails(&openvla_bench(command), &["no result files", "-o json"]);
    }
    assert_eq!(openvla_bench(&["plot", "-o", "-"]).status.code(), Some(2), "stdout is not a file");
    assert!(!Path::new(&out).exists());
}

/// The README shows what is in `benches/results/`, and nothing else.
#[test]
fn the_readme_shows_the_results() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder = std::fs::read_dir(root.join("benches/results"));
    let files = folder.into_iter().flatten().map(|entry| entry.unwrap().path());
    let is_result = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "json");
    let files: Vec<PathBuf> = files.filter(is_result).collect();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let (_, rest) = readme.split_once("<!-- openvla-bench table results/*.json -->\n").unwrap();
    let (shown, _) = rest.split_once("<!-- end -->").unwrap();
    let svg = std::fs::read_to_string(root.join("benches/results/hz.svg")).ok();
    if files.is_empty() {
        assert!(shown.trim().is_empty() && svg.is_none(), "results that are nowhere are shown");
        return;
    }
    let all = Results::read_all(&files).unwrap();
    assert_eq!(shown, report::table(&all).unwrap(), "openvla-bench table results/*.json");
    assert_eq!(svg.unwrap(), plot::svg(&all).unwrap(), "openvla-bench plot … -o results/hz.svg");
}

#[test]
fn a_checkpoint_is_compared_at_every_type() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/openvla-tabletop");
    let stem = dir.path().join("types");
    let args = ["types", checkpoint.to_str().unwrap(), "-n", "1", "-o", stem.to_str().unwrap()];
    let said = stdout(&openvla_bench(&args));
    let f32 = said.lines().nth(2).unwrap();
    assert!(f32.starts_with("| F32 |") && f32.contains("| 100.0 % |"), "it agrees with itself");
    let text = std::fs::read_to_string(stem.with_extension("json")).unwrap();
    let found: Value = serde_json::from_str(&text).unwrap();
    let types = found["types"].as_array().unwrap();
    assert_eq!(said.lines().count(), 2 + types.len(), "{said}");
    let bytes = |i: usize| types[i]["bytes"].as_u64().unwrap();
    assert!((1..types.len()).all(|i| bytes(i) <= bytes(i - 1)), "fewer bits, fewer bytes: {said}");
    assert_eq!(found["running"].as_array().unwrap().len(), 3 * 6);
    assert!(std::fs::read_to_string(stem.with_extension("svg")).unwrap().starts_with("<svg"));
}
