//! Robots that are served together get, bit for bit, what each gets alone.

mod common;

use std::path::Path;

use common::{convert, devices, picture};
use openvla::image::{RgbImage, imageops};
use openvla::{
    Action, Decoding, Devices, Draft, Error, Kernels, OpenVla, Options, Request, Session,
};
use openvla_example::{COMMITTED, Size, Spec, Variant};

/// Motions of six tokens and of fourteen; rows of 256, as blocks of K-quants are.
const SPEC: Spec = Spec { variant: Variant::V01, seed: 1, size: Size::Wide, ..COMMITTED };

/// Prompts of several lengths.
const INSTRUCTIONS: [&str; 4] =
    ["put eggplant into pot", "wave", "close the drawer, then open it", ""];

fn policy(encoding: &str, decoding: Decoding, kernels: Kernels) -> OpenVla {
    let dir = tempfile::tempdir().unwrap();
    openvla_example::write(dir.path(), &SPEC).unwrap();
    let path = dir.path().join("model.gguf");
    convert(dir.path(), encoding, &path);
    let mut options = Options::default();
    (options.decoding, options.kernels, options.devices) = (decoding, kernels, devices());
    (options.draft, options.n_threads) = (Draft::Auto, 1);
    OpenVla::open(&path, &options).unwrap()
}

/// What a robot asks for, and what is remembered of it.
#[derive(Clone)]
struct Robot {
    session: Session,
    image: RgbImage,
    instruction: String,
    key: &'static str,
}

impl Robot {
    fn request(&mut self) -> Request<'_> {
        let Self { session, image, instruction, key } = self;
        Request { session, image, instruction, unnorm_key: Some(key) }
    }

    fn alone(&mut self, policy: &mut OpenVla) -> openvla::Result<Action> {
        policy.act_in(&mut self.session, &self.image, &self.instruction, Some(self.key))
    }
}

/// No two of whom see the same or are asked the same at the same data set.
fn robots(n: usize) -> Vec<Robot> {
    let table = picture(&Path::new(env!("CARGO_MANIFEST_DIR")).join("example/table.png"));
    let robot = |i: usize| Robot {
        session: Session::default(),
        image: imageops::huerotate(&table, 37 * i as i32),
        instruction: INSTRUCTIONS[i % 4].to_owned(),
        key: ["example_six_axes", "example_bimanual"][i / 2 % 2],
    };
    (0..n).map(robot).collect()
}

fn together(policy: &mut OpenVla, robots: &mut [Robot]) -> Vec<openvla::Result<Action>> {
    let mut requests: Vec<_> = robots.iter_mut().map(Robot::request).collect();
    policy.act_all(&mut requests)
}

fn assert_same(together: &Action, alone: &Action, what: &str) {
    assert_eq!(together.tokens, alone.tokens, "{what}");
    assert_eq!(together.unconstrained.tokens, alone.unconstrained.tokens, "{what}");
    let bits = |action: &Action| -> Vec<u32> {
        action.logits.iter().flatten().map(|x| x.to_bits()).collect()
    };
    assert_eq!(bits(together), bits(alone), "{what}");
    assert_eq!(
        (&together.action, &together.unnorm_key),
        (&alone.action, &alone.unnorm_key),
        "{what}"
    );
}

fn states(policy: &OpenVla) -> usize {
    policy.usage().iter().map(|usage| usage.states).sum()
}

/// Whether robots of a policy share passes: our kernels, and a quantized Llama.
fn shares(encoding: &str, kernels: Kernels) -> bool {
    kernels.resolve() != Kernels::Ggml && !["F32", "F16", "BF16"].contains(&encoding)
}

/// For three steps each, in which drafts are missing, right (the picture is the same) and partly wrong (it is not).
fn every_robot_gets_what_it_gets_alone(
    encoding: &str,
    decoding: Decoding,
    kernels: Kernels,
    numbers: &[usize],
) {
    let (mut one, mut all) =
        (policy(encoding, decoding, kernels), policy(encoding, decoding, kernels));
    for n in numbers.iter().copied() {
        let mut robots = robots(n);
        for step in 0..3 {
            if step == 2 {
                robots
                    .iter_mut()
                    .for_each(|robot| imageops::flip_horizontal_in_place(&mut robot.image));
            }
            let mut each = robots.clone();
            let results = together(&mut all, &mut robots);
            assert_eq!(results.len(), n);
            for (i, (got, robot)) in results.iter().zip(&mut each).enumerate() {
                let what =
                    format!("{encoding} {decoding:?} {kernels}: robot {i} of {n}, step {step}");
                let (got, want) = (got.as_ref().unwrap(), robot.alone(&mut one).unwrap());
                assert_same(got, &want, &what);
                assert!(
                    want.draft.passes <= got.draft.passes,
                    "{what}: there is room for fewer drafts"
                );
            }
        }
        if devices() == Devices::Cpu {
            let has_slots = states(&all) > states(&one);
            assert_eq!(
                has_slots,
                n > 1 && shares(encoding, kernels),
                "{encoding} {kernels}: {n} robots"
            );
        }
    }
}

macro_rules! each_type {
    ($($name:ident: $encoding:literal, $decoding:ident;)*) => {$(
        #[test]
        fn $name() {
            every_robot_gets_what_it_gets_alone($encoding, Decoding::$decoding, Kernels::default(), &[3]);
        }
    )*};
}

each_type! {
    f32: "F32", Actions;
    f16: "F16", Reference;
    bf16: "BF16", Actions;
    q8_0: "Q8_0", Reference;
    q6_k: "Q6_K", Actions;
    q5_k_m: "Q5_K_M", Actions;
    q4_k_m: "Q4_K_M", Actions;
    q4_0: "Q4_0", Reference;
    iq4_nl: "IQ4_NL", Actions;
    iq4_xs: "IQ4_XS", Reference;
}

#[test]
fn with_every_set_of_kernels() {
    for kernels in Kernels::available() {
        every_robot_gets_what_it_gets_alone("Q4_K_M", Decoding::Actions, kernels, &[1, 2]);
    }
}

#[test]
fn more_robots_than_a_pass_has_rows() {
    let n = OpenVla::MAX_BATCH + 1;
    every_robot_gets_what_it_gets_alone("Q4_0", Decoding::Actions, Kernels::default(), &[n]);
}

/// Each answer as soon as it is known, of a robot that is refused as well, and none disturbs another.
#[test]
fn who_fails_disturbs_nobody() {
    let mut policy = policy("Q4_K_M", Decoding::Actions, Kernels::default());
    let mut robots = robots(6);
    let alone: Vec<_> = robots.clone().iter_mut().map(|robot| robot.alone(&mut policy)).collect();
    robots[0].key = "nobody's";
    robots[2].instruction = "put it down ".repeat(2000);
    robots[5].image = RgbImage::new(0, 0);
    let mut requests: Vec<_> = robots.iter_mut().map(Robot::request).collect();
    let mut results = Vec::new();
    policy.act_each(&mut requests, |at, result| results.push((at, result)));
    let order: Vec<usize> = results.iter().map(|(at, _)| *at).collect();
    if shares("Q4_K_M", Kernels::default()) {
        assert_eq!(
            order,
            [0, 2, 5, 1, 4, 3],
            "those refused, motions of six tokens, one of fourteen"
        );
    }
    for (at, result) in results {
        match (at, result) {
            (0, Err(Error::UnknownStatistics { .. }))
            | (2, Err(Error::InstructionTooLong { .. }))
            | (5, Err(Error::Image { .. })) => {}
            (1 | 3 | 4, Ok(action)) => {
                assert_same(&action, alone[at].as_ref().unwrap(), &format!("robot {at}"));
            }
            (at, result) => panic!("robot {at}: {result:?}"),
        }
    }
}

/// Prompts that are too long for a slot run alone, beside those that are not.
#[test]
fn a_long_prompt_stays_alone() {
    let (kernels, decoding) = (Kernels::default(), Decoding::Actions);
    let (mut one, mut all) = (policy("Q8_0", decoding, kernels), policy("Q8_0", decoding, kernels));
    let mut robots = robots(3);
    robots[1].instruction = "put it down ".repeat(60);
    assert!(all.prompt_ids(&robots[1].instruction).unwrap().len() > 240, "beside 256 patches");
    let mut each = robots.clone();
    for (got, robot) in together(&mut all, &mut robots).iter().zip(&mut each) {
        assert_same(got.as_ref().unwrap(), &robot.alone(&mut one).unwrap(), &robot.instruction);
    }
}

/// Memory for as many robots as there were at once, and no more.
#[test]
fn slots_take_memory_once() {
    let mut policy = policy("Q4_0", Decoding::Actions, Kernels::default());
    let mut bytes = |n: usize| {
        let mut robots = robots(n);
        together(&mut policy, &mut robots).into_iter().for_each(|result| drop(result.unwrap()));
        // One prompt for all, whose graphs do not count.
        robots[0].alone(&mut policy).unwrap();
        states(&policy)
    };
    let [one, three, two, again, four] = [1, 3, 2, 3, 4].map(&mut bytes);
    if shares("Q4_0", Kernels::default()) {
        assert!(one < three && three < four, "{one}, {three}, {four}");
    }
    assert_eq!(two, again, "passes of two and of three robots are there");
}
