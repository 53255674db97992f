//! The simulated table with the policy of a server.

#![cfg(feature = "remote")]

use std::process::{Command, Output};

use common::Server;
use serde_json::Value;

#[path = "../../serve/tests/common/mod.rs"]
mod common;

fn eval(url: &str, args: &[&str]) -> (Output, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tabletop"));
    command.args(["eval", "--suite", "base", "--json", "--url", url]).args(args);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

/// Two robots at once, with one model.
#[test]
fn a_servers_model_does_what_it_is_asked() {
    let server = Server::example(&["--threads", "1"]);
    let (output, said) = eval(&server.url(""), &["-n", "5", "--threads", "2"]);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let successes = report["successes"].as_u64().unwrap();
    assert!(successes >= 3, "it did 20 of 20 when it was measured: {report}");
}

/// The same actions as those of the model in this process, in chunks of which half are made.
#[test]
fn a_served_openvla_oft_gets_both_cameras_and_the_state() {
    let oft = concat!(env!("CARGO_MANIFEST_DIR"), "/../example/tabletop-oft.gguf");
    let server = Server::example(&["--threads", "1", "-m", oft]);
    let args = ["-n", "5", "--execute", "4", "--threads", "1"];
    let (output, said) = eval(&server.url(""), &args);
    assert!(output.status.success(), "{said}");
    let here = Command::new(env!("CARGO_BIN_EXE_tabletop"))
        .args(["eval", "--suite", "base", "--json", "-m", oft])
        .args(args)
        .output()
        .unwrap();
    let [there, here]: [Value; 2] =
        [output, here].map(|output| serde_json::from_slice(&output.stdout).unwrap());
    for key in ["successes", "episodes", "calls", "steps"] {
        assert_eq!(there[key], here[key], "{key}: {there} and {here}");
    }
    let (output, said) = eval(&server.url(""), &["-n", "1", "--execute", "9"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("9 of the 8 actions"), "{said}");
}

#[test]
fn what_does_not_answer_is_named() {
    let (output, said) = eval("http://127.0.0.1:9", &["-n", "1"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no_answer: http://127.0.0.1:9/v1/model"), "{said}");
}
