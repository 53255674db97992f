//! Robots whose observations wait together and are served in one step.

mod common;

use std::sync::mpsc::channel;

use common::{Answer, Gate, Server, options};
use openvla::Session;
use openvla_serve::models::{FilePolicy, Files, Models};
use openvla_serve::observation::{Motion, Observation};
use openvla_serve::policy::{ModelInfo, Policy, Turn};

/// Keeps the model busy, lets so many more wait, and then gives all answers in the order of the instructions.
fn together(server: &Server, instructions: &[&str]) -> Vec<Answer> {
    let busy = server.step_beside("wait", &[]);
    server.wait_for_metric("openvla_batch_size_count", 1.0);
    let mut waiting = Vec::new();
    for (i, instruction) in instructions.iter().enumerate() {
        let robot = format!("robot {i}");
        waiting.push(server.step_beside(instruction, &[("x-client-id", &robot)]));
        server.wait_for_metric("openvla_queue_depth", (i + 1) as f64);
    }
    server.gate.open(1);
    assert_eq!(busy.join().unwrap().status, 200);
    waiting.into_iter().map(|answer| answer.join().unwrap()).collect()
}

#[test]
fn those_who_wait_are_served_in_their_order_up_to_the_limit() {
    let server = Server::start(&["--batch", "3"]);
    for answer in together(&server, &["a", "b", "c", "d", "e"]) {
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    let seen: Vec<_> = (0..6).map(|_| server.seen().instruction).collect();
    assert_eq!(seen, ["wait", "a", "b", "c", "d", "e"]);
    let batches = ["1.0", "2.0", "3.0"]
        .map(|n| server.metric(&format!("openvla_batch_size_bucket{{le=\"{n}\"}}")));
    assert_eq!(batches, [1.0, 2.0, 3.0], "one, three and two, in steps of at most so many");
    assert_eq!(server.metric("openvla_batch_size_sum"), 6.0);
}

#[test]
fn without_the_option_each_has_a_step() {
    let server = Server::start(&[]);
    together(&server, &["a", "b", "c"]);
    assert_eq!(server.metric("openvla_batch_size_bucket{le=\"1.0\"}"), 4.0);
}

#[test]
fn what_one_asks_wrongly_is_no_others_error() {
    let server = Server::start(&["--batch", "8"]);
    let answers = together(&server, &["a", "nan", "b"]);
    answers[1].assert_error(500, "not_finite");
    assert_eq!([answers[0].status, answers[2].status], [200, 200]);
}

/// Who has no motion by then is told, nobody waits for ever, and the next are served.
#[test]
fn a_failure_is_of_all_who_have_no_motion_yet() {
    for (fails, others) in [("panic", 500), ("break", 200)] {
        let server = Server::start(&["--batch", "4"]);
        let answers = together(&server, &["a", fails, "b"]);
        assert_eq!(answers[0].status, 200, "it was answered before");
        answers[1].assert_error(500, "model_failed");
        assert_eq!(answers[2].status, others, "{fails}: {:?}", answers[2]);
        server.wait_for("/readyz", 200);
        assert_eq!(server.step("after", &[]).status, 200);
        assert_eq!(server.metric("openvla_restarts_total"), 1.0);
    }
}

/// The example, which waits if it is told to.
struct Patient(FilePolicy, Gate);

impl Policy for Patient {
    fn info(&self) -> ModelInfo {
        self.0.info()
    }

    fn act(
        &mut self,
        session: &mut Session,
        observation: &Observation,
        unnorm_key: Option<&str>,
    ) -> openvla::Result<Motion> {
        self.0.act(session, observation, unnorm_key)
    }

    fn max_batch(&self) -> usize {
        8
    }

    fn act_each(
        &mut self,
        turns: &mut [Turn<'_>],
        answer: &mut dyn FnMut(usize, openvla::Result<Motion>),
    ) {
        if turns[0].observation.instruction == "wait" {
            self.1.pass();
        }
        self.0.act_each(turns, answer);
    }
}

#[test]
fn each_robot_gets_the_motion_that_it_gets_alone() {
    let (gate, args) = (Gate::default(), ["--batch", "4", "--threads", "1"]);
    let (files, opened) = (Files(options(&args).model), gate.clone());
    let server = Server::with(&args, gate, channel().1, move || {
        Ok(Patient(files.open(None)?, opened.clone()))
    });
    server.wait_for("/readyz", 200);
    let instructions = ["put eggplant into pot", "put the carrot onto the plate", "wave", "stop"];
    let answers = together(&server, &instructions);
    assert_eq!(server.metric("openvla_batch_size_bucket{le=\"3.0\"}"), 1.0);
    assert_eq!(server.metric("openvla_batch_size_bucket{le=\"4.0\"}"), 2.0);
    for (answer, instruction) in answers.iter().zip(instructions) {
        let alone = server.step(instruction, &[]).json();
        for name in ["action", "tokens", "unconstrained", "unnorm_key"] {
            assert_eq!(answer.json()[name], alone[name], "{instruction}: {name}");
        }
    }
}
