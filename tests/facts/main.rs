//! The published models at full size, without their weights: the converter has a place for every
//! tensor of the reference's modules, whose names and shapes are in `tests/reference/modules.json`.
//! What only the published files say is in `shared.rs`.

#[path = "../common/mod.rs"]
mod common;
mod shared;

use std::collections::{BTreeMap, BTreeSet};

use common::{committed, json};
use openvla::{LlamaConfig, TowerConfig};
use openvla_convert::hf_config::HfConfig;
use openvla_convert::mapper::{Role, Shapes};
use openvla_convert::mapping::{Mapping, mapping};
use openvla_convert::plan::{Encoding, PlannedTensor, plan, summary};
use openvla_example::{COMMITTED, Size, Spec, Variant};
use openvla_kernels::DType;
use serde_json::json;

const DINOV2: &str = "vision_backbone.featurizer";
const SIGLIP: &str = "vision_backbone.fused_featurizer";
/// SigLIP's blocks that run, their channels, and the columns of zeros that each MLP gets.
const PADDED: [u64; 3] = [26, 1152, 16];

/// The reference's tensors and what becomes of them: `openvla` is openvla-7b, `v01` openvla-v01-7b.
fn model(name: &str) -> (Shapes, Mapping) {
    let modules = json(&committed().join("modules.json"));
    let shapes: Shapes = serde_json::from_value(modules[name].clone()).unwrap();
    let variant = if name == "v01" { Variant::V01 } else { Variant::OpenVla };
    let folder = tempfile::tempdir().unwrap();
    let spec = Spec { variant, size: Size::Full, ..COMMITTED };
    openvla_example::write_settings(folder.path(), &spec).unwrap();
    let config: HfConfig =
        serde_json::from_value(json(&folder.path().join("config.json"))).unwrap();
    let mapping = mapping(&config, &shapes, false).unwrap();
    (shapes, mapping)
}

/// The checkpoint's tensors that are in the file. Of the head some rows are there twice.
fn sources(mapping: &Mapping) -> impl Iterator<Item = &String> {
    let once = mapping.tensors.iter().filter(|part| part.role != Role::ActionHead);
    once.flat_map(|part| &part.sources)
}

/// Parameters of the model's parts that are in the file, and that are not.
fn components(mapping: &Mapping, shapes: &Shapes) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    let used = sources(mapping).map(|name| (name, "used"));
    for (name, how) in used.chain(mapping.unused.iter().map(|name| (name, "unused"))) {
        let parts: Vec<&str> = name.split('.').collect();
        let component = match parts[..] {
            ["vision_backbone", tower, ..] => format!("vision.{tower}.{how}"),
            ["projector", ..] => "projector".into(),
            ["language_model", "model", "embed_tokens", ..] => "llama.embed_tokens".into(),
            ["language_model", "lm_head", ..] => "llama.lm_head".into(),
            _ => "llama.layers+norm".into(),
        };
        *count.entry(component).or_default() += shapes[name].iter().product::<usize>();
    }
    count
}

#[test]
fn every_tensor_is_accounted_for() {
    for (name, n) in [("openvla", 982), ("v01", 637)] {
        let (shapes, mapping) = model(name);
        let accounted: Vec<&String> = sources(&mapping).chain(&mapping.unused).collect();
        assert_eq!(accounted.len(), n, "{name}: each once");
        assert_eq!(accounted.into_iter().collect::<BTreeSet<_>>(), shapes.keys().collect());
    }
}

#[test]
fn used_and_unused_parameters_are_the_references() {
    let (shapes, mapping) = model("openvla");
    assert_eq!(
        shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(),
        7_541_237_184
    );
    let want = json!({
        "vision.featurizer.used": 290_630_656,
        "vision.featurizer.unused": 12_600_320,
        "vision.fused_featurizer.used": 397_200_544,
        "vision.fused_featurizer.unused": 30_480_160,
        "projector": 71_385_600,
        "llama.embed_tokens": 131_334_144,
        "llama.layers+norm": 6_476_271_616_u64,
        "llama.lm_head": 131_334_144,
    });
    assert_eq!(json!(components(&mapping, &shapes)), want);
    let unused = [
        (format!("{DINOV2}.blocks.23."), 14),
        (format!("{DINOV2}.norm."), 2),
        (format!("{SIGLIP}.blocks.26."), 12),
        (format!("{SIGLIP}.norm."), 2),
        (format!("{SIGLIP}.attn_pool."), 13),
    ];
    for (part, n) in &unused {
        assert_eq!(
            mapping.unused.iter().filter(|name| name.starts_with(part)).count(),
            *n,
            "{part}"
        );
    }
    assert_eq!(mapping.unused.len(), unused.iter().map(|(_, n)| n).sum::<usize>());
}

#[test]
fn sizes_are_the_references() {
    let (_, mapping) = model("openvla");
    let tower = |name: &str, dim, n_layer, n_ff, n_prefix| TowerConfig {
        name: name.into(),
        dim,
        n_layer,
        n_head: 16,
        n_ff,
        eps: 1e-6,
        n_prefix,
        layer_scale: n_prefix > 0,
    };
    let dinov2 = tower("dinov2", 1024, 23, 4096, 5);
    let siglip = tower("siglip", 1152, 26, 4304 + 16, 0);
    assert_eq!(mapping.towers, [dinov2, siglip.clone()]);
    assert_eq!(mapping.projector, [2176, 8704, 4096, 4096]);
    assert_eq!((mapping.patch_size, mapping.n_patch), (14, 256));
    // All but `n_vocab` are LlamaConfig's defaults, which the file leaves out.
    let llama = LlamaConfig {
        dim: 4096,
        n_layer: 32,
        n_head: 32,
        n_head_kv: 32,
        n_ff: 11_008,
        n_vocab: 32_064,
        n_ctx: 2048,
        eps: 1e-6,
        rope_base: 10_000.0,
    };
    assert_eq!(mapping.llama, llama);
    assert_eq!((llama.head_dim(), siglip.dim / siglip.n_head), (128, 72));
}

#[test]
fn v01_has_one_tower_and_a_projector_of_two_layers() {
    let (shapes, mapping) = model("v01");
    let towers: Vec<_> = mapping.towers.iter().map(|t| (t.name.as_str(), t.n_layer)).collect();
    assert_eq!(towers, [("siglip", 26)]);
    assert_eq!(mapping.projector, [1152, 4096, 4096]);
    let components = components(&mapping, &shapes);
    let vision = |how: &str| components[&format!("vision.featurizer.{how}")];
    assert_eq!((vision("used"), vision("unused")), (397_200_544, 30_480_160));
    assert_eq!(components["projector"], 21_504_000);
}

/// The estimates are of files with patch embeddings and SigLIP's `fc2` in f16, and everything
/// but the towers in one type. Ours hold the patches in f32, `fc2` padded and in blocks, projector
/// and head in better types, and the action head twice. The rest is equal to the byte.
#[test]
fn file_sizes_are_the_estimated_ones() {
    let [blocks, dim, zeros] = PADDED;
    let models = [
        ("openvla", 1024 + 1152, [8_093_495_168, 4_688_473_984]),
        ("v01", 1152, [7_729_284_992, 4_349_200_256]),
    ];
    for (name, channels, estimates) in models {
        let (_, mapping) = model(name);
        let (q8_0, q4_0) = (|n: u64| n / 32 * 34, |n: u64| n / 32 * 18);
        let patches = 3 * 14 * 14 * channels * (4 - 2);
        let fc1 = blocks * (q8_0(zeros * dim) + 4 * zeros);
        let [fc2, f16] = [q8_0((4304 + zeros) * dim), 2 * 4304 * dim].map(|bytes| blocks * bytes);
        let head = 32_064 * 4096;
        let projector: u64 = mapping.projector.windows(2).map(|w| (w[0] * w[1]) as u64).sum();
        let raised = head / 256 * 210 - q4_0(head) + q8_0(projector) - q4_0(projector);
        for ((encoding, better), estimate) in
            [("Q8_0", 0), ("Q4_0", raised)].into_iter().zip(estimates)
        {
            let plan = plan(&mapping, encoding.parse().unwrap(), &[]).unwrap();
            let bytes: usize = plan.iter().map(PlannedTensor::bytes).sum();
            let action_head = 256 * 4096 * 2;
            let wanted = estimate + patches + fc1 + fc2 - f16 + better + action_head;
            assert_eq!(bytes as u64, wanted, "{name} {encoding}");
        }
    }
}

/// What the README's table says: no row of the published model has to fall back but those of
/// the projector's first layer, which are 8 bits anyway.
#[test]
fn every_type_is_possible_for_the_published_model() {
    let (_, mapping) = model("openvla");
    for encoding in Encoding::ALL {
        let plan = plan(&mapping, encoding, &[]).unwrap();
        eprint!("{}\n{}", encoding.name, summary(&plan));
        let bits = 8.0 * plan.iter().map(PlannedTensor::bytes).sum::<usize>() as f64;
        let elements: usize = plan.iter().map(|p| p.tensor.shape.iter().product::<usize>()).sum();
        let matrices = plan.iter().filter(|p| p.tensor.role != Role::Plain);
        let full = matrices.filter(|p| p.dtype == DType::F16 || p.dtype == DType::F32).count();
        assert_eq!(full > 0, ["F16", "F32"].contains(&encoding.name), "{}", encoding.name);
        eprintln!("{:.2} bits per weight", bits / elements as f64);
    }
}
