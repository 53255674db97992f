//! ggml's threads do not spin long at barriers, unless the user wants them to.

#![cfg(all(target_os = "linux", target_env = "gnu"))]

use std::process::Command;

use openvla_kernels::Backend;

const CHILD: &str = "OPENVLA_TEST_OPENMP";

/// What libgomp, which says so when it starts, took from the environment.
fn spins(set: Option<(&str, &str)>) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env_remove("OMP_WAIT_POLICY").env_remove("GOMP_SPINCOUNT");
    command.envs(set).env("OMP_DISPLAY_ENV", "verbose").env(CHILD, "1");
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let line = said.lines().find(|line| line.contains("GOMP_SPINCOUNT"));
    let value = line.and_then(|line| line.split('\'').nth(1));
    value.unwrap_or_else(|| panic!("libgomp does not tell how long it spins: {said}")).to_owned()
}

/// Another thread may be starting a process from it. In one test, whose process has no other threads.
#[test]
fn threads_spin_for_a_moment_and_the_environment_stays_as_it_is() {
    let environment = || std::env::vars_os().collect::<Vec<_>>();
    let before = environment();
    let _ggml = Backend::cpu(2).unwrap(); // a dynamic build loads libgomp with it
    assert_eq!(environment(), before);
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    assert_eq!(spins(None), "1000");
    assert_eq!(spins(Some(("GOMP_SPINCOUNT", "77"))), "77");
    assert_eq!(spins(Some(("OMP_WAIT_POLICY", "passive"))), "0");
}
