//! The JSON files that describe the model and its image preprocessing.

use std::path::Path;

use anyhow::Result;
use openvla_vocabulary::write_json;
use serde_json::{Value, json};

use super::size::{Size, Sizes};
use super::spec::Variant;
use super::statistics;

/// A tower's timm name, and its images' mean and deviation: exact, and as the `tvf_…` keys have
/// them.
struct Tower {
    timm_id: &'static str,
    mean: [f64; 3],
    std: [f64; 3],
    tvf_mean: [f64; 3],
    tvf_std: [f64; 3],
}

/// The published file's `tvf_…` values went through bf16; the reference computes with those.
const DINOV2: Tower = Tower {
    timm_id: "vit_large_patch14_reg4_dinov2.lvd142m",
    mean: [0.485, 0.456, 0.406],
    std: [0.229, 0.224, 0.225],
    tvf_mean: [0.484375, 0.455078125, 0.40625],
    tvf_std: [0.228515625, 0.2236328125, 0.224609375],
};

const SIGLIP: Tower = Tower {
    timm_id: "vit_so400m_patch14_siglip_224",
    mean: [0.5; 3],
    std: [0.5; 3],
    tvf_mean: [0.5; 3],
    tvf_std: [0.5; 3],
};

/// The names that differ between the variants.
struct Names {
    towers: &'static [Tower],
    arch_specifier: &'static str,
    hf_llm_id: &'static str,
    llm_backbone_id: &'static str,
    vision_backbone_id: &'static str,
    resize: &'static str,
}

fn names(variant: Variant) -> Names {
    match variant {
        Variant::OpenVla | Variant::Oft { .. } => Names {
            towers: &[DINOV2, SIGLIP],
            arch_specifier: "no-align+fused-gelu-mlp",
            hf_llm_id: "meta-llama/Llama-2-7b-hf",
            llm_backbone_id: "llama2-7b-pure",
            vision_backbone_id: "dinosiglip-vit-so-224px",
            resize: "resize-naive",
        },
        Variant::V01 => Names {
            towers: &[SIGLIP],
            arch_specifier: "no-align+gelu-mlp",
            hf_llm_id: "lmsys/vicuna-7b-v1.5",
            llm_backbone_id: "vicuna-v15-7b",
            vision_backbone_id: "siglip-vit-so400m",
            resize: "letterbox",
        },
    }
}

/// Writes `config.json`, `generation_config.json` and `preprocessor_config.json`.
pub fn write(dir: &Path, variant: Variant, sizes: &Sizes) -> Result<()> {
    write_json(dir, "config.json", &config(variant, sizes)?)?;
    write_json(dir, "generation_config.json", &generation(sizes))?;
    write_json(dir, "preprocessor_config.json", &preprocessor(&names(variant)))
}

/// `config.json`.
pub fn config(variant: Variant, sizes: &Sizes) -> Result<Value> {
    let names = names(variant);
    let towers = names.towers;
    Ok(json!({
        "arch_specifier": names.arch_specifier,
        "architectures": ["OpenVLAForActionPrediction"],
        "hf_llm_id": names.hf_llm_id,
        "image_resize_strategy": names.resize,
        "image_sizes": vec![224; towers.len()],
        "llm_backbone_id": names.llm_backbone_id,
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": 256,
        "norm_stats": serde_json::to_value(statistics::of_base())?,
        "output_projector_states": false,
        "pad_to_multiple_of": Sizes::PADDING_ROWS,
        "pad_token_id": sizes.n_piece,
        "text_config": text_config(sizes),
        "timm_model_ids": each(towers, |tower| json!(tower.timm_id)),
        "timm_override_act_layers": each(towers, |_| Value::Null),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": towers.len() == 2,
        "vision_backbone_id": names.vision_backbone_id,
    }))
}

/// Like the published file, it omits Llama's defaults, among them `rms_norm_eps`: 1e-6. At full size,
/// all numbers but the vocabulary's are defaults.
fn text_config(sizes: &Sizes) -> Value {
    let (llama, default) = (sizes.llama, Size::Full.sizes().llama);
    let unless = |default: usize, number: usize| (number != default).then_some(number);
    let n_head = unless(default.n_head, llama.n_head);
    let mut config = json!({
        "hidden_size": unless(default.dim, llama.dim),
        "intermediate_size": unless(default.hidden, llama.hidden),
        "model_type": "llama",
        "num_attention_heads": n_head,
        "num_hidden_layers": unless(default.n_layer, llama.n_layer),
        "num_key_value_heads": n_head,
        "pad_token_id": sizes.n_piece,
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.n_row(),
    });
    config.as_object_mut().expect("just made").retain(|_, value| !value.is_null());
    config
}

fn generation(sizes: &Sizes) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": sizes.n_piece,
        "transformers_version": "4.40.1",
    })
}

fn preprocessor(names: &Names) -> Value {
    let towers = names.towers;
    let letterbox = names.resize == "letterbox";
    // A letterboxed image is scaled by its shorter side: one number; else it is squeezed: two.
    let size = if letterbox { json!(224) } else { json!([224, 224]) };
    json!({
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": names.resize,
        "input_sizes": each(towers, |_| json!([3, 224, 224])),
        "interpolations": each(towers, |_| json!("bicubic")),
        "means": each(towers, |tower| json!(tower.mean)),
        "processor_class": "PrismaticProcessor",
        "stds": each(towers, |tower| json!(tower.std)),
        "tvf_crop_params": each(towers, |_| json!({ "output_size": [224, 224] })),
        "tvf_do_letterbox": letterbox,
        "tvf_letterbox_fill": letterbox.then_some([127, 127, 127]),
        "tvf_normalize_params": each(towers, |tower| json!({
            "inplace": false,
            "mean": tower.tvf_mean,
            "std": tower.tvf_std,
        })),
        "tvf_resize_params": each(towers, |_| json!({
            "antialias": true,
            "interpolation": 3,
            "max_size": null,
            "size": size,
        })),
        "use_fused_vision_backbone": towers.len() == 2,
    })
}

fn each(towers: &[Tower], value: impl Fn(&Tower) -> Value) -> Value {
    towers.iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::DINOV2;

    #[test]
    fn tvf_values_are_the_published_ones() {
        let pairs = [(DINOV2.mean, DINOV2.tvf_mean), (DINOV2.std, DINOV2.tvf_std)];
        for (exact, rounded) in pairs.into_iter().flat_map(|(a, b)| a.into_iter().zip(b)) {
            assert_eq!(bf16::from_f64(exact).to_f64(), rounded);
        }
    }
}
