//! Other names of tensors than those in the mapping: those of transformers 5, and those that programs
//! write which wrap a model.

/// The prefix of peft's tensor names: it wraps the model twice.
pub const PEFT_PREFIX: &str = "base_model.model.";

/// The name that transformers 4 has for a tensor of a checkpoint or of an adapter.
///
/// ref: transformers 4.52 `LlavaForConditionalGeneration._checkpoint_conversion_mapping`, whose towers
/// and projector have other names
pub fn canonical(name: &str) -> String {
    const RENAMED: [(&str, &str); 6] = [
        ("model.language_model.embed_tokens.", "language_model.model.embed_tokens."),
        ("model.language_model.layers.", "language_model.model.layers."),
        ("model.language_model.norm.", "language_model.model.norm."),
        ("model.vision_backbone.", "vision_backbone."),
        ("model.projector.", "projector."),
        ("lm_head.", "language_model.lm_head."),
    ];
    let (prefix, name) =
        name.strip_prefix(PEFT_PREFIX).map_or(("", name), |rest| (PEFT_PREFIX, rest));
    let rename = |(from, to): &(_, _)| Some(format!("{prefix}{to}{}", name.strip_prefix(*from)?));
    RENAMED.iter().find_map(rename).unwrap_or_else(|| format!("{prefix}{name}"))
}

/// If one of `names` is the wanted tensor in a wrapped model: a message that says so, and what to save
/// instead.
pub fn explain<'a>(names: impl IntoIterator<Item = &'a String>, wanted: &str) -> Option<String> {
    let found = names.into_iter().find(|name| is_wrapped(name, wanted))?;
    let has = |part: &str| found.split('.').any(|found| found == part);
    let advice = if has("base_model") || has("base_layer") {
        "saved with peft's layers in it; call merge_and_unload() and save what that returns"
    } else if has("_orig_mod") {
        "saved from a compiled model; save model._orig_mod with save_pretrained"
    } else {
        "saved from a wrapped model; save the model itself, such as model.module, with save_pretrained"
    };
    Some(format!("it holds it as {found}: {advice}"))
}

/// Whether a name is the wanted one, apart from the components that wrappers add.
fn is_wrapped(name: &str, wanted: &str) -> bool {
    const WRAPPERS: [&str; 5] =
        ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"];
    let parts: Vec<_> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    let plain = parts.join(".");
    plain.strip_suffix(wanted).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_transformers_5_are_those_of_4() {
        for (new, old) in [
            ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
            ("model.vision_backbone.featurizer.x", "vision_backbone.featurizer.x"),
            ("model.projector.fc1.bias", "projector.fc1.bias"),
            ("lm_head.weight", "language_model.lm_head.weight"),
            ("base_model.model.lm_head.x", "base_model.model.language_model.lm_head.x"),
            ("language_model.model.norm.weight", "language_model.model.norm.weight"),
            ("model.language_model.model.norm.weight", "model.language_model.model.norm.weight"),
        ] {
            assert_eq!(canonical(new), old);
        }
    }

    #[test]
    fn a_wrapped_name_is_explained_and_another_is_not() {
        for (name, words) in [
            ("_orig_mod.a.b.weight", "model._orig_mod"),
            ("module._orig_mod.a.b.weight", "model._orig_mod"),
            ("module.a.b.weight", "model.module"),
            ("a._fsdp_wrapped_module.b.weight", "the model itself"),
            ("policy.a.b.weight", "the model itself"),
            ("base_model.model.a.b.base_layer.weight", "merge_and_unload"),
        ] {
            let said = explain([&name.to_owned()], "a.b.weight").unwrap();
            assert!(said.contains(name) && said.contains(words), "{said}");
        }
        for name in ["a.c.weight", "aa.b.weight", "b.weight", "a.b.weight.scale"] {
            assert_eq!(explain([&name.to_owned()], "a.b.weight"), None);
        }
    }
}
