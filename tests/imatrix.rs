//! ImportanceMatrix matrices: what is collected, and what it is good for.

mod common;

use std::path::{Path, PathBuf};

use common::{of, picture};
use half::bf16;
use image::{DynamicImage, RgbImage};
use openvla::{OpenVla, Options};
use openvla_convert::Conversion;
use openvla_convert::imatrix::collect::{Collector, Sources};
use openvla_convert::mapper::Role;
use openvla_example::{COMMITTED, Spec, Variant, table_image};
use openvla_kernels::{DType, Gguf};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tempfile::TempDir;

/// What is calibrated on, and what errors are measured on: nothing is in both.
const CALIBRATION: [&str; 6] = [
    "put eggplant into pot",
    "open the drawer",
    "move the can near the apple",
    "close the fridge door",
    "stack the green block on the yellow block",
    "wipe the table with the towel",
];
const EVALUATION: [&str; 6] = [
    "pick up the red cup",
    "place the spoon in the sink",
    "turn the lever to the left",
    "fold the cloth",
    "push the blue bowl towards the plate",
    "take the carrot out of the basket",
];

/// Views of the table: from one side for calibration, from the other and in another light for
/// evaluation.
fn scenes(evaluation: bool) -> Vec<RgbImage> {
    let table = DynamicImage::from(table_image());
    let (light, hue) = if evaluation { (-90, 25) } else { (-70, -10) };
    let views = (0..6).map(|i| {
        let step = i as u32;
        let view = table.crop_imm(11 * step, 7 * step, 320 - 23 * step, 240 - 13 * step);
        let view = if evaluation { view.fliph() } else { view };
        let view = if i % 3 == 1 { view.rotate90() } else { view };
        view.brighten(light + 30 * i).huerotate(hue * i).to_rgb8()
    });
    views.collect()
}

fn options() -> Options {
    let mut options = Options::default();
    options.n_threads = 1; // tests run side by side; ggml's threads wait by spinning
    options
}

/// A checkpoint, and room for what is made of it.
struct Subject {
    checkpoint: PathBuf,
    dir: TempDir,
}

impl Subject {
    fn new(checkpoint: impl Into<PathBuf>) -> Self {
        Self { checkpoint: checkpoint.into(), dir: tempfile::tempdir().unwrap() }
    }

    fn example(spec: &Spec) -> Self {
        let mut subject = Self::new("");
        subject.checkpoint = subject.dir.path().join("checkpoint");
        openvla_example::write(&subject.checkpoint, spec).unwrap();
        subject
    }

    fn conversion(&self, encoding: &str, imatrix: Option<&Path>) -> anyhow::Result<Conversion> {
        let importance = imatrix.map(Path::to_owned);
        let options = openvla_convert::Options { importance, ..of(encoding) };
        Conversion::new(&self.checkpoint, &options)
    }

    fn convert(&self, encoding: &str, imatrix: Option<&Path>) -> PathBuf {
        let out = self.dir.path().join(format!("{encoding}-{}.gguf", imatrix.is_some()));
        let conversion = self.conversion(encoding, imatrix).unwrap();
        conversion.write(&out, &indicatif::ProgressBar::hidden()).unwrap();
        out
    }

    /// The statistics of a file of this checkpoint.
    fn calibrate(&self, model: &Path) -> PathBuf {
        let [images, lines, out] = ["images", "instructions.txt", "calibration.gguf"]
            .map(|name| self.dir.path().join(name));
        std::fs::create_dir(&images).unwrap();
        for (i, scene) in scenes(false).iter().enumerate() {
            scene.save(images.join(format!("{i}.png"))).unwrap();
        }
        std::fs::write(&lines, CALIBRATION.join("\n")).unwrap();
        let sources = Sources { images, instructions: lines, ..Sources::default() };
        let calibration = Collector::new(model, &sources, options()).unwrap();
        calibration.write(&out, &indicatif::ProgressBar::hidden()).unwrap();
        out
    }

    /// The same function with activations that are uneven, as those of trained models are: one
    /// channel of 32 is 16 times as large, and what it is multiplied by that much smaller.
    fn uneven(&self) -> Self {
        let subject = Self::new("");
        let to = subject.dir.path().join("checkpoint");
        std::fs::create_dir(&to).unwrap();
        for entry in std::fs::read_dir(&self.checkpoint).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        let file = to.join("model.safetensors");
        std::fs::write(&file, uneven(&std::fs::read(&file).unwrap())).unwrap();
        Self { checkpoint: to, ..subject }
    }
}

/// Scales channels of the Llama up where they arise and down where they are used, by a power of two,
/// so that not a bit of any product changes.
fn uneven(bytes: &[u8]) -> Vec<u8> {
    let gain = |channel: usize| if channel % 32 == 3 { 16.0 } else { 1.0 };
    let file = SafeTensors::deserialize(bytes).unwrap();
    let scaled = file.iter().map(|(name, view)| {
        assert_eq!(view.dtype(), Dtype::BF16);
        let is = |parts: &[&str]| {
            name.starts_with("language_model.") && parts.iter().any(|part| name.contains(part))
        };
        let (norm, arises) = (is(&["layernorm", "model.norm"]), is(&["v_proj", "up_proj"]));
        let used = is(&["q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "mlp."]);
        let row = *view.shape().last().unwrap();
        let numbers = view.data().as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32());
        let numbers = numbers.enumerate().flat_map(|(i, x)| {
            let x = if norm { x * gain(i) } else { x };
            let x = if arises { x * gain(i / row) } else { x };
            let x = if used { x / gain(i % row) } else { x };
            bf16::from_f32(x).to_le_bytes()
        });
        (name, view.shape().to_vec(), numbers.collect::<Vec<u8>>())
    });
    let scaled: Vec<_> = scaled.collect();
    let view = |data, shape: &Vec<usize>| TensorView::new(Dtype::BF16, shape.clone(), data);
    let views = scaled.iter().map(|(name, shape, data)| (name, view(data, shape).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// Tokens that each case's steps are forced to.
type Tokens = Vec<Vec<u32>>;

/// What a file chooses by itself in each case.
fn tokens(model: &Path) -> Tokens {
    let mut policy = OpenVla::open(model, &options()).unwrap();
    let key = policy.config().statistics.datasets().keys().next().unwrap().clone();
    let cases = scenes(true).into_iter().zip(EVALUATION);
    cases.map(|(image, text)| policy.act(&image, text, Some(&key)).unwrap().tokens).collect()
}

/// Logits of the action ids at every step of every case.
fn logits(model: &Path, tokens: &Tokens) -> Vec<Vec<f32>> {
    let mut policy = OpenVla::open(model, &options()).unwrap();
    let ids = policy.config().actions.ids();
    let actions = |logits: &[f32]| logits[ids.start as usize..ids.end as usize].to_vec();
    let mut all = Vec::new();
    for ((image, instruction), tokens) in scenes(true).iter().zip(EVALUATION).zip(tokens) {
        let planes = policy.config().preprocess.planes(image).unwrap();
        let prompt = policy.prompt_ids(instruction).unwrap();
        let network = policy.network();
        let features = network.encode(&planes).unwrap();
        let soft = network.project(&features).unwrap();
        let mut sequence = network.prefill(&prompt, &soft).unwrap();
        all.push(actions(sequence.logits()));
        for token in &tokens[..tokens.len() - 1] {
            all.push(actions(sequence.step(*token).unwrap()));
        }
    }
    all
}

/// The relative error, root mean square over root mean square, averaged over all steps.
fn error(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    let of_step = |(got, want): (&Vec<f32>, &Vec<f32>)| {
        let square = |x: f32| f64::from(x).powi(2);
        let wrong: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
        (wrong / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
    };
    got.iter().zip(want).map(of_step).sum::<f64>() / want.len() as f64
}

/// By how much an importance matrix lowers the error of 4 bits: the mean over three types, from 0
/// to 1. Prints each.
fn gain(what: &str, subject: &Subject) -> f64 {
    let exact = subject.convert("F32", None);
    let tokens = tokens(&exact);
    let want = logits(&exact, &tokens);
    let imatrix = subject.calibrate(&exact);
    let types = ["Q4_K_M", "IQ4_NL", "Q4_0"];
    let gains = types.map(|encoding| {
        let error = |imatrix| error(&logits(&subject.convert(encoding, imatrix), &tokens), &want);
        let (plain, weighed) = (error(None), error(Some(&imatrix)));
        let gain = 1.0 - weighed / plain;
        eprintln!(
            "{what:16} {encoding:6} {plain:.3} without, {weighed:.3} with: {:.1} % less",
            100.0 * gain
        );
        gain
    });
    gains.iter().sum::<f64>() / types.len() as f64
}

#[test]
fn it_lowers_the_error_of_four_bits() {
    let gains = [1, 2, 3, 33].map(|seed| {
        let even = Subject::example(&Spec { seed, ..COMMITTED });
        let uneven = even.uneven();
        let [exact, same] = [&even, &uneven].map(|subject| subject.convert("F32", None));
        let tokens = tokens(&exact);
        assert_eq!(logits(&same, &tokens), logits(&exact, &tokens), "one function, twice");
        gain(&format!("example {seed}"), &uneven)
    });
    let mean = gains.iter().sum::<f64>() / gains.len() as f64;
    eprintln!("{:.1} % less over all", 100.0 * mean);
    assert!(mean > 0.05, "{mean}");
}

/// Sums and counts of every matrix that may be quantized, and of nothing else. The embedding's rows
/// are looked up, so nothing is multiplied by it.
#[test]
fn every_matrix_is_counted() {
    for variant in [Variant::OpenVla, Variant::V01] {
        let subject = Subject::example(&Spec { variant, ..COMMITTED });
        let exact = subject.convert("F32", None);
        let file = Gguf::open(&subject.calibrate(&exact)).unwrap();
        let numbers = |name: &str| {
            let tensor = file.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
            DType::F32.decode(&file.bytes()[tensor.range.clone()])
        };
        let conversion = subject.conversion("F32", None).unwrap();
        let policy = OpenVla::open(&exact, &options()).unwrap();
        let steps = policy.config().statistics.datasets().values().next().unwrap().action.n();
        let rows = CALIBRATION.map(|text| 256 + policy.prompt_ids(text).unwrap().len());
        let n_prompt = CALIBRATION.len();
        // Of the last layer's MLP, only the rows that have logits are computed.
        let last_mlp = format!("blk.{}.ffn_", policy.config().llama.n_layer - 1);
        let matrices = conversion.plan.iter().map(|planned| &planned.tensor);
        let matrices = matrices.filter(|part| ![Role::Plain, Role::Embedding].contains(&part.role));
        let mut n = 0;
        for part in matrices {
            let name = &part.name;
            let want = match part.role {
                Role::Vision if name.starts_with("dinov2") => n_prompt * (256 + 5),
                Role::Vision | Role::Projector => n_prompt * 256,
                Role::Llama if name.starts_with(&last_mlp) => n_prompt * steps,
                Role::Llama => rows.iter().sum::<usize>() + n_prompt * (steps - 1),
                _ => n_prompt * steps,
            };
            assert_eq!(numbers(&format!("{name}.counts")), [want as f32], "{name}");
            let sums = numbers(&format!("{name}.in_sum2"));
            assert_eq!(sums.len(), part.shape[0], "{name}: one sum per column");
            // SigLIP's MLP of 80 is padded to 96 columns, which are always multiplied by zero.
            let padding = if name.starts_with("siglip") && sums.len() == 96 { 16 } else { 0 };
            let (used, padded) = sums.split_at(sums.len() - padding);
            assert!(used.iter().all(|sum| *sum > 0.0) && padded.iter().all(|sum| *sum == 0.0));
            n += 1;
        }
        assert_eq!(file.tensors().len(), 2 * n, "{variant:?}");
        let longest = *rows.iter().max().unwrap() as u32;
        assert_eq!(file.get::<u32>("imatrix.chunk_size").unwrap(), longest);
        assert_eq!(file.get::<u32>("imatrix.chunk_count").unwrap(), n_prompt as u32);
        let datasets: Vec<String> = file.get("imatrix.datasets").unwrap();
        assert_eq!(datasets, ["images", "instructions.txt"], "names, not places");
    }
}

/// The first matrix after vision is multiplied by the features, which can be read and squared here.
#[test]
fn sums_are_of_what_went_in() {
    let subject = Subject::example(&COMMITTED);
    let exact = subject.convert("F32", None);
    let file = Gguf::open(&subject.calibrate(&exact)).unwrap();
    let name = "projector.fc1.weight.in_sum2";
    let sums = file.tensor(name).unwrap();
    let mut policy = OpenVla::open(&exact, &options()).unwrap();
    let mut want = vec![0.0; sums.shape[0]];
    for i in 0..CALIBRATION.len() {
        let image = picture(&subject.dir.path().join(format!("images/{i}.png")));
        let planes = policy.config().preprocess.planes(&image).unwrap();
        let _ = policy.network().encode(&planes).unwrap();
        for row in policy.network().features().chunks(want.len()) {
            want.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
        }
    }
    let want: Vec<f32> = want.iter().map(|sum| *sum as f32).collect();
    assert_eq!(DType::F32.decode(&file.bytes()[sums.range.clone()]), want);
}

/// But for rounding: LayerNorm's bias is joined with the next matrix's only where nobody observes.
#[test]
fn an_observed_policy_computes_the_same() {
    let subject = Subject::example(&COMMITTED);
    let model = subject.convert("F32", None);
    let mut observing = options();
    observing.observe = true;
    let [plain, observed] = [options(), observing].map(|options| {
        let mut policy = OpenVla::open(&model, &options).unwrap();
        let planes = policy.config().preprocess.planes(&table_image()).unwrap();
        let prompt = policy.prompt_ids(CALIBRATION[0]).unwrap();
        let network = policy.network();
        let features = network.encode(&planes).unwrap();
        let soft = network.project(&features).unwrap();
        let mut sequence = network.prefill(&prompt, &soft).unwrap();
        let first = sequence.logits().to_vec();
        let second = sequence.step(prompt[1]).unwrap().to_vec();
        ([network.features(), network.soft_tokens(), first, second], network.squares().len())
    });
    for (plain, observed) in plain.0.iter().zip(&observed.0) {
        let sum = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let wrong = sum(&mut plain.iter().zip(observed).map(|(a, b)| a - b));
        let error = (wrong / sum(&mut plain.iter().copied())).sqrt();
        assert!(error < 1e-4, "off by {error:.1e}");
    }
    assert!(plain.1 == 0 && observed.1 > 0);
}

#[test]
fn another_models_matrix_is_refused() {
    let [here, there] = [Variant::OpenVla, Variant::V01]
        .map(|variant| Subject::example(&Spec { variant, ..COMMITTED }));
    let imatrix = here.calibrate(&here.convert("F32", None));
    let error = there.conversion("Q4_K_M", Some(&imatrix)).err().unwrap();
    let said = format!("{error:#}");
    let words = ["calibration.gguf", "projector.fc1.weight", "96", "64 columns", "another model"];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
}

mod shared {
    use super::*;

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn it_lowers_the_error_of_four_bits_on_the_references_checkpoint() {
        let even = Subject::new(common::shared().join("public/ckpt"));
        let (plain, uneven) = (gain("golden", &even), gain("golden, uneven", &even.uneven()));
        assert!(plain > 0.02, "{plain}");
        assert!(uneven > 0.05, "{uneven}");
    }
}
