//! `openvla-convert` as a user meets it: what it prints, where, and how it ends.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};

use common::{assert_fails, checkpoint, example, openvla_convert, stderr, stdout};
use openvla_example::{COMMITTED, Size, Spec};
use openvla_kernels::Gguf;

#[test]
fn converting_names_the_file_and_keeps_stdout_clean() {
    let dir = tempfile::tempdir().unwrap();
    let output = openvla_convert(&["--q4", "-t", "1", &checkpoint()], dir.path());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    assert!(stderr(&output).contains("43 tensors left out as unused"), "{}", stderr(&output));
    assert!(!stderr(&output).contains('\r'), "no progress bar where nobody watches");
    let name = "OpenVLA-424K-example-v1.0-Q4_K_M.gguf";
    let files: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(files, [name], "the file by its name, and nothing beside it");
}

#[test]
fn a_dry_run_says_what_the_file_would_hold_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = openvla_convert(&["--q4", "--dry-run", &checkpoint()], dir.path());
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stdout(&output);
    let all = said.lines().find(|line| line.starts_with("all ")).unwrap();
    let total: u64 = all.split_whitespace().nth(3).unwrap().parse().unwrap();
    let cache = 2 * 2 * 64 * 2 * (256 + 64); // f16 keys and values of 64 channels and 2 layers
    assert!(said.contains(&format!("{total} bytes of weights, {cache} of KV cache")));
    assert!(said.contains("llama           IQ4_NL    12 tensors"), "{said}");
    assert!(said.contains("vision_backbone.featurizer.blocks.1.norm1.weight"), "{said}");
    let built_in = std::fs::metadata(example("example.gguf")).unwrap().len();
    assert!(total < built_in && total > built_in * 9 / 10, "{total} of {built_in}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// The types by component and type of a dry run with these arguments.
fn planned(args: &[&str]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let output = openvla_convert(&[&["--dry-run", &checkpoint()], args].concat(), dir.path());
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stdout(&output);
    let lines = said.lines().filter_map(|line| line.split_once(" tensors "));
    lines.map(|(line, _)| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn types_of_single_tensors_can_be_chosen() {
    let (flag, second) = ("--tensor-type", "^blk\\.1\\.ffn=Q8_0");
    let (plain, chosen) =
        (planned(&["--outtype", "F16"]), planned(&["--outtype", "F16", flag, second]));
    assert!(plain.contains(&"llama F16 14".into()), "{plain:?}");
    assert!(chosen.contains(&"llama F16 11".into()) && chosen.contains(&"llama Q8_0 3".into()));
    let last = planned(&["--outtype", "F16", flag, second, flag, "ffn_down=BF16"]);
    assert!(
        last.contains(&"llama BF16 2".into()) && last.contains(&"llama Q8_0 2".into()),
        "{last:?}"
    );
    let norms = |plan: &[String]| plan.iter().any(|line| line == "llama F32 5");
    assert!(norms(&planned(&[flag, "blk=Q8_0"])), "norms have no choice");

    let dir = tempfile::tempdir().unwrap();
    let refused = |choice: &str| openvla_convert(&[&checkpoint(), flag, choice], dir.path());
    assert_fails(
        &refused("blk\\.7\\.=Q8_0"),
        &["blk\\.7\\.=Q8_0", "matches no tensor whose type can be chosen"],
    );
    assert_fails(&refused("norm=F16"), &["matches no tensor whose type can be chosen"]);
    assert_fails(
        &refused("blk=Q4_K"),
        &["dinov2.blk.0.attn_qkv.weight", "rows of 32", "blocks of 256"],
    );
    for (wrong, word) in
        [("blk", "PATTERN=TYPE"), ("blk=Q3", "Q6_K"), ("(=Q8_0", "not a regular expression")]
    {
        let output = refused(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn mistakes_with_converting_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = &checkpoint();
    let run = |args: &[&str]| openvla_convert(args, dir.path());
    assert_fails(&run(&["nowhere"]), &["nowhere", "folder"]);
    let output = run(&[checkpoint, "--outtype", "Q3"]);
    assert_eq!(output.status.code(), Some(2), "a wrong flag is a matter of usage");
    assert!(stderr(&output).contains("Q4_K_M"), "lists the types: {}", stderr(&output));
    assert_eq!(run(&[checkpoint, "--q4", "--q8"]).status.code(), Some(2));
    assert_fails(&run(&[checkpoint, "-o", "missing/out.gguf"]), &["missing", "No such file"]);
    assert_fails(&run(&[checkpoint, "-o", "."]), &["folder", "-o"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_file_is_verified_as_a_process() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| openvla_convert(args, dir.path());
    assert!(run(&["--q8", "-t", "1", &checkpoint(), "-o", "proven.gguf"]).status.success());
    let verified = run(&["verify", "-t", "1", "proven.gguf"]);
    assert!(verified.status.success(), "{}", stderr(&verified));
    let said = stdout(&verified);
    assert!(said.contains("61 of 61 tensors are as written"), "{said}");
    assert!(said.contains("\"put eggplant into pot\" on \"table\"\n  tokens: "), "{said}");
    let json = run(&["verify", "--json", "-t", "1", "proven.gguf"]);
    let json: serde_json::Value = serde_json::from_str(&stdout(&json)).unwrap();
    assert_eq!((&json["sound"], &json["n_checksum"]), (&true.into(), &61.into()));
    assert_eq!(json["cases"][1]["tokens"].as_array().unwrap().len(), 7);

    let path = dir.path().join("proven.gguf");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let damaged = run(&["verify", "-t", "1", "proven.gguf"]);
    assert_eq!(damaged.status.code(), Some(1));
    assert!(stderr(&damaged).contains("proven.gguf is damaged"), "{}", stderr(&damaged));
    assert!(stdout(&damaged).contains("damaged: action_head.weight"), "{}", stdout(&damaged));
    assert_fails(&run(&["verify", "nowhere.gguf"]), &["nowhere.gguf", "No such file"]);
    assert_fails(&run(&["verify", &format!("{}/config.json", checkpoint())]), &["GGUF"]);
}

/// A file has its name from the checkpoint's folder, and two folders may have the same.
#[test]
fn a_file_of_another_checkpoint_is_not_replaced_unless_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (folder, seed) in [("one/抓取", 1), ("two/抓取", 2), ("two/放置", 3)] {
        openvla_example::write(&at(folder), &Spec { seed, ..COMMITTED }).unwrap();
    }
    let run = |args: &[&str]| {
        openvla_convert(&[args, &["--q8", "--no-proof", "-t", "1"]].concat(), dir.path())
    };
    let name = "OpenVLA-424K-抓取-v1.0-Q8_0.gguf";
    let converts = |args: &[&str]| {
        let output = run(args);
        assert!(output.status.success(), "{}", stderr(&output));
        std::fs::read(at(name)).unwrap()
    };
    let one = converts(&["one/抓取"]);
    assert!(converts(&["one/抓取"]) == one, "the same again");
    assert!(converts(&["two/放置"]) == one, "a name of its own");
    assert!(at("OpenVLA-424K-放置-v1.0-Q8_0.gguf").exists());
    assert_fails(&run(&["two/抓取"]), &[name, "was not written from this checkpoint", "-o"]);
    assert!(std::fs::read(at(name)).unwrap() == one);
    assert!(converts(&["two/抓取", "-o", name]) != one);
    for other in [b"notes".as_slice(), b""] {
        std::fs::write(at(name), other).unwrap();
        assert_fails(&run(&["one/抓取"]), &[name, "-o"]);
        assert_eq!(std::fs::read(at(name)).unwrap(), other);
    }
}

/// What is said of a checkpoint is not the advice for model files, to convert it again.
#[test]
fn a_checkpoint_that_is_refused_is_not_sent_back_to_where_it_came_from() {
    let dir = tempfile::tempdir().unwrap();
    openvla_example::write(&dir.path().join("a"), &COMMITTED).unwrap();
    let path = dir.path().join("a/dataset_statistics.json");
    std::fs::write(path, r#"{"d": {"action": {"q01": [NaN], "q99": [1]}}}"#).unwrap();
    let output = openvla_convert(&["a"], dir.path());
    assert_fails(&output, &["a/dataset_statistics.json", "`d` has NaN for action.q01[0]"]);
    let said = stderr(&output);
    assert!(!said.contains("the model file") && !said.contains("write the file again"), "{said}");
}

#[test]
fn a_log_that_cannot_be_written_does_not_keep_the_file_from_being_written() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let (_, no_reader) = std::io::pipe().unwrap();
    for log in [Stdio::from(full), Stdio::from(no_reader)] {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new(env!("CARGO_BIN_EXE_openvla-convert"))
            .args(["--no-proof", "-t", "1", &checkpoint(), "-o", "model.gguf"])
            .current_dir(dir.path())
            .stderr(log)
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(0));
        assert!(dir.path().join("model.gguf").exists());
    }
}

/// The shell's limit is in blocks of 512 or 1024 bytes; the file is larger than 100 of either.
#[test]
fn a_limit_on_the_size_of_files_is_an_error_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 100; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_openvla-convert")])
        .args(["--no-proof", "-t", "1", &checkpoint(), "-o", "model.gguf"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_fails(&output, &["cannot write model.gguf", "File too large"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn stdout_is_no_place_for_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = &checkpoint();
    for args in [
        &[checkpoint, "-o", "-"][..],
        &["random", "-o", "-"],
        &["export-llama", "model.gguf", "-o", "-"],
        &["imatrix", "model.gguf", "--images", ".", "--instructions", "x", "-o", "-"],
    ] {
        let output = openvla_convert(args, dir.path());
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains("a file is needed, not stdout"), "{args:?}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no file named -");
}

/// In the middle of its work it takes back what it wrote.
#[test]
fn an_interrupt_leaves_nothing_behind() {
    let (wide, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let spec = Spec { size: Size::Wide, ..COMMITTED };
    openvla_example::write(wide.path(), &spec).unwrap(); // large enough not to be done at once
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    for signal in ["-INT", "-TERM"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_openvla-convert"))
            .args(["--q4".as_ref(), "-t".as_ref(), "1".as_ref(), wide.path()])
            .current_dir(dir.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while files() == 0 {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let kill = Command::new("kill").args([signal, &child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
        assert_eq!(files(), 0);
    }
}

/// The example checkpoint in a folder of its own name, with its tensors renamed.
fn renamed(dir: &Path, rename: impl Fn(&str) -> String) -> String {
    let folder = dir.join("openvla-example");
    std::fs::create_dir_all(&folder).unwrap();
    for file in std::fs::read_dir(checkpoint()).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(header).unwrap();
    let header: serde_json::Map<_, _> =
        header.into_iter().map(|(name, value)| (rename(&name), value)).collect();
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length, header.as_slice(), data].concat()).unwrap();
    folder.display().to_string()
}

#[test]
fn tensors_by_transformers_5s_names_are_taken_and_those_of_wrapped_models_explained() {
    let dir = tempfile::tempdir().unwrap();
    let of_5 = renamed(dir.path(), |name| match name.split_once("language_model.") {
        _ if name.starts_with("__") => name.to_owned(),
        Some((_, head)) if head.starts_with("lm_head") => head.to_owned(),
        Some((_, inner)) => format!("model.language_model.{}", inner.trim_start_matches("model.")),
        None => format!("model.{name}"),
    });
    let convert = |checkpoint: &str, out: &str| {
        openvla_convert(&["--q8", "--no-proof", checkpoint, "-o", out], dir.path())
    };
    for (checkpoint, out) in [(&of_5, "5.gguf"), (&checkpoint(), "4.gguf")] {
        let output = convert(checkpoint, out);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let [of_5, of_4] = ["5.gguf", "4.gguf"].map(|name| Gguf::open(&dir.path().join(name)).unwrap());
    let stated = |file: &Gguf| {
        let mut metadata = file.metadata().clone();
        metadata.remove("openvla.source.sha256").expect("the files differ");
        metadata
    };
    assert_eq!(stated(&of_5), stated(&of_4), "the same model by either names");
    for (prefix, advice) in [("_orig_mod.", "save model._orig_mod"), ("module.", "model.module")] {
        let wrapped = renamed(dir.path(), |name| {
            if name.starts_with("__") { name.to_owned() } else { format!("{prefix}{name}") }
        });
        let held = format!("it holds it as {prefix}vision_backbone.");
        assert_fails(&convert(&wrapped, "wrapped.gguf"), &[&held, advice]);
        assert!(!dir.path().join("wrapped.gguf").exists());
    }
}
