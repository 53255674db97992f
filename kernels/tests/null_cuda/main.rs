//! ggml's CUDA backend without a GPU: its whole host side, over a runtime that computes nothing. Holds
//! where nodes run, what is captured and replayed, how many launches and how much memory that takes,
//! and that whatever fails ends in words.
//!
//! `tests/null_cuda build` makes the module that this needs; without, all of it counts as ignored.

mod act;
mod cards;
mod models;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use cards::{Cards, Run};
use libtest_mimic::{Arguments, Completion, Trial};
use models::Models;
use openvla_bench::project::LAUNCHES;
use openvla_example::Size;

/// Launches of vision, projector, prefill and a step of decoding. A kernel that is no longer fused
/// with another is one more; so is what a change of ours adds to a graph.
type Launches = [usize; 4];

/// Of two blocks in each tower and two layers.
const SLIM: [(&str, Launches); 11] = [
    ("F32", [88, 8, 33, 28]),
    ("F16", [92, 11, 35, 24]),
    ("BF16", [92, 11, 35, 24]),
    ("Q8_0", [108, 14, 44, 33]),
    ("Q6_K", [108, 14, 44, 33]),
    ("Q5_K_M", [108, 14, 48, 35]),
    ("Q4_K_M", [108, 14, 48, 35]),
    ("Q4_K_S", [108, 14, 44, 33]),
    ("Q4_0", [108, 14, 44, 33]),
    ("IQ4_NL", [108, 14, 44, 33]),
    ("IQ4_XS", [108, 14, 44, 33]),
];

/// Names, compute capabilities times ten, multiprocessors.
const CARDS: [(&str, usize, usize); 8] = [
    ("t4", 75, 40),
    ("a100", 80, 108),
    ("rtx_3060", 86, 28),
    ("orin", 87, 16),
    ("rtx_4090", 89, 128),
    ("h200", 90, 132),
    ("b200", 100, 148),
    ("rtx_5090", 120, 170),
];

const STAGES: [&str; 4] = [LAUNCHES[0].0, LAUNCHES[1].0, LAUNCHES[2].0, LAUNCHES[3].0];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, rest @ ..] = arguments.as_slice()
        && word == act::WORD
    {
        return act::run(rest);
    }
    let (module, models) = (module(), Arc::new(Models::new()));
    let trial = |name: &str, test: Test, of: &'static str| {
        let given = Given { module: module.clone(), models: models.clone() };
        let run = move || {
            if !given.module.exists() {
                return Ok(Completion::ignored_with("`tests/null_cuda build` was not run"));
            }
            test(&given, of);
            Ok(Completion::Completed)
        };
        Trial::ignorable_test(format!("{name}{of}"), run)
    };
    let whole = SLIM.map(|(encoding, _)| trial("graphs_are_whole_at_", runs_whole, encoding));
    let cards = CARDS.map(|(name, ..)| trial("all_runs_on_", every_card_runs_all, name));
    let others = TESTS.map(|(name, test)| trial(name, test, ""));
    let trials = whole.into_iter().chain(cards).chain(others).collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    drop(models); // whose files go with it
    conclusion.exit_code()
}

/// Holds something of what is given, and of the encoding or card that is named.
type Test = fn(&Given, &str);

const TESTS: [(&str, Test); 13] = [
    ("full_size_runs_in_what_placement_foretold", full_size),
    ("cards_of_every_size", cards_of_every_size),
    ("several_cards_share_the_layers", several_cards),
    ("uneven_cards_share_by_their_memory", uneven_cards),
    ("layers_may_stay_on_the_cpu", layers_on_the_cpu),
    ("one_of_several_cards_is_taken_by_its_number", one_of_several),
    ("out_of_memory_at_any_allocation_ends_in_words", out_of_memory),
    ("a_device_that_goes_away_ends_in_words", gone),
    ("a_device_that_is_not_there_is_named", not_there),
    ("a_driver_that_is_too_old_is_said", old_driver),
    ("a_module_for_other_cards_ends_in_words", foreign),
    ("a_card_with_next_to_no_memory_ends_in_words", no_memory),
    ("products_are_summed_in_f32", sums),
];

/// What tests work with.
struct Given {
    module: PathBuf,
    models: Arc<Models>,
}

impl Given {
    fn run(&self, cards: &Cards, size: Size, encoding: &str) -> Run {
        cards.run(&self.module, &self.models.get(size, encoding))
    }
}

/// Where `tests/null_cuda` leaves it, for the version of ggml that this is linked with.
fn module() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let lock = std::fs::read_to_string(root.join("Cargo.lock")).expect("the workspace's");
    let version = lock.split("name = \"llama-cpp-sys-2\"\nversion = \"").nth(1);
    let version = version.and_then(|rest| rest.split('"').next()).expect("a dependency");
    let program = std::env::current_exe().expect("this program has a path");
    let target = program.ancestors().nth(3).expect("target/PROFILE/deps/PROGRAM");
    target.join(format!("null-cuda/llama-cpp-sys-2-{version}/libggml-cuda.so"))
}

/// Checks that every graph is one split for each of these cards and none for the CPU: its second run
/// is captured, the third replayed, with no copy but of what goes in and comes out.
fn assert_whole(run: &Run, cards: &[usize]) {
    for stage in STAGES {
        let calls = run.calls(stage);
        let n = match stage {
            "vision" | "projector" => 1,
            _ => cards.len(),
        };
        assert_eq!(calls[1].count("captured "), n, "{stage}: {:?}", calls[1].events);
        for (i, call) in calls.iter().enumerate().skip(2) {
            // Positions of a prefill are written before its first run.
            let (up, down) = match stage {
                "vision" => (1, 0),
                "projector" => (0, 0),
                "prefill" => (1, 1),
                _ => (1 + 2 * n, 1),
            };
            let words = [("replay ", n), ("upload ", up), ("download ", down), ("malloc ", 0)];
            for (word, n) in words {
                assert_eq!(call.count(word), n, "{word}in {stage}, run {i}: {:?}", call.events);
            }
            assert!(call.launched.is_empty(), "{stage}, run {i}: {:?}", call.launched);
        }
    }
}

fn launches(run: &Run) -> Launches {
    STAGES.map(|stage| run.launches(stage))
}

fn runs_whole(given: &Given, encoding: &str) {
    let run = given.run(&Cards::default(), Size::Slim, encoding).ended_well();
    assert_whole(&run, &[0]);
    let (_, wanted) = SLIM.iter().find(|(name, _)| *name == encoding).unwrap();
    assert_eq!(launches(&run), *wanted, "{STAGES:?} of {encoding}");
}

fn every_card_runs_all(given: &Given, card: &str) {
    let (_, capability, multiprocessors) = *CARDS.iter().find(|(name, ..)| *name == card).unwrap();
    let cards = Cards { capability, multiprocessors, ..Cards::default() };
    assert_whole(&given.run(&cards, Size::Slim, "Q4_K_M").ended_well(), &[0]);
}

/// What an error foretold that the model needs, in GB.
fn foretold(run: &Run) -> f64 {
    let said = run.said();
    let number = said.split("needs ").nth(1).and_then(|rest| rest.split(' ').next());
    number.unwrap_or_else(|| panic!("{said}")).parse().unwrap()
}

fn full_size(given: &Given, _: &str) {
    let small = given.run(&Cards::of(&[2048]), Size::Full, "Q4_K_M");
    let needed = foretold(&small.ended_in_words(&["CUDA0 has 2.1 GB free and needs"]));
    let run = given.run(&Cards::default(), Size::Full, "Q4_K_M").ended_well();
    assert_whole(&run, &[0]);
    let [vision, projector, prefill, decode] = launches(&run);
    eprintln!("launches: vision {vision} projector {projector} prefill {prefill} decode {decode}");
    assert_eq!(launches(&run), LAUNCHES.map(|(_, n)| n), "{STAGES:?}");
    let peak = run.peaks[&0] as f64 / 1e9;
    assert!(peak <= needed, "{peak} GB, of {needed} that were foretold");
    assert!(needed - peak < 0.7, "{peak} GB, of {needed} that were foretold: too careful");
}

/// Where all does not fit, the layers that the error says do.
fn cards_of_every_size(given: &Given, _: &str) {
    for (mb, fits) in [(4096, false), (6144, true), (8192, true), (12_288, true), (81_920, true)] {
        let run = given.run(&Cards::of(&[mb]), Size::Full, "Q4_K_M");
        if fits {
            run.ended_well();
            continue;
        }
        let run = run.ended_in_words(&["hint: --n-gpu-layers"]);
        let said = run.said();
        let n = said.split("--n-gpu-layers ").nth(1).and_then(|rest| rest.split(' ').next());
        let n_gpu_layers = Some(n.unwrap().parse().unwrap());
        assert!(n_gpu_layers > Some(10), "{said}");
        let run = given.run(&Cards { n_gpu_layers, ..Cards::of(&[mb]) }, Size::Full, "Q4_K_M");
        let run = run.ended_well();
        assert!(run.peaks[&0] <= mb << 20, "{:?}", run.peaks);
    }
}

fn several_cards(given: &Given, _: &str) {
    for memory in [&[4096; 2][..], &[2700; 3]] {
        let run = given.run(&Cards::of(memory), Size::Full, "Q4_K_M").ended_well();
        let cards: Vec<_> = (0..memory.len()).collect();
        assert_whole(&run, &cards);
        assert_eq!(run.peaks.keys().copied().collect::<Vec<_>>(), cards);
    }
}

fn uneven_cards(given: &Given, _: &str) {
    for memory in [[8192, 3072], [3072, 8192]] {
        let run = given.run(&Cards::of(&memory), Size::Full, "Q4_K_M").ended_well();
        assert_whole(&run, &[0, 1]);
        assert_eq!(run.peaks[&0] > run.peaks[&1], memory[0] > memory[1], "{:?}", run.peaks);
    }
}

fn layers_on_the_cpu(given: &Given, _: &str) {
    let one = Cards { n_gpu_layers: Some(1), ..Cards::default() };
    let none = Cards { n_gpu_layers: Some(0), ..Cards::default() };
    let whole = given.run(&Cards::default(), Size::Slim, "Q4_K_M").ended_well();
    let [none, one] = [none, one].map(|cards| given.run(&cards, Size::Slim, "Q4_K_M").ended_well());
    let peak = |run: &Run| run.peaks[&0];
    assert!(peak(&none) < peak(&one) && peak(&one) < peak(&whole));
    assert_eq!(launches(&none)[..2], launches(&whole)[..2], "the towers stay");
    let two = Cards { n_gpu_layers: Some(30), ..Cards::of(&[4096; 2]) };
    let run = given.run(&two, Size::Full, "Q4_K_M").ended_well();
    assert!(run.peaks[&0] > 1 << 30 && run.peaks[&1] > 1 << 30, "{:?}", run.peaks);
}

fn one_of_several(given: &Given, _: &str) {
    let cards = Cards { device: "cuda:1".to_owned(), ..Cards::of(&[24_576; 2]) };
    let run = given.run(&cards, Size::Slim, "Q4_K_M").ended_well();
    assert_whole(&run, &[1]);
    assert_eq!(run.peaks.keys().collect::<Vec<_>>(), [&1]);
}

fn out_of_memory(given: &Given, _: &str) {
    let n = given.run(&Cards::default(), Size::Slim, "Q4_K_M").ended_well().n_malloc;
    assert!(n > 10, "{n} allocations");
    for refuse in (1..=n).map(Some) {
        let cards = Cards { refuse, ..Cards::default() };
        given.run(&cards, Size::Slim, "Q4_K_M").ended_in_words(&["CUDA"]);
    }
}

fn gone(given: &Given, _: &str) {
    let n = given.run(&Cards::default(), Size::Slim, "Q4_K_M").ended_well().n_launch;
    for gone in [1, 2, n / 4, n / 2, n - 1, n].map(Some) {
        let cards = Cards { gone, ..Cards::default() };
        let run = given.run(&cards, Size::Slim, "Q4_K_M");
        run.ended_in_words(&["the device failed: ", "CUDA error"]);
    }
}

fn not_there(given: &Given, _: &str) {
    let run = |device: &str, count| {
        let cards = Cards { device: device.to_owned(), count, ..Cards::default() };
        given.run(&cards, Size::Slim, "Q4_K_M")
    };
    run("cuda:2", 2).ended_in_words(&["cuda:2", "CUDA0 (Null GPU 0), CUDA1 (Null GPU 1)"]);
    run("vulkan", 1).ended_in_words(&["there is no device `vulkan` here", "CUDA0"]);
    run("cuda", 0).ended_in_words(&["there is no device `cuda` here"]);
    run("auto", 0).ended_well();
}

/// Where there is a choice, the CPU is taken, and a line says why.
fn old_driver(given: &Given, _: &str) {
    let run = |device: &str| {
        let fault = Some(("NULLCUDA_DRIVER", 35));
        let cards = Cards { device: device.to_owned(), fault, ..Cards::default() };
        given.run(&cards, Size::Slim, "Q4_K_M")
    };
    let why = "CUDA driver version is insufficient";
    run("cuda").ended_in_words(&["there is no device `cuda` here", why]);
    let run = run("auto").ended_well();
    assert!(run.said().contains("no GPU is used") && run.said().contains(why), "{}", run.said());
}

fn foreign(given: &Given, _: &str) {
    let cards = Cards { fault: Some(("NULLCUDA_FOREIGN", 1)), ..Cards::default() };
    let run = given.run(&cards, Size::Slim, "Q4_K_M");
    run.ended_in_words(&["no kernel image is available", "CMAKE_CUDA_ARCHITECTURES"]);
}

fn no_memory(given: &Given, _: &str) {
    for mb in [0, 64, 512] {
        let run = given.run(&Cards::of(&[mb]), Size::Slim, "Q4_K_M");
        run.ended_in_words(&["CUDA0 has", "GB free and needs"]);
    }
}

/// A file's precision is not lost in silence.
fn sums(given: &Given, _: &str) {
    for encoding in ["F32", "F16", "BF16"] {
        let run = given.run(&Cards::default(), Size::Slim, encoding).ended_well();
        for stage in STAGES {
            let in_f16 = |name: &&String| name.contains("sums in f16");
            let found = run.calls(stage)[1].captured.keys().find(in_f16);
            assert_eq!(found, None, "{stage} of {encoding}");
        }
    }
}
