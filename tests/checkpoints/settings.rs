//! JSON files and tokenizers: what is missing, broken, or of a model that is not run.

use std::fs;

use openvla_example::Variant;
use serde_json::{Value, json};

use crate::folder::{Checkpoint, INDEX, convert};

const CONFIG: &str = "config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";
const STATISTICS: &str = "dataset_statistics.json";

/// Sets one place of a file of the plain checkpoint, which must then be refused.
fn all_refused(name: &str, cases: &[(&str, Value, &str)]) {
    for (pointer, value, wanted) in cases {
        let checkpoint = Checkpoint::plain();
        checkpoint.set(name, pointer, value.clone());
        checkpoint.refused(&[wanted]);
    }
}

#[test]
fn other_models_are_refused() {
    let quick = json!(["quick_gelu", null]);
    all_refused(
        CONFIG,
        &[
            (
                "/model_type",
                json!("llava"),
                "config.json is of a `llava` model; `openvla` is needed",
            ),
            ("/model_type", json!(7), "config.json cannot be used: model_type: invalid type"),
            (
                "/llm_backbone_id",
                json!("phi-2-3b"),
                "no prompt is known for the backbone `phi-2-3b`",
            ),
            ("/timm_model_ids/0", json!("vit_base"), "the vision tower \"vit_base\" is unknown"),
            ("/timm_model_ids", json!([]), "timm_model_ids names 0 towers; 1 or 2"),
            ("/timm_model_ids", json!(["a", "b", "c"]), "timm_model_ids names 3 towers"),
            ("/timm_override_act_layers", quick, "a tower's activation is `quick_gelu`"),
            ("/text_config/model_type", json!("mistral"), "its language model is `mistral`"),
            (
                "/text_config/hidden_act",
                json!("gelu"),
                "its activation is `gelu`; `silu` is needed",
            ),
            ("/text_config/rope_scaling", json!({"type": "linear"}), "it scales rotary positions"),
            (
                "/text_config/rope_parameters",
                json!({"rope_type": "yarn"}),
                "rope_parameters.rope_type",
            ),
            ("/text_config/rope_parameters", json!({"factor": 2}), "rope_parameters.factor is 2"),
            ("/text_config/rope_scaling", json!({"partial_rotary_factor": 0.5}), "is 0.5"),
            (
                "/text_config/rope_parameters",
                json!({"full_attention": {"rope_theta": 1e4}}),
                "rope_parameters.full_attention",
            ),
            ("/text_config/partial_rotary_factor", json!(0.5), "partial_rotary_factor is 0.5"),
            ("/text_config/head_dim", json!(16), "text_config.head_dim is 16; 64 channels of 2"),
            ("/text_config/sliding_window", json!(128), "sliding_window is 128"),
            (
                "/text_config/layer_types",
                json!(["full_attention", "sliding_attention"]),
                "`sliding_attention`",
            ),
            ("/text_config/attention_bias", json!(true), "its attention has biases"),
            ("/text_config/mlp_bias", json!(true), "its MLP has biases"),
            ("/text_config/tie_word_embeddings", json!(true), "its head is its embedding"),
            ("/use_fused_vision_backbone", json!(false), "use_fused_vision_backbone is false"),
            ("/quantization_config", json!({"quant_method": "awq"}), "quantized already, by awq"),
            (
                "/text_config/quantization_config",
                json!({"load_in_4bit": true}),
                "by an unnamed method",
            ),
            ("/load_in_8bit", json!(true), "bitsandbytes"),
        ],
    );
}

/// What transformers 4.40 to 5 write where nothing differs from Llama-2.
#[test]
fn settings_at_their_defaults_say_nothing() {
    let plain = Checkpoint::plain().convert().unwrap();
    let checkpoint = Checkpoint::plain();
    checkpoint.json(CONFIG, |config| {
        let text = config["text_config"].as_object_mut().unwrap();
        let dtype = text.remove("torch_dtype").unwrap();
        let more = json!({
            "dtype": dtype, "attention_bias": false, "attention_dropout": 0.0, "head_dim": 32,
            "hidden_act": "silu", "initializer_range": 0.02, "layer_types": null,
            "max_position_embeddings": 2048, "mlp_bias": false, "partial_rotary_factor": 1.0,
            "pretraining_tp": 1, "quantization_config": null, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "factor": null},
            "rope_scaling": null, "rope_theta": 10000, "sliding_window": null,
            "tie_word_embeddings": false, "use_cache": true,
        });
        text.extend(more.as_object().unwrap().clone());
        config["quantization_config"] = json!({});
        config["tie_word_embeddings"] = json!(true); // The Llama's own counts.
        config["timm_override_act_layers"] = json!([null, "gelu"]);
    });
    assert!(checkpoint.convert().unwrap() == plain);
}

/// Transformers 5 writes one file for the whole processor.
#[test]
fn preprocessing_may_be_part_of_the_processors_file() {
    let checkpoint = Checkpoint::plain();
    let plain = checkpoint.convert().unwrap();
    let settings: Value = serde_json::from_slice(&checkpoint.read(PREPROCESSOR)).unwrap();
    let processor = |settings: &Value| json!({"image_processor": settings}).to_string();
    checkpoint.remove(PREPROCESSOR);
    checkpoint.write("processor_config.json", processor(&settings).as_bytes());
    assert!(checkpoint.convert().unwrap() == plain);
    checkpoint.write("processor_config.json", br#"{"processor_class": "PrismaticProcessor"}"#);
    checkpoint.refused(&["cannot read", PREPROCESSOR]);
    checkpoint.write("processor_config.json", processor(&json!({})).as_bytes());
    checkpoint.refused(&["processor_config.json", "image_processor"]);
    checkpoint.write(PREPROCESSOR, settings.to_string().as_bytes());
    assert!(checkpoint.convert().unwrap() == plain, "the file of its own counts");
}

/// Transformers 5 keeps the base in `rope_parameters`, 4.40 beside it.
#[test]
fn the_base_of_rotary_positions_is_the_same_wherever_it_stands() {
    let with = |key: &str, value: Value| {
        let checkpoint = Checkpoint::plain();
        checkpoint.set(CONFIG, &format!("/text_config/{key}"), value);
        checkpoint
    };
    let wanted = with("rope_theta", json!(500_000)).convert().unwrap();
    assert!(wanted != Checkpoint::plain().convert().unwrap());
    for key in ["rope_parameters", "rope_scaling"] {
        for name in ["rope_type", "type"] {
            let checkpoint = with(key, json!({"rope_theta": 5e5, name: "default"}));
            assert!(checkpoint.convert().unwrap() == wanted, "{key}");
            checkpoint.set(CONFIG, "/text_config/rope_theta", json!(10_000));
            checkpoint.refused(&["two bases of rotary positions", "500000", "10000"]);
        }
    }
}

/// Python writes and reads numbers that JSON does not have.
#[test]
fn numbers_that_are_none_matter_where_they_are_used() {
    const NONE: [&str; 3] = ["NaN", "Infinity", "-Infinity"];
    let replaced = |name: &str, pointer: &str, number: &str| {
        let checkpoint = Checkpoint::plain();
        checkpoint.set(name, pointer, json!("HERE"));
        let text = String::from_utf8(checkpoint.read(name)).unwrap();
        checkpoint.write(name, text.replace("\"HERE\"", number).as_bytes());
        checkpoint
    };
    let plain = Checkpoint::plain().convert().unwrap();
    for number in NONE {
        for name in [CONFIG, PREPROCESSOR, "tokenizer_config.json", "special_tokens_map.json"] {
            let unused = replaced(name, "/unused", number).convert();
            assert!(unused.unwrap() == plain, "{number} in {name}");
        }
        for pointer in ["/unused", "/example_tabletop/proprio", "/example_tabletop/action/mean"] {
            replaced(STATISTICS, pointer, number).convert().expect(pointer);
        }
        let base = replaced(CONFIG, "/norm_stats/base_dataset/proprio", number);
        assert!(base.convert().unwrap() == plain, "the file beside it counts");
        base.remove(STATISTICS);
        base.convert().expect("what it has of `proprio` is not used");
        replaced(CONFIG, "/text_config/rms_norm_eps", number).refused(&[
            CONFIG,
            "text_config.rms_norm_eps",
            number,
        ]);
        replaced(STATISTICS, "/example_tabletop/action/q99/6", number)
            .convert()
            .expect("the gripper is not scaled");
        for place in ["q01/0", "q99/5"] {
            let pointer = format!("/example_tabletop/action/{place}");
            let (list, i) = place.split_once('/').unwrap();
            let wanted = format!("`example_tabletop` has {number} for action.{list}[{i}]");
            replaced(STATISTICS, &pointer, number).refused(&[STATISTICS, &wanted]);
        }
        let mean = "/tvf_normalize_params/0/mean/1";
        let at = "tvf_normalize_params[0].mean[1]";
        replaced(PREPROCESSOR, mean, number).refused(&[PREPROCESSOR, at, number]);
    }
}

#[test]
fn sizes_that_tensors_do_not_have_are_refused() {
    all_refused(
        CONFIG,
        &[
            ("/text_config/hidden_size", json!(0), "embed_tokens.weight has shape [768, 64]"),
            ("/text_config/hidden_size", json!(128), "[768, 128] is needed"),
            (
                "/text_config/hidden_size",
                json!(u64::MAX),
                "do not fit 18446744073709551615 channels",
            ),
            (
                "/text_config/hidden_size",
                json!(-1),
                "config.json cannot be used: text_config.hidden_size: invalid value",
            ),
            (
                "/text_config/num_attention_heads",
                json!(0),
                "text_config: 0 and 2 heads do not fit 64",
            ),
            ("/text_config/num_attention_heads", json!(3), "3 and 2 heads"),
            ("/text_config/num_attention_heads", json!(64), "64 and 2 heads"),
            (
                "/text_config/num_attention_heads",
                json!(1_u64 << 63),
                "9223372036854775808 and 2 heads",
            ),
            ("/text_config/num_key_value_heads", json!(0), "2 and 0 heads"),
            ("/text_config/num_key_value_heads", json!(u64::MAX), "and 18446744073709551615 heads"),
            (
                "/text_config/num_key_value_heads",
                json!(1),
                "k_proj.weight has shape [64, 64], [32, 64]",
            ),
            ("/text_config/num_hidden_layers", json!(0), "model.layers.0.input_layernorm.weight"),
            ("/text_config/num_hidden_layers", json!(1), "model.layers.1.input_layernorm.weight"),
            (
                "/text_config/num_hidden_layers",
                json!(u64::MAX),
                "lacks the tensor language_model.model",
            ),
            ("/text_config/intermediate_size", json!(95), "gate_proj.weight has shape [96, 64]"),
            (
                "/text_config/vocab_size",
                json!(700),
                "embed_tokens.weight has shape [768, 64], [700, 64]",
            ),
            ("/text_config/vocab_size", json!(u32::MAX), "[4294967295, 64] is needed"),
            (
                "/pad_to_multiple_of",
                json!(769),
                "vocab_size is 768, of which pad_to_multiple_of is 769",
            ),
            ("/n_action_bins", json!(2), "`openvla.action.token_count` is 2"),
            ("/n_action_bins", json!(705), "no room for 705 actions"),
            ("/text_config/max_position_embeddings", json!(0), "`openvla.context_length` is 0"),
            (
                "/text_config/max_position_embeddings",
                json!(1_u64 << 40),
                "`openvla.context_length` is",
            ),
            ("/text_config/rms_norm_eps", json!(0), "layer_norm_rms_epsilon` is 0; more than 0"),
            (
                "/text_config/rms_norm_eps",
                json!(1e39),
                "config.json cannot be used: text_config.rms_norm_eps: number out of range",
            ),
            ("/text_config/rope_theta", json!(-1), "`openvla.rope.freq_base` is -1"),
        ],
    );
}

#[test]
fn preprocessing_that_is_not_run_is_refused() {
    let cases = [
        ("/tvf_resize_params/0/interpolation", json!(2), "the towers resize differently"),
        ("/tvf_resize_params/1/size", json!([225, 224]), "the towers resize differently"),
        ("/tvf_crop_params/1/output_size", json!([112, 112]), "the towers crop differently"),
        ("/tvf_crop_params", json!([]), "[2, 0, 2] towers are described, the model has 2"),
        ("/tvf_normalize_params/0/mean", json!([0.5]), "preprocessor_config.json cannot be used"),
        ("/tvf_normalize_params/0/std", json!([0.5, 0, 0.5]), "`openvla.dinov2.image_std`"),
        ("/tvf_do_letterbox", json!(true), "do not fit together"),
        ("/tvf_letterbox_fill", json!([0, 0, 256]), "preprocessor_config.json cannot be used"),
    ];
    all_refused(PREPROCESSOR, &cases);
    let resize = |change: Value| json!([change, change]);
    let of = |size: Value, interpolation: u32, max_size: Value| {
        resize(json!({"size": size, "interpolation": interpolation, "max_size": max_size}))
    };
    all_refused(
        PREPROCESSOR,
        &[
            (
                "/tvf_resize_params",
                of(json!([224, 224]), 2, Value::Null),
                "interpolation 2; bicubic (3)",
            ),
            ("/tvf_resize_params", of(json!([224, 224]), 3, json!(256)), "max_size is set"),
            ("/tvf_resize_params", of(json!(256), 3, Value::Null), "Short(256)"),
            ("/tvf_resize_params", of(json!([256, 256]), 3, Value::Null), "Exact([256, 256])"),
        ],
    );
    let v01 = Checkpoint::new(Variant::V01, 1);
    v01.set(PREPROCESSOR, "/tvf_letterbox_fill", Value::Null);
    v01.refused(&[PREPROCESSOR, "tvf_letterbox_fill is missing"]);
    // A size of its own in every place: the tensors are of another.
    for (size, wanted) in
        [(0, "images of 0x0"), (238, "have 289 patches"), (2800, "is 2800, not 14")]
    {
        let checkpoint = Checkpoint::plain();
        let crop = json!({"output_size": [size, size]});
        checkpoint.set(PREPROCESSOR, "/tvf_crop_params", json!([crop, crop]));
        checkpoint.set(PREPROCESSOR, "/tvf_resize_params", of(json!([size, size]), 3, Value::Null));
        checkpoint.refused(&[wanted]);
    }
}

#[test]
fn statistics_are_needed_and_their_own_file_wins() {
    let checkpoint = Checkpoint::plain();
    for (text, wanted) in [
        ("{}", "there is no data set with `action.q01` and `action.q99`"),
        (r#"{"d": {"action": {"q01": [0], "q99": []}}}"#, "`d` has 1 q01, 0 q99"),
        ("null", "its action statistics"),
    ] {
        checkpoint.write(STATISTICS, text.as_bytes());
        checkpoint.refused(&[STATISTICS, wanted]);
    }
    checkpoint.remove(STATISTICS);
    checkpoint.convert().expect("config.json's norm_stats");
    checkpoint.json(CONFIG, |config| drop(config.as_object_mut().unwrap().remove("norm_stats")));
    checkpoint.refused(&["has no dataset_statistics.json", "finetune.py leaves the file"]);
}

#[test]
fn every_broken_file_is_named() {
    let names = |variant| match variant {
        Variant::OpenVla | Variant::Oft { .. } => ["tokenizer.json", INDEX],
        Variant::V01 => ["added_tokens.json", "tokenizer.model"],
    };
    let always =
        [CONFIG, PREPROCESSOR, STATISTICS, "tokenizer_config.json", "special_tokens_map.json"];
    for variant in [Variant::OpenVla, Variant::V01] {
        for name in always.into_iter().chain(names(variant)) {
            for bytes in [b"".as_slice(), b"{", b"[1, 2]", b"\xff\xfe", &b"[".repeat(9999)] {
                if name == "tokenizer.model" && bytes.is_empty() {
                    continue; // a protobuf message without fields: its pieces are missed later
                }
                let checkpoint = Checkpoint::new(variant, 2);
                checkpoint.write(name, bytes);
                checkpoint.refused(&[name]);
            }
        }
    }
}

#[test]
fn missing_files_are_named() {
    for (name, wanted) in [
        (CONFIG, "cannot read"),
        (PREPROCESSOR, "cannot read"),
        ("model.safetensors", "is the checkpoint complete?"),
    ] {
        let checkpoint = Checkpoint::plain();
        checkpoint.remove(name);
        checkpoint.refused(&[name, wanted]);
    }
    let checkpoint = Checkpoint::plain();
    checkpoint.remove("tokenizer.model");
    checkpoint.convert().expect("tokenizer.json is enough");
    checkpoint.remove("tokenizer.json");
    checkpoint.refused(&["looked for tokenizer.json and tokenizer.model, found neither"]);
    let checkpoint = Checkpoint::plain();
    checkpoint.remove("special_tokens_map.json");
    checkpoint.convert().expect("tokenizer_config.json is enough");
    checkpoint.remove("tokenizer_config.json");
    checkpoint
        .refused(&["looked for bos_token in tokenizer_config.json and special_tokens_map.json"]);
}

#[test]
fn folders_that_are_no_checkpoints_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (out, file) = (dir.path().join("model.gguf"), dir.path().join("file"));
    fs::write(&file, b"").unwrap();
    for path in [file, dir.path().join("missing")] {
        let why = convert(&path, &out).unwrap_err();
        let wanted = format!("{} is not a folder with an OpenVLA checkpoint", path.display());
        assert!(why.starts_with(&wanted), "{why}");
    }
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let why = convert(&empty, &out).unwrap_err();
    assert!(why.starts_with(&format!("cannot read {}", empty.join(CONFIG).display())), "{why}");
    assert!(!out.exists());
}

#[test]
fn parts_of_openvla_oft_that_cannot_be_read_are_refused() {
    for name in ["action_head--50000_checkpoint.pt", "proprio_projector--50000_checkpoint.pt"] {
        let checkpoint = Checkpoint::plain();
        checkpoint.write(name, b"");
        checkpoint.refused(&["cannot read the PyTorch file", name]);
    }
    let checkpoint = Checkpoint::plain();
    checkpoint.write("noisy_action_projector--5_checkpoint.pt", b"");
    checkpoint.refused(&["noisy_action_projector--5_checkpoint.pt", "diffusion"]);
}
