//! The ten facts about OpenVLA that are got wrong most often.
//!
//! Most tests break their fact on purpose: the model as converted gives the reference's numbers,
//! and the broken one is far off. A fact whose break made no difference would not be tested by the
//! other tests either.
//!
//! The subjects are the example checkpoint, whose numbers an independent implementation computed, and
//! its wide sibling, on which the PyTorch reference was run. All of it runs in F32.

mod common;

#[path = "traps/by_hand.rs"]
mod by_hand;
#[path = "common/content.rs"]
mod content;
#[path = "traps/subject.rs"]
mod subject;
#[path = "common/suite.rs"]
mod suite;

use std::io::Cursor;
use std::path::Path;

use by_hand::{gelu, gelu_tanh, layer_norm, linear, off, rows};
use common::{Stage, floats, ids, json};
use content::Content;
use openvla::image::imageops::{FilterType, resize};
use openvla::image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};
use openvla::tokenizer::Tokenizer;
use openvla::{ActionSpace, Decoding, OpenVla, Options, Scale, Statistics, TowerConfig};
use openvla_convert::Conversion;
use openvla_convert::hf_config::HfLlama;
use openvla_convert::mapper::MappedTensor;
use openvla_convert::plan::{Encoding, PlannedTensor};
use openvla_example::{COMMITTED, table_image};
use openvla_kernels::DType;
use safetensors::SafeTensors;
use serde_json::Value;
use subject::{Case, SUBJECTS, Subject, broken};
use suite::sha256_of;

#[test]
fn fact_1_the_epsilon_of_rms_norm_is_1e_6() {
    let eps = |json| serde_json::from_str::<HfLlama>(json).unwrap().rms_norm_eps;
    assert_eq!(eps("{}"), 1e-6, "what the published config.json leaves out");
    assert_eq!(eps(r#"{"rms_norm_eps": 1e-5}"#), 1e-5, "what it says counts");
    assert!(SUBJECTS.iter().all(|subject| subject.case.config.llama.eps == 1e-6));
    broken("Llama-2's own epsilon", Stage::Logits, |case| case.config.llama.eps = 1e-5);
}

#[test]
fn fact_2_features_come_from_the_second_to_last_block_without_norm_and_pooling() {
    for subject in &*SUBJECTS {
        subject.holds(Stage::Features);
        let mut conversion = Conversion::new(&subject.dir, &common::of("F32")).unwrap();
        for tower in &mut conversion.config.towers {
            let (last, next) = (tower.n_layer - 1, tower.n_layer);
            tower.n_layer += 1;
            let name = |i| format!("{}.blk.{i}.", tower.name);
            let source = |i| format!(".blocks.{i}.");
            let block = |planned: &&PlannedTensor| planned.tensor.name.starts_with(&name(last));
            let mut block: Vec<_> = conversion.plan.iter().filter(block).cloned().collect();
            for PlannedTensor { tensor, .. } in &mut block {
                tensor.name = tensor.name.replace(&name(last), &name(next));
                let from = &mut tensor.sources[0];
                *from = from.replace(&source(last), &source(next));
                assert!(subject.unused.contains(from), "{from} is used");
            }
            conversion.plan.extend(block);
        }
        let Case { planes, ids, .. } = subject.case.clone();
        let error = subject.error(Stage::Features, &Case::of(&conversion, planes, ids).run());
        assert!(error > 0.1, "{}: with the last block, off by {error:.1e} only", subject.name);
    }
}

#[test]
fn fact_2_what_is_never_used_may_hold_anything() {
    let subject = &SUBJECTS[0];
    let of = |part: &str| subject.unused.iter().filter(|name| name.contains(part)).count();
    let found = ["featurizer.blocks.1.", "featurizer.norm.", "featurizer.attn_pool."].map(of);
    assert_eq!(found, [14 + 12, 4, 13]);
    assert_eq!(subject.unused.len(), found.iter().sum::<usize>());
    let dir = tempfile::tempdir().unwrap();
    openvla_example::write(dir.path(), &COMMITTED).unwrap();
    let write = |to: &str| {
        common::convert(dir.path(), "F32", &dir.path().join(to));
        Content::of(&dir.path().join(to))
    };
    let intact = write("intact.gguf");
    let shard = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    for name in &subject.unused {
        let (start, end) = metadata.info(name).unwrap().data_offsets;
        bytes[8 + header..][start..end].fill(0xFF); // NaN
    }
    std::fs::write(&shard, bytes).unwrap();
    assert!(write("broken.gguf") == intact);
}

#[test]
fn fact_3_layer_norm_has_1e_6() {
    let towers = |case: &Case| case.config.towers.clone();
    assert!(SUBJECTS.iter().all(|s| towers(&s.case).iter().all(|t| t.eps == 1e-6)));
    broken("LayerNorm's epsilon 1e-5", Stage::Features, |case| {
        case.config.towers.iter_mut().for_each(|tower| tower.eps = 1e-5);
    });
}

#[test]
fn fact_3_the_projector_has_exact_gelu() {
    for Subject { name, case, got: [features, soft, _], .. } in &*SUBJECTS {
        let by_hand = |gelu: fn(f64) -> f64| {
            rows(features, case.config.projector[0]).map(move |patch| {
                let x = linear(case, "projector.fc1", &patch);
                let x = linear(case, "projector.fc2", &x.into_iter().map(gelu).collect::<Vec<_>>());
                linear(case, "projector.fc3", &x.into_iter().map(gelu).collect::<Vec<_>>())
            })
        };
        let [exact, tanh] = [gelu, gelu_tanh].map(|gelu| off(soft, by_hand(gelu)));
        eprintln!("{name}: erf {exact:.1e}, tanh {tanh:.1e}");
        assert!(exact < 1e-6 && tanh > 10.0 * exact, "{name}: erf {exact:.1e}, tanh {tanh:.1e}");
    }
}

/// The last MLP of both towers by hand: what goes in is what comes out without it.
#[test]
fn fact_3_both_towers_have_exact_gelu() {
    for Subject { name, case, got: [features, ..], .. } in &*SUBJECTS {
        let towers = &case.config.towers;
        let mut without = case.clone();
        for tower in towers {
            for part in ["weight", "bias"] {
                let name = format!("{}.blk.{}.ffn_down.{part}", tower.name, tower.n_layer - 1);
                without.data_mut(&name).fill(0.0);
            }
        }
        let [before, ..] = without.run();
        let by_hand = |gelu: fn(f64) -> f64| {
            rows(&before, case.config.projector[0]).map(move |patch| {
                let mut patch = patch.as_slice();
                let mlp = |tower: &TowerConfig| {
                    let x = patch.split_off(..tower.dim).unwrap();
                    let part = |part| format!("{}.blk.{}.{part}", tower.name, tower.n_layer - 1);
                    let y = layer_norm(case, &part("ln2"), x, 1e-6);
                    let y = linear(case, &part("ffn_up"), &y).into_iter().map(gelu);
                    let y = linear(case, &part("ffn_down"), &y.collect::<Vec<_>>());
                    let scale = case.tensors.get(&part("ls2.weight"));
                    let scale = |i: usize| scale.map_or(1.0, |(_, scale)| f64::from(scale[i]));
                    (0..x.len()).map(|i| x[i] + scale(i) * y[i]).collect::<Vec<_>>()
                };
                towers.iter().flat_map(mlp).collect()
            })
        };
        let [exact, tanh] = [gelu, gelu_tanh].map(|gelu| off(features, by_hand(gelu)));
        eprintln!("{name}: erf {exact:.1e}, tanh {tanh:.1e}");
        assert!(exact < 5e-6 && tanh > 10.0 * exact, "{name}: erf {exact:.1e}, tanh {tanh:.1e}");
    }
}

#[test]
fn fact_4_the_space_token_ends_the_prompt_and_patches_follow_bos() {
    for Subject { name, instruction, case: Case { config, ids, .. }, .. } in &*SUBJECTS {
        let tokenizer = Tokenizer::new(&config.vocabulary).unwrap();
        assert_eq!(config.prompt.ids(&tokenizer, instruction).unwrap(), *ids, "{name}");
        let (first, last) = (ids[0], *ids.last().unwrap());
        assert_eq!((first, last), (config.vocabulary.bos, config.prompt.suffix), "{name}");
        assert_eq!(config.vocabulary.tokens[last as usize], "▁");
        assert_ne!(ids[ids.len() - 2], last, "{name}: it was appended, not there already");
    }
    broken("no token 29871", Stage::Logits, |case| assert!(case.ids.pop().is_some()));
    broken("BOS after the patches", Stage::Logits, |case| case.ids.swap(0, 1));
}

#[test]
fn fact_5_positions_belong_to_the_patches_alone() {
    let prefix = "dinov2.prefix_embd.weight";
    for subject in &*SUBJECTS {
        let config = &subject.case.config;
        assert_eq!((config.n_patch(), config.towers[0].n_prefix), (256, 5));
        let tokens = ["cls_token", "reg_token"].map(|t| format!("vision_backbone.featurizer.{t}"));
        assert_eq!(
            (subject.part(prefix).shape[1], &subject.part(prefix).sources[..]),
            (5, &tokens[..])
        );
        assert_eq!(subject.part("dinov2.position_embd.weight").shape[1], 256);
    }
    broken("positions for class and registers", Stage::Features, |case| {
        let position = case.data("dinov2.position_embd.weight").to_vec();
        case.data_mut(prefix).iter_mut().zip(position).for_each(|(x, position)| *x += position);
    });
    broken("positions counted from the class token", Stage::Features, |case| {
        let by = 5 * case.config.towers[0].dim;
        case.data_mut("dinov2.position_embd.weight").rotate_right(by);
    });
    broken("no class and registers", Stage::Features, |case| {
        case.config.towers[0].n_prefix = 0;
        case.tensors.remove(prefix);
    });
}

#[test]
fn fact_6_layer_scale_is_dinov2s_scale_factor() {
    for subject in &*SUBJECTS {
        let Case { config, tensors, .. } = &subject.case;
        let scaled = config.towers.iter().map(|t| (t.name.as_str(), t.layer_scale));
        assert_eq!(scaled.collect::<Vec<_>>(), [("dinov2", true), ("siglip", false)]);
        assert!(!tensors.keys().any(|name| name.starts_with("siglip") && name.contains(".ls")));
        for ls in ["ls1", "ls2"] {
            let part = subject.part(&format!("dinov2.blk.0.{ls}.weight"));
            let source = format!("vision_backbone.featurizer.blocks.0.{ls}.scale_factor");
            assert_eq!(part.sources, [source]);
        }
    }
    broken("no LayerScale", Stage::Features, |case| {
        case.config.towers[0].layer_scale = false;
        case.tensors.retain(|name, _| !name.contains(".ls"));
    });
    broken("the scales of attention and MLP swapped", Stage::Features, |case| {
        let [first, second] = ["ls1", "ls2"].map(|ls| format!("dinov2.blk.0.{ls}.weight"));
        let scale = case.tensors.remove(&first).unwrap();
        let other = case.tensors.insert(second, scale).unwrap();
        case.tensors.insert(first, other);
    });
}

#[test]
fn fact_7_siglip_has_16_heads_whatever_their_size() {
    assert!(SUBJECTS.iter().all(|subject| subject.case.config.towers[1].n_head == 16));
    broken("heads of SigLIP twice as large", Stage::Features, |case| {
        case.config.towers[1].n_head = 8;
    });
}

/// SigLIP's 4304, here 80: blocks of 32 need zeros, which change nothing.
#[test]
fn fact_7_siglips_mlp_is_padded_to_whole_blocks_exactly() {
    for subject in &*SUBJECTS {
        let (tower, mut unpadded) = (&subject.case.config.towers[1], subject.case.clone());
        let n_ff: usize = 80;
        assert!(!n_ff.is_multiple_of(32));
        assert_eq!(tower.n_ff, n_ff.next_multiple_of(32));
        for i in 0..tower.n_layer {
            let name = |part: &str| format!("siglip.blk.{i}.{part}");
            let (q8_0, down) = ("Q8_0".parse::<Encoding>().unwrap(), name("ffn_down.weight"));
            let narrow =
                MappedTensor { shape: [n_ff, tower.dim, 1, 1], ..subject.part(&down).clone() };
            assert_eq!(q8_0.dtype(subject.part(&down), 2), DType::Q8_0);
            assert_eq!(q8_0.dtype(&narrow, 2), DType::F16, "no blocks without padding");
            for (part, inner, dim) in
                [("ffn_up.weight", tower.dim, 1), ("ffn_up.bias", 1, 0), ("ffn_down.weight", 1, 0)]
            {
                let (shape, data) = unpadded.tensors.get_mut(&name(part)).unwrap();
                // Numbers that belong to one hidden channel are adjacent, or one in each row.
                let row = inner * tower.n_ff;
                let padding = data.chunks(row).flat_map(|row| &row[inner * n_ff..]);
                assert!(padding.clone().count() > 0 && padding.into_iter().all(|x| *x == 0.0));
                *data = data.chunks(row).flat_map(|row| &row[..inner * n_ff]).copied().collect();
                shape[dim] = n_ff;
            }
        }
        unpadded.config.towers[1].n_ff = n_ff;
        let [narrow, ..] = unpadded.run();
        let off = off(&subject.got[0], rows(&narrow, subject.case.config.projector[0]));
        eprintln!("{}: padding changes features by {off:.1e}", subject.name);
        assert!(off < 2e-6, "{}: padding changes features by {off:.1e}", subject.name);
    }
}

#[test]
fn fact_8_any_id_may_win_and_is_clipped_into_a_bin() {
    let subject = &SUBJECTS[0];
    let best = |logits: &[f32]| (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    let (first, action) = (best(&subject.got[2]).unwrap(), subject.case.config.actions);
    assert!(action.ids().contains(&(first as u32)));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    // An id below the actions, and a padding row above them, each made to win.
    for (id, value) in [(300, 0.996_078_431_372_549), (action.end + 40, -0.996_078_431_372_549)] {
        let (mut case, dim) = (subject.case.clone(), subject.case.config.llama.dim);
        let head = case.data_mut("output.weight");
        let row: Vec<f32> = head[first * dim..][..dim].iter().map(|x| 2.0 * x).collect();
        head[id as usize * dim..][..dim].copy_from_slice(&row);
        case.write(&path);
        for decoding in [Decoding::Reference, Decoding::Actions] {
            let mut options = Options::default();
            options.decoding = decoding;
            let mut policy = OpenVla::open(&path, &options).unwrap();
            let got = policy.act(&table_image(), "put eggplant into pot", None).unwrap();
            assert_eq!(got.unconstrained.tokens[0], id);
            assert!(!got.unconstrained.all_actions);
            let (token, value) = match decoding {
                Decoding::Reference => (id, value),
                Decoding::Actions => (first as u32, action.center(action.bin(first as u32))),
            };
            assert_eq!(got.tokens[0], token);
            assert!((got.normalized[0] - value).abs() < 1e-15, "{id}: {}", got.normalized[0]);
        }
    }
}

/// The reference stops at EOS and takes the last seven ids there are, which are then mostly the
/// prompt's; here EOS is one of the ids that are not actions.
#[test]
fn fact_8_eos_ends_the_references_motion_and_no_other() {
    let subject = &SUBJECTS[0];
    let (mut case, dim) = (subject.case.clone(), subject.case.config.llama.dim);
    let eos = case.config.vocabulary.eos;
    let row: Vec<f32> = case.data_mut("output.weight")[619 * dim..][..dim].to_vec();
    let louder: Vec<f32> = row.iter().map(|x| 2.0 * x).collect(); // 619 is the first token
    case.data_mut("output.weight")[eos as usize * dim..][..dim].copy_from_slice(&louder);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    case.write(&path);
    let act = |decoding| {
        let mut options = Options::default();
        options.decoding = decoding;
        let mut policy = OpenVla::open(&path, &options).unwrap();
        policy.act(&table_image(), "put eggplant into pot", None).unwrap()
    };
    let reference = act(Decoding::Reference);
    let (prompt, last) = (&case.ids, case.ids.len() - 6);
    assert_eq!(reference.tokens, [&prompt[last..], &[eos]].concat());
    assert_eq!(reference.unconstrained.tokens, [eos]);
    assert!(reference.normalized.iter().all(|x| (x - 0.996_078_431_372_549).abs() < 1e-15));
    let actions = act(Decoding::Actions);
    assert_eq!((actions.tokens[0], actions.tokens.len()), (619, 7));
    assert_eq!(actions.unconstrained.tokens[0], eos);
}

/// The reference's bins and motions.
#[test]
fn fact_8_bins_are_the_references() {
    bins_are_those_of(&json(&common::committed().join("actions.json")));
}

fn bins_are_those_of(table: &Value) {
    let end = table["vocab_size_for_actions"].as_u64().unwrap() as u32;
    let actions = ActionSpace { end, n_bin: 256 };
    let centers: Vec<f64> = (0..255).map(|bin| actions.center(bin)).collect();
    assert_eq!(centers, floats(&table["bin_centers"]));
    let statistics = Statistics::parse(table["norm_stats"].to_string()).unwrap();
    let rows = table["unnormalize"].as_array().unwrap();
    assert!(rows.len() >= 18);
    for row in rows {
        let (_, dataset) = statistics.select(row["unnorm_key"].as_str()).unwrap();
        let motion: Vec<f64> =
            ids(&row["tokens"]).iter().map(|id| actions.center(actions.bin(*id))).collect();
        assert_eq!(dataset.action.unnormalize(&motion), floats(&row["action"]), "{row}");
    }
}

#[test]
fn fact_9_the_gripper_stays_in_bin_centers() {
    for Subject { case: Case { config, .. }, .. } in &*SUBJECTS {
        let (actions, key) = (config.actions, config.statistics.datasets().keys().next().unwrap());
        let dataset = &config.statistics.datasets()[key];
        assert_eq!(dataset.action.mask, [true, true, true, true, true, true, false], "{key}");
        let all_scaled = Scale { mask: vec![true; 7], ..dataset.action.clone() };
        let mut seen = std::collections::BTreeSet::new();
        for id in 0..config.llama.n_vocab as u32 {
            let center = actions.center(actions.bin(id));
            let gripper = dataset.action.unnormalize(&[center; 7])[6];
            assert_eq!(gripper, center, "id {id}");
            assert!(gripper.abs() <= 1.0 - 1.0 / 255.0, "id {id}: {gripper}");
            let scaled = all_scaled.unnormalize(&[center; 7])[6];
            assert!((scaled - gripper).abs() > 1e-3, "id {id}: {scaled}");
            seen.insert(gripper.to_bits());
        }
        assert_eq!(seen.len(), 255);
        let [open, closed] =
            [actions.ids().start, actions.end - 1].map(|id| actions.center(actions.bin(id)));
        assert_eq!((open, closed), (0.996_078_431_372_549, -0.996_078_431_372_549));
    }
}

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    image.into().write_to(&mut file, ImageFormat::Png).unwrap();
    file.into_inner()
}

#[test]
fn fact_10_alpha_is_dropped_not_blended() {
    let image = table_image();
    for alpha in [0, 128] {
        // Blending would leave nothing of the picture, or half of it.
        let see_through = RgbaImage::from_fn(image.width(), image.height(), |x, y| {
            let [r, g, b] = image[(x, y)].0;
            Rgba([r, g, b, alpha])
        });
        assert!(openvla::decode(&png(see_through)).unwrap() == image, "alpha {alpha}");
    }
}

#[test]
fn fact_10_resizing_is_antialiased() {
    // Every third column is white, and the first of them in the middle of the first output pixel.
    let image = RgbImage::from_fn(672, 672, |x, _| Rgb([255 * u8::from(x % 3 == 1); 3]));
    let square = SUBJECTS[0].case.config.preprocess.square(&image).unwrap();
    // The same cubic over four pixels, not over twelve, sees white alone.
    assert!(square.iter().all(|level| (60..140).contains(level)), "{:?}", square[(0, 0)]);
}

#[test]
fn fact_10_resizing_is_pillows_to_the_bit() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let expected = &json(&here.join("example/expected.json"))["openvla"]["pixels_sha256"];
    let preprocess = &SUBJECTS[0].case.config.preprocess;
    assert_eq!(sha256_of(&SUBJECTS[0].case.planes), expected.as_str().unwrap());
    // The image crate's cubic has the same formula and antialiasing, but rounds elsewhere.
    let (image, square) = (table_image(), preprocess.square(&table_image()).unwrap());
    let other = resize(&image, 224, 224, FilterType::CatmullRom);
    let off = square.as_raw().iter().zip(other.as_raw()).filter(|(a, b)| a != b).count();
    assert!(off > square.len() / 1000, "{off} of {} samples differ", square.len());
}

mod shared {
    use super::*;

    #[test]
    #[ignore = "needs ../shared/golden"]
    fn fact_8_bins_are_the_references() {
        let table = json(&common::shared().join("public/action_decode.json"));
        bins_are_those_of(&table);
        let actions = ActionSpace { end: 32_000, n_bin: 256 };
        for row in table["tokens"].as_array().unwrap() {
            let bin = actions.bin(row["token"].as_u64().unwrap() as u32);
            assert_eq!(u64::from(bin), row["bin"].as_u64().unwrap(), "{row}");
        }
    }
}
