//! Random programs of the safe interface. A panic is an answer; the end of the process is not.
//!
//! They run in a child, for ggml aborts the process where it is asked for what it cannot do, and memory
//! that is read or written where it must not be ends in a signal, if it is seen at all.

#[path = "../common/mod.rs"]
mod common;
mod program;
mod random;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use openvla_kernels::{Builder, DType, Graph, Kernels};
use program::{Machine, OPS, Program};
use random::Random;

/// `FIRST END`: the programs that a child runs.
const CHILD: &str = "OPENVLA_TEST_PROGRAMS";

#[test]
fn no_safe_program_ends_the_process() {
    if let Ok(range) = std::env::var(CHILD) {
        let numbers: Vec<u64> = range.split(' ').map(|n| n.parse().unwrap()).collect();
        return run(numbers[0]..numbers[1]);
    }
    let n = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(1000);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "no_safe_program_ends_the_process", "--nocapture"]);
    let output = command.env(CHILD, format!("0 {n}")).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let (programs, others): (Vec<_>, Vec<_>) =
        said.lines().partition(|line| line.starts_with("program "));
    let errors = others.join("\n");
    assert!(output.status.success(), "{} in {:?}: {errors}", output.status, programs.last());
    for op in OPS {
        let computed = others.iter().any(|line| line.strip_prefix("computed ") == Some(op));
        assert!(computed, "no program of {n} got as far as to compute {op}");
    }
}

/// A chain as long as a graph may be is walked on the stack of a thread as they are by default.
#[test]
fn the_longest_chain_is_computed() {
    let x = common::state(&[1], &[1.0]);
    let y = common::zeros(DType::F32, &[1]);
    let build = |g: &Builder| {
        let one = g.state(&x);
        g.store((2..Graph::MAX_NODES).fold(one, |sum, _| sum + one), &y);
    };
    Graph::build(common::backend(), Graph::MAX_NODES, build).unwrap().compute().unwrap();
    assert_eq!(y.read::<f32>(), [(Graph::MAX_NODES - 1) as f32]);
}

fn run(programs: std::ops::Range<u64>) {
    std::panic::set_hook(Box::new(|_| {}));
    let machines = [(Kernels::Fastest, 2), (Kernels::Ggml, 2), (Kernels::Fastest, 1)];
    let machines = machines.map(|(kernels, n_thread)| Machine::new(kernels, n_thread));
    let mut computed = BTreeSet::new();
    for seed in programs {
        eprintln!("program {seed}");
        let mut random = Random(seed);
        let machine = &machines[random.below(machines.len())];
        let program = || Program::new(machine, &mut random).run();
        computed.extend(catch_unwind(AssertUnwindSafe(program)).unwrap_or_default());
    }
    computed.iter().for_each(|op| eprintln!("computed {op}"));
}
