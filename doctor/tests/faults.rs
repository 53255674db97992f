//! Faults that are injected into episodes of the tabletop, whose scenes the example never saw, and what is said of them.
//! `examples/confusion` does this with many.

use indicatif::ProgressBar;
use openvla::{Options, Policy};
use openvla_doctor::episode::Episode;
use openvla_doctor::examine::{Plan, examine};
use openvla_doctor::hypothesis::Cause;
use openvla_doctor::verdict::{Verdict, decide};
use openvla_tabletop::SceneRng;

#[path = "../examples/confusion/fault.rs"]
mod fault;
#[path = "../examples/confusion/recording.rs"]
mod recording;

use fault::{FAULTS, bridge, inject};
use recording::record;

fn diagnose(policy: &mut Policy, fault: Cause, seed: u64) -> (String, Verdict) {
    let scale = policy.config().statistics.select(None).unwrap().1.action.clone();
    let longer = record(seed, 15, policy.config().preprocess.size);
    let mut rng = SceneRng::new(seed);
    let (kind, recording) = inject(fault, &longer, 12, &scale, &mut rng).unwrap();
    let folder = tempfile::tempdir().unwrap();
    recording.write(folder.path()).unwrap();
    let plan = Plan { statistics: vec![bridge()], ..Plan::default() };
    let episode = Episode::open(folder.path()).unwrap();
    let evidence = examine(policy, &episode, &plan, &ProgressBar::hidden()).unwrap();
    (kind, decide(&evidence).2)
}

/// The middle nine tenths of a picture of 84 pixels move nothing by more than two of them: that cannot be told from
/// nothing. To this model, a full stop does what swapping y and z does: neither is named then.
fn cannot_be_told(fault: Cause, kind: &str) -> bool {
    fault == Cause::Cropped || ["full stop", "[0, 2, 1, 3, 4, 5, 6]"].contains(&kind)
}

fn check(model: &str, faults: &[Cause], seed: u64) {
    let path = format!("{}/../example/{model}", env!("CARGO_MANIFEST_DIR"));
    let mut options = Options::default();
    options.n_threads = 1;
    let mut policy = Policy::open(path, &options).unwrap();
    for fault in faults {
        let (kind, verdict) = diagnose(&mut policy, *fault, seed);
        let said = verdict.cause;
        if cannot_be_told(*fault, &kind) {
            let is_silent = [*fault, Cause::None, Cause::Unknown].contains(&said);
            assert!(is_silent, "{model} {fault:?}, {kind}: {verdict:?}");
        } else {
            assert_eq!(said, *fault, "{model} {kind}: {verdict:?}");
            assert_eq!(verdict.fix.is_some(), *fault != Cause::None, "{verdict:?}");
        }
    }
}

#[test]
fn an_openvla_tells_each_fault() {
    check("tabletop.gguf", &FAULTS, 3_000_000);
}

#[test]
fn an_openvla_oft_tells_some_faults() {
    let faults = [Cause::None, Cause::Bgr, Cause::GripperInverted, Cause::Lag];
    check("tabletop-oft.gguf", &faults, 3_000_000);
}
