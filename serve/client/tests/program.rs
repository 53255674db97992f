//! The program as a user meets it, with a server in this process.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{PATIENCE, Server};
use serde_json::Value;

#[path = "../../tests/common/mod.rs"]
mod common;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-client"));
    command.args(args).stdin(Stdio::null());
    for variable in ["all_proxy", "https_proxy", "http_proxy", "no_proxy"] {
        command.env_remove(variable).env_remove(variable.to_uppercase());
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> (Output, String) {
    let output = command(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

fn table() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../example/table.png").display().to_string()
}

#[test]
fn clients_that_die_leave_nothing_behind() {
    let server = Server::example(&["--threads", "1"]);
    for _ in 0..6 {
        let args =
            ["camera", "--url", &server.url(""), "--hz", "100", "-n", "1000", &table(), "wave"];
        let mut client = command(&args).spawn().unwrap();
        let mut said = BufReader::new(client.stdout.take().unwrap());
        said.read_line(&mut String::new()).unwrap(); // it has begun
        client.kill().unwrap(); // SIGKILL, with requests under way
        client.wait().unwrap();
    }
    let is_left =
        || server.metric("openvla_connections") > 1.0 || server.metric("openvla_queue_depth") > 0.0;
    let begun = Instant::now();
    while is_left() {
        assert!(begun.elapsed() < PATIENCE, "connections or work of the dead stay");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(server.step("put eggplant into pot", &[]).status, 200);
}

#[test]
fn a_proxy_is_named_and_not_asked_for_this_machine() {
    let server = Server::example(&["--threads", "1"]);
    // Nothing listens there, and a real proxy would not know this machine's own addresses.
    let ask = |url: &str| {
        let args = ["camera", "--url", url, "-n", "1", &table(), "wave"];
        let mut client = command(&args);
        let output = client.env("http_proxy", "http://me:secret@127.0.0.1:9").output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let port = server.address.port();
    for url in [server.url("/"), format!("http://LOCALHOST:{port}")] {
        let (success, said) = ask(&url);
        assert!(success, "{url}: {said}");
    }
    let (success, said) = ask("http://robot.invalid:8000");
    assert!(!success, "{said}");
    let named = "http://robot.invalid:8000/v1/act through the proxy 127.0.0.1:9 (no_proxy=HOST";
    assert!(said.contains(named) && !said.contains("secret"), "{said}");
}

#[test]
fn the_client_shows_what_became_of_every_picture() {
    let server = Server::example(&["--threads", "1"]);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../example");
    let folder = folder.display().to_string();
    let args =
        ["camera", "--url", &server.url(""), "--hz", "50", "-n", "30", "--json", &folder, "wave"];
    let (output, said) = run(&args);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    let outcomes = last["outcomes"].as_object().unwrap();
    assert_eq!(outcomes.values().map(|n| n.as_u64().unwrap()).sum::<u64>(), 30, "{last}");
    assert!(outcomes["acted"].as_u64().unwrap() > 0, "{last}");
    let acted = lines.iter().filter(|line| line["outcome"] == "acted");
    let seqs: Vec<u64> = acted.map(|line| line["seq"].as_u64().unwrap()).collect();
    assert!(seqs.is_sorted(), "never an older picture's motion after a newer one's: {seqs:?}");

    let args = ["camera", "--url", &server.url(""), "--hz", "10", "-n", "2", &table(), " "];
    let (output, said) = run(&args);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("warning: the instruction is empty").count(), 1, "{said}");

    drop(server);
    for format in [&[][..], &["--json"]] {
        let args = ["camera", "--url", "http://127.0.0.1:9", "-n", "1", &table(), "x"];
        let (output, said) = run(&[&args, format].concat());
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("no motion"), "{said}");
        assert!(!String::from_utf8(output.stdout).unwrap().contains("NaN"));
    }
}

#[test]
fn wrists_and_state_are_sent_with_every_picture() {
    let server = Server::oft(&[]);
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state.json");
    std::fs::write(&state, "[0.5, 1, -2]").unwrap();
    let wrist = dir.path().join("wrist.png");
    std::fs::write(&wrist, common::png(7, 5)).unwrap();
    let [state, wrist] = [state, wrist].map(|path| path.display().to_string());
    let args = [
        "camera",
        "--url",
        &server.url(""),
        "-n",
        "1",
        "--wrist",
        &table(),
        "--wrist",
        &wrist,
        "--state",
        &state,
        &table(),
        "wave",
    ];
    let (output, said) = run(&args);
    assert!(output.status.success(), "{said}");
    let seen = server.seen();
    assert_eq!(seen.wrists.len(), 2);
    assert_eq!((seen.wrists[0].dimensions(), seen.wrists[1].width()), (seen.image.dimensions(), 7));
    assert_eq!(seen.state, Some(vec![0.5, 1.0, -2.0]));
    let (output, said) = run(&["camera", "--state", &wrist, &table(), "wave"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("a JSON list of numbers"), "{said}");
}

#[test]
fn what_was_acted_on_is_recorded() {
    let server = Server::example(&["--threads", "1"]);
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("episode");
    let folder_name = folder.display().to_string();
    let url = server.url("");
    let args = [
        "camera",
        "--url",
        &url,
        "-n",
        "4",
        "--hz",
        "20",
        "--json",
        "--record",
        &folder_name,
        &table(),
        "wave",
    ];
    let (output, said) = run(&args);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let acted: Vec<_> = lines.iter().filter(|line| line["outcome"] == "acted").collect();
    let recorded = std::fs::read_to_string(folder.join("actions.jsonl")).unwrap();
    let recorded: Vec<Value> =
        recorded.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(recorded.len(), acted.len());
    for (i, (line, acted)) in recorded.iter().zip(acted).enumerate() {
        assert_eq!(
            (&line["action"], &line["by"], &line["instruction"]),
            (&acted["detail"], &"model".into(), &"wave".into())
        );
        assert_eq!(line["frame"], format!("frames/{i:06}.png"));
        let frame = std::fs::read(folder.join(line["frame"].as_str().unwrap())).unwrap();
        assert_eq!(frame, std::fs::read(table()).unwrap());
    }
    let times: Vec<f64> = recorded.iter().map(|line| line["time"].as_f64().unwrap()).collect();
    assert!(times.is_sorted() && times[0] > 1.7e9, "{times:?}");
    let (output, said) = run(&args);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is not empty"), "{said}");
}
