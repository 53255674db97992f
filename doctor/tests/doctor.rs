//! The program as a user meets it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use openvla::image::RgbImage;
use openvla_doctor::picture::PictureChange;
use serde_json::{Value, json};

#[path = "../examples/confusion/recording.rs"]
mod recording;

use recording::record;

fn doctor(args: &[&str]) -> (Output, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-doctor"));
    command.env_remove("OPENVLA_MODEL").args(args).args(["--threads", "1"]);
    let output = command.output().unwrap();
    let [out, said] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    (output, out, said)
}

/// An episode of the built-in example's table, in a folder.
fn episode(change: impl Fn(&RgbImage) -> RgbImage) -> tempfile::TempDir {
    let mut recording = record(4_000_000, 12, 84);
    recording.frames.iter_mut().flatten().for_each(|image| *image = change(image));
    let folder = tempfile::tempdir().unwrap();
    recording.write(folder.path()).unwrap();
    folder
}

#[test]
fn a_fault_is_named_with_what_to_do() {
    let page = tempfile::tempdir().unwrap();
    let html = page.path().join("report.html");
    let html_name = html.display().to_string();
    let folder = episode(|image| PictureChange::SwapChannels.apply(image));
    let path = folder.path().display().to_string();
    let (output, text, said) = doctor(&[&path, "--json", "--html", &html_name]);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["verdict"]["cause"], "bgr", "{}", report["verdict"]);
    assert!(report["verdict"]["fix"].as_str().unwrap().contains("swap the channels"));
    assert!(report["verdict"]["confidence"].as_f64().unwrap() > 0.9);
    let hypotheses = report["hypotheses"].as_array().unwrap();
    assert!(hypotheses.len() > 20 && hypotheses.iter().all(|h| h["log_likelihood"].is_f64()));
    assert_eq!(report["input"]["numbers"].as_array().unwrap().len(), 7);
    assert!(report["machine"]["copy_bytes_per_s"].as_f64().unwrap() > 0.0);
    assert_eq!(report["file"]["damaged"], json!([]));
    let html = fs::read_to_string(html).unwrap();
    assert!(html.contains("swap the channels") && html.matches("data:image/png").count() == 3);
    assert!(!html.contains("http"), "it needs no other file");

    let (output, text, said) = doctor(&[&path, "--quick"]);
    assert!(output.status.success(), "{said}");
    assert!(text.lines().any(|line| line.starts_with("verdict: bgr")), "{text}");
    assert!(said.contains("no model named"), "{said}");
}

#[test]
fn nothing_wrong_is_not_made_up() {
    let folder = episode(RgbImage::clone);
    let path = folder.path().display().to_string();
    let (_, text, said) = doctor(&[&path, "--json"]);
    let report: Value = serde_json::from_str(&text).expect(&said);
    assert_eq!(report["verdict"]["cause"], "none", "{}", report["verdict"]);
    // What a model did says nothing about what it saw.
    let lines = fs::read_to_string(folder.path().join("actions.jsonl")).unwrap();
    let by_model = |line: &str| json!({ "action": serde_json::from_str::<Value>(line).unwrap(), "by": "model" });
    let lines: Vec<String> = lines.lines().map(|line| by_model(line).to_string() + "\n").collect();
    fs::write(folder.path().join("actions.jsonl"), lines.concat()).unwrap();
    let (_, text, _) = doctor(&[&path, "--quick"]);
    assert!(text.contains("what a model did"), "{text}");
}

#[test]
fn pictures_without_a_demonstration_are_looked_at() {
    let folder = episode(|image| openvla::image::imageops::grayscale(image).clone_into_rgb());
    let path = folder.path().join("frames/000000.png").display().to_string();
    let (output, text, said) = doctor(&[&path, "put_eggplant_into_pot"]);
    assert!(output.status.success(), "{said}");
    for wanted in [
        "input: 2 warnings",
        "it is gray",
        "underscores in place of spaces",
        "entropy",
        "put_eggplant_into_pot?",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("verdict"), "{text}");
    let (output, text, _) = doctor(&[]);
    assert!(
        output.status.success() && text.contains("machine:") && text.contains("file: "),
        "{text}"
    );
}

trait CloneIntoRgb {
    fn clone_into_rgb(&self) -> RgbImage;
}

impl CloneIntoRgb for openvla::image::GrayImage {
    fn clone_into_rgb(&self) -> RgbImage {
        RgbImage::from_fn(self.width(), self.height(), |x, y| {
            openvla::image::Rgb([self[(x, y)].0[0]; 3])
        })
    }
}

#[test]
fn an_examination_goes_on_where_it_was_interrupted() {
    let folder = episode(|image| PictureChange::SwapChannels.apply(image));
    let (path, kept) = (folder.path().display().to_string(), folder.path().join("kept.jsonl"));
    let kept_name = kept.display().to_string();
    let examine = |more: &[&str]| {
        doctor(&[&[path.as_str(), "--quick", "--json", "--resume", &kept_name], more].concat())
    };
    let likelihoods =
        |text: &str| serde_json::from_str::<Value>(text).unwrap()["hypotheses"].clone();
    let (_, text, said) = examine(&[]);
    let wanted = likelihoods(&text);
    let whole = fs::read_to_string(&kept).expect(&said);
    assert_eq!(whole.lines().count(), 1 + 6, "what is examined, and six moments");

    // Two moments are whole, and one was being written. Another likelihood tells what was taken from the file.
    let mut lines: Vec<&str> = whole.split_inclusive('\n').collect();
    let mut marked: Value = serde_json::from_str(lines[1]).unwrap();
    marked["given"]["log_likelihood"] = json!(-1000.0);
    let marked = marked.to_string() + "\n";
    lines[1] = &marked;
    let cut = &lines[3][..lines[3].len() / 2];
    fs::write(&kept, lines[..3].concat() + cut).unwrap();
    let (_, text, said) = examine(&[]);
    assert_ne!(likelihoods(&text), wanted, "{said}");
    let again = fs::read_to_string(&kept).unwrap();
    assert_eq!(again.split_inclusive('\n').skip(2).collect::<String>(), lines[2..].concat());

    // A picture that changed is judged again.
    let second = folder.path().join("frames/000000.png");
    fs::copy(folder.path().join("frames/000001.png"), second).unwrap();
    examine(&[]);
    assert_eq!(fs::read_to_string(&kept).unwrap().lines().count(), 1 + 6 + 1);

    // What is of something else is refused, and stays as it is.
    fs::write(folder.path().join("instruction.txt"), "put carrot on plate").unwrap();
    for foreign in [again.as_str(), "a shopping list", "\u{1F955}\n"] {
        fs::write(&kept, foreign).unwrap();
        let (output, out, said) = examine(&[]);
        assert_eq!(output.status.code(), Some(1), "{out}");
        assert!(said.contains("kept.jsonl is not of this examination"), "{said}");
        assert_eq!(fs::read_to_string(&kept).unwrap(), foreign);
    }
}

#[test]
fn what_is_no_episode_is_refused() {
    let refused = |spoil: &dyn Fn(&Path), wanted: &str| {
        let folder = episode(RgbImage::clone);
        spoil(folder.path());
        let (output, out, said) = doctor(&[&folder.path().display().to_string()]);
        assert_eq!(output.status.code(), Some(1), "{wanted}: {out}");
        assert!(said.contains(wanted) && out.is_empty(), "{wanted}: {said}");
    };
    let actions = |text: &'static str| {
        move |folder: &Path| fs::write(folder.join("actions.jsonl"), text).unwrap()
    };
    refused(
        &|folder| fs::remove_file(folder.join("frames/000003.png")).unwrap(),
        "has 11 pictures, and",
    );
    refused(
        &|folder| fs::remove_file(folder.join("actions.jsonl")).unwrap(),
        "has no actions.jsonl",
    );
    refused(&|folder| fs::write(folder.join("actions.csv"), "1,2\n").unwrap(), "are both there");
    refused(&|folder| fs::remove_dir_all(folder.join("frames")).unwrap(), "has no pictures");
    refused(
        &|folder| fs::write(folder.join("frames/000005.png"), "no picture").unwrap(),
        "cannot decode",
    );
    refused(
        &|folder| fs::remove_file(folder.join("instruction.txt")).unwrap(),
        "what was asked for is unknown",
    );
    refused(&actions("[1, 2, 3, 4, 5, 6, NaN]\n"), "line 1");
    refused(&actions("[1, 2, 3]\n[1, 2]\n"), "row 1 has 2 numbers");
    refused(
        &|folder| {
            fs::remove_dir_all(folder.join("wrist")).unwrap();
            fs::remove_file(folder.join("states.jsonl")).unwrap();
            let line = "{\"frame\": \"frames/nothing.png\", \"action\": [0, 0, 0, 0, 0, 0, 1]}\n";
            fs::write(folder.join("actions.jsonl"), line).unwrap();
        },
        "nothing.png",
    );
    for elsewhere in ["/dev/zero", "../another/000000.png", "frames/../../000000.png"] {
        let line = format!("{{\"frame\": {elsewhere:?}, \"action\": [0, 0, 0, 0, 0, 0, 1]}}\n");
        refused(
            &|folder| fs::write(folder.join("actions.jsonl"), &line).unwrap(),
            "keep pictures in the episode's folder",
        );
    }
    refused(
        &|folder| {
            let frame = folder.join("frames/000000.png");
            fs::remove_file(&frame).unwrap();
            std::os::unix::fs::symlink("/dev/zero", frame).unwrap();
        },
        "000000.png is not a regular file",
    );
    refused(
        &|folder| {
            let lines = "[0, 0, 0, 1]\n".repeat(12);
            fs::write(folder.join("actions.jsonl"), lines).unwrap();
        },
        "actions have 4 numbers; those of `tabletop` have 7",
    );
    refused(
        &|folder| {
            fs::create_dir(folder.join("meta")).unwrap();
            fs::write(folder.join("meta/info.json"), "{}").unwrap();
        },
        "LeRobot data set",
    );
    let (output, _, said) = doctor(&["no-such-folder"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let (output, _, said) = doctor(&["no-such-picture.png", "wave"]);
    assert!(output.status.code() == Some(1) && said.contains("no-such-picture.png"), "{said}");
    let (output, _, said) = doctor(&["--frames", "1"]);
    assert_eq!(output.status.code(), Some(2), "{said}");
}
