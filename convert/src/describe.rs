//! Translates a checkpoint's JSON files to the runtime's [`Config`], the metadata of the file.

use anyhow::{Context, Result, bail, ensure};
use openvla::prompt::{self, Prompt};
use openvla::tokenizer::{TokenType, Vocabulary};
use openvla::{
    BaseModel, Config, General, Normalize, OftConfig, Preprocess, Profile, Resize, Source,
    Statistics,
};

use crate::cards;
use crate::checkpoint::{CheckpointInfo, HubRevision};
use crate::files::checkpoint_error;
use crate::hf_config::{HfConfig, HfPreprocessor, ResizeSize};
use crate::mapper::Shapes;
use crate::mapping::Mapping;
use crate::plan::Encoding;
use crate::tokenizer;

/// Pillow's number for bicubic.
const BICUBIC: u32 = 3;
/// SentencePiece's space, the piece that ends every prompt.
const SPACE: &str = "▁";

/// What is done to pictures before the image processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pictures {
    /// How they are resized.
    pub profile: Profile,
    /// Whether only their center is shown.
    pub center_crop: bool,
}

impl Pictures {
    /// What the reference's policy does to them, which for OpenVLA-OFT runs is more than for an OpenVLA.
    pub fn of_policy(is_run: bool) -> Self {
        Self { profile: if is_run { Profile::Oft } else { Profile::Raw }, center_crop: is_run }
    }
}

/// The metadata of a checkpoint with tensors of these `shapes`, mapped by `mapping`.
///
/// # Errors
/// Names what this version would compute differently from the reference.
pub fn describe(
    info: &CheckpointInfo,
    statistics: Statistics,
    shapes: &Shapes,
    mapping: &Mapping,
    oft: Option<OftConfig>,
    pictures: Pictures,
    encoding: Encoding,
) -> Result<Config> {
    let hf = &info.config;
    let vocabulary = tokenizer::read(info.tokenizer_dir(), mapping.llama.n_vocab)?;
    let preprocess = preprocess(&info.preprocessor, mapping, pictures)
        .with_context(|| format!("{}/preprocessor_config.json", info.dir.display()))?;
    let config = Config {
        general: general(info, shapes, mapping, encoding),
        preprocess,
        patch_size: mapping.patch_size,
        towers: mapping.towers.clone(),
        projector: mapping.projector.clone(),
        llama: mapping.llama.clone(),
        // ref: openvla-oft `get_vla_action`, which has one prompt whatever the backbone
        prompt: Prompt::new(
            if oft.is_some() { prompt::OPENVLA } else { template(hf)? }.to_owned(),
            suffix(&vocabulary)?,
        )
        .map_err(checkpoint_error)?,
        vocabulary,
        actions: hf.actions()?,
        cards: cards::cards(&statistics),
        statistics,
        oft,
    };
    config.check().map_err(checkpoint_error)?;
    ensure!(
        config.n_patch() == mapping.n_patch,
        "images of {} have {} patches, the towers' position tables {}",
        config.preprocess.size,
        config.n_patch(),
        mapping.n_patch
    );
    Ok(config)
}

/// ref: `vla-scripts/deploy.py` `get_openvla_prompt`, which looks for "v01" in the path; the versions
/// differ by their backbone.
fn template(hf: &HfConfig) -> Result<&'static str> {
    match hf.llm_backbone_id.as_str() {
        "llama2-7b-pure" => Ok(prompt::OPENVLA),
        id if id.starts_with("vicuna") => Ok(prompt::V01),
        id => bail!("no prompt is known for the backbone `{id}`; llama2-7b-pure and vicuna are"),
    }
}

/// The token that the reference appends to prompts: 29871 in Llama-2's vocabulary.
fn suffix(vocabulary: &Vocabulary) -> Result<u32> {
    let is_space =
        |(piece, kind): (&String, &TokenType)| piece == SPACE && *kind == TokenType::Normal;
    let id = vocabulary.tokens.iter().zip(&vocabulary.types).position(is_space);
    let id = id.with_context(|| format!("the vocabulary lacks {SPACE:?}, which ends prompts"))?;
    Ok(u32::try_from(id)?)
}

fn preprocess(
    hf: &HfPreprocessor,
    mapping: &Mapping,
    Pictures { profile, center_crop }: Pictures,
) -> Result<Preprocess> {
    let (resize, crop, normalize) =
        (&hf.tvf_resize_params, &hf.tvf_crop_params, &hf.tvf_normalize_params);
    let n = mapping.towers.len();
    let found = [resize.len(), crop.len(), normalize.len()];
    ensure!(found == [n; 3], "{found:?} towers are described, the model has {n}");
    ensure!(resize.iter().all(|r| *r == resize[0]), "the towers resize differently");
    ensure!(crop.iter().all(|c| *c == crop[0]), "the towers crop differently");
    let [height, width] = crop[0].output_size;
    ensure!(height == width && height > 0, "images of {width}x{height} are not square");
    let interpolation = resize[0].interpolation;
    ensure!(interpolation == BICUBIC, "interpolation {interpolation}; bicubic (3) is needed");
    ensure!(resize[0].max_size.is_none(), "max_size is set, which this version does not run");
    let resize = match (resize[0].size, hf.tvf_do_letterbox) {
        (ResizeSize::Exact(size), false) if size == [height, width] => Resize::Naive,
        (ResizeSize::Short(size), false) if size == height => Resize::Crop,
        (ResizeSize::Short(size), true) if size == height => {
            let fill = hf.tvf_letterbox_fill.context("tvf_letterbox_fill is missing")?;
            Resize::Letterbox { fill }
        }
        other => bail!("resizing to {other:?} and cropping to {height} do not fit together"),
    };
    let towers = normalize.iter().map(|p| Normalize { mean: p.mean, std: p.std }).collect();
    Ok(Preprocess { profile, center_crop, size: height, resize, towers })
}

/// ref: `docs/gguf.md`, "GGUF Naming Convention" and "General metadata"
fn general(
    info: &CheckpointInfo,
    shapes: &Shapes,
    mapping: &Mapping,
    encoding: Encoding,
) -> General {
    let n_param: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
    let size_label = match n_param {
        n @ 1_000_000_000.. => format!("{}B", n / 1_000_000_000),
        n @ 1_000_000.. => format!("{}M", n / 1_000_000),
        n => format!("{}K", n.div_ceil(1000)),
    };
    let single = mapping.towers.len() == 1;
    let version = if single { "v0.1" } else { "v1.0" }.to_owned();
    let finetune = finetune(info.adapter.as_ref().unwrap_or(&info.name));
    let is_run = mapping.run.is_some();
    let basename = if is_run { "OpenVLA-OFT" } else { "OpenVLA" };
    let tuned = finetune.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
    // Both supported backbones, Llama-2 and Vicuna 1.5, are under Llama 2's license, and models derived
    // from them inherit it, whatever a model card says.
    // ref: README of openvla/openvla, "License"
    let text = |text: &str| Some(text.to_owned());
    General {
        name: format!("{basename} {size_label}{tuned} {version}"),
        basename: basename.to_owned(),
        description: text(if is_run {
            "Robot policy: camera images and an instruction in, a chunk of actions out."
        } else {
            "Robot policy: a camera image and an instruction in, a motion out."
        }),
        organization: is_official(info, finetune.as_ref()).then(|| "OpenVLA".to_owned()),
        license: text("llama2"),
        license_name: text(
            "Llama 2 Community License, which the weights inherit; OpenVLA's own part is MIT",
        ),
        license_link: text("https://ai.meta.com/llama/license/"),
        repo_url: text(if is_run {
            "https://github.com/moojink/openvla-oft"
        } else {
            "https://github.com/openvla/openvla"
        }),
        source: info.hub_revision.as_ref().map(source).unwrap_or_default(),
        base_models: match finetune {
            Some(_) => base_models(&size_label, &version),
            None => Vec::new(),
        },
        tags: ["robotics", "vla", "vision-language-action", "openvla"].map(String::from).to_vec(),
        languages: vec!["en".to_owned()],
        converter_version: text(env!("CARGO_PKG_VERSION")),
        size_label,
        finetune,
        version,
        file_type: encoding.file_type,
    }
}

fn source(hub_revision: &HubRevision) -> Source {
    let HubRevision { repository, revision } = hub_revision.clone();
    let url = Some(format!("https://huggingface.co/{repository}"));
    Source {
        url: url.clone(),
        repo_url: url,
        repository: Some(repository),
        revision: Some(revision),
        fingerprint: None,
    }
}

/// The only possible base models of a fine-tuned model of this size and version.
fn base_models(size_label: &str, version: &str) -> Vec<BaseModel> {
    let repository = match (size_label, version) {
        ("7B", "v1.0") => "openvla/openvla-7b",
        ("7B", "v0.1") => "openvla/openvla-v01-7b",
        _ => return Vec::new(),
    };
    vec![BaseModel {
        name: "OpenVLA 7B".to_owned(),
        version: Some(version.to_owned()),
        organization: Some("OpenVLA".to_owned()),
        repo_url: Some(format!("https://huggingface.co/{repository}")),
    }]
}

/// The part of a checkpoint's name after "openvla-7b": `openvla-7b-finetuned-libero-spatial` was
/// tuned for `libero-spatial`. Words may be in any script.
fn finetune(name: &str) -> Option<String> {
    let letter = |c: char| c.is_alphanumeric() || !(c.is_ascii() || c.is_whitespace());
    let name: String = name.chars().map(|c| if letter(c) { c } else { '-' }).collect();
    let known = [
        "openvla-7b-oft-finetuned-",
        "openvla-7b-finetuned-",
        "openvla-v01-7b",
        "openvla-7b",
        "openvla",
    ];
    let rest = known.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(&name);
    let words: Vec<&str> = rest.split('-').filter(|word| !word.is_empty()).collect();
    (!words.is_empty()).then(|| words.join("-"))
}

/// Whether the checkpoint comes from OpenVLA's own repositories; a folder's name alone does not tell.
fn is_official(info: &CheckpointInfo, finetune: Option<&String>) -> bool {
    let hub_revision = info.hub_revision.as_ref();
    finetune.is_none() && hub_revision.is_some_and(|hub| hub.repository.starts_with("openvla/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_a_model_was_tuned_for() {
        for (name, wanted) in [
            ("openvla-7b", None),
            ("openvla-v01-7b", None),
            ("openvla-7b-finetuned-libero-spatial", Some("libero-spatial")),
            ("openvla-7b-oft-finetuned-libero-10", Some("libero-10")),
            ("openvla-7b+my_data+b16+lora-r32", Some("my-data-b16-lora-r32")),
            ("my_robot--run.3", Some("my-robot-run-3")),
            ("抓取", Some("抓取")),
            ("openvla-7b+दाल_उठाओ", Some("दाल-उठाओ")),
            ("🤖 arm", Some("🤖-arm")),
        ] {
            assert_eq!(finetune(name).as_deref(), wanted, "{name}");
        }
    }

    #[test]
    fn only_models_of_the_published_size_have_a_known_base() {
        let url = |size, version| base_models(size, version).pop()?.repo_url;
        let published = |name| Some(format!("https://huggingface.co/openvla/{name}"));
        assert_eq!(url("7B", "v1.0"), published("openvla-7b"));
        assert_eq!(url("7B", "v0.1"), published("openvla-v01-7b"));
        assert_eq!(url("424K", "v1.0"), None);
    }

    #[test]
    fn a_repository_is_a_source() {
        let (repository, revision) = ("openvla/openvla-7b".to_owned(), "47a0ec7".to_owned());
        let hub_revision = HubRevision { repository, revision };
        let source = source(&hub_revision);
        assert_eq!(source.url.as_deref(), Some("https://huggingface.co/openvla/openvla-7b"));
        assert_eq!(source.repository, Some(hub_revision.repository));
        assert_eq!(source.revision, Some(hub_revision.revision));
    }
}
