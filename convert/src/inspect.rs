//! Describes a model file, for `openvla-convert inspect`.
//!
//! [`Inspection`] is the object that `--json` prints. Its names are stable:
//!
//! | name | what |
//! |---|---|
//! | `file`, `file_bytes` | the path as it was given; its size |
//! | `type` | the name of `general.file_type`, such as "Q8_0"; null if this version has none |
//! | `general` | `openvla::General`: `name`, `version`, `license`, `source`, … |
//! | `parameters`, `tensor_bytes` | of all tensors, including zeros of padding |
//! | `tensors` | by component and type: `component`, `type`, `tensors`, `parameters`, `bytes` |
//! | `image` | `profile`, `center_crop`, `size`, `patch_size`, `resize`, `letterbox_fill`, `towers` of `name`, `mean`, `std` |
//! | `oft` | of an OpenVLA-OFT: `chunk`, `action_length`, `state_length`, `cameras` in order, `bounds`, `head`, `film` |
//! | `prompt` | `template`, `suffix_token_id`, `context_length` |
//! | `actions` | `token_end`, `token_count` |
//! | `datasets` | action cards by data set: `dimensions` of `name`, `unit`, `q01`, `q99`, |
//! | | `normalised`; `gripper` of `open`, `closed`; `rate_hz`; `note`. Unknown is absent |
//! | `source_files` | the files that it was converted from: `name`, `sha256` |
//! | `checksums`, `reference_cases` | whether the file carries them |

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use openvla::{ActionCard, Config, General, OftConfig, Resize, SourceFile, Statistics};
use openvla_kernels::Gguf;
use serde::Serialize;

use crate::cards;
use crate::mapping::component;
use crate::plan::Encoding;

/// The description of a model file. The fields' names are those of the module's table.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub struct Inspection {
    pub file: String,
    pub file_bytes: u64,
    pub r#type: Option<&'static str>,
    pub general: General,
    pub parameters: u64,
    pub tensor_bytes: u64,
    pub tensors: Vec<Component>,
    pub image: Image,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oft: Option<Oft>,
    pub prompt: Prompt,
    pub actions: Actions,
    pub datasets: BTreeMap<String, ActionCard>,
    pub source_files: Vec<SourceFile>,
    pub checksums: bool,
    pub reference_cases: bool,
    /// Finds a data set by the name that users type.
    #[serde(skip)]
    pub statistics: Statistics,
}

/// The tensors of one component of the model that have one type.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub struct Component {
    /// A tower's name, `projector`, `token_embedding`, `llama`, `head` or `action_head`.
    pub component: String,
    pub r#type: String,
    pub tensors: u64,
    pub parameters: u64,
    pub bytes: u64,
}

/// How an image is preprocessed.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub struct Image {
    pub profile: &'static str,
    pub center_crop: bool,
    pub size: u32,
    pub patch_size: usize,
    pub resize: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub letterbox_fill: Option<[u8; 3]>,
    pub towers: Vec<Tower>,
}

/// What an OpenVLA-OFT sees and gives.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub struct Oft {
    pub chunk: usize,
    pub action_length: usize,
    /// 0 if it reads no state.
    pub state_length: usize,
    pub cameras: Vec<String>,
    pub bounds: String,
    pub head: String,
    pub film: bool,
    /// One line for people.
    #[serde(skip)]
    pub summary: String,
}

/// How one tower's input is normalized.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub struct Tower {
    pub name: String,
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

/// How an instruction is tokenized.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub struct Prompt {
    pub template: String,
    pub suffix_token_id: u32,
    pub context_length: usize,
}

/// Which tokens are actions.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the module's table describes them")]
pub struct Actions {
    pub token_end: u32,
    pub token_count: u32,
}

/// Reads a model file's header. The tensors' data is not read.
///
/// # Errors
/// If it is damaged, or a file of another model.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let file = Gguf::open(path)?;
    let config = Config::read(&file)?;
    let tensors = components(&file);
    let has = |prefix: &str| file.metadata().keys().any(|key| key.starts_with(prefix));
    let file_type = config.general.file_type;
    Ok(Inspection {
        file: path.display().to_string(),
        file_bytes: file.bytes().len() as u64,
        r#type: Encoding::ALL.iter().find(|e| e.file_type == file_type).map(|e| e.name),
        parameters: tensors.iter().map(|group| group.parameters).sum(),
        tensor_bytes: tensors.iter().map(|group| group.bytes).sum(),
        tensors,
        image: image(&config),
        oft: config.oft.as_ref().map(oft),
        prompt: Prompt {
            template: config.prompt.template,
            suffix_token_id: config.prompt.suffix,
            context_length: config.llama.n_ctx,
        },
        actions: Actions { token_end: config.actions.end, token_count: config.actions.n_bin },
        // A file from before there were cards still has the statistics that they are made of.
        datasets: if config.cards.is_empty() {
            cards::cards(&config.statistics)
        } else {
            config.cards
        },
        source_files: SourceFile::read_all(&file)?,
        checksums: has("openvla.checksum"),
        reference_cases: has("openvla.proof"),
        general: config.general,
        statistics: config.statistics,
    })
}

fn image(config: &Config) -> Image {
    let resize = config.preprocess.resize;
    let towers = config.towers.iter().zip(&config.preprocess.towers);
    Image {
        profile: config.preprocess.profile.name(),
        center_crop: config.preprocess.center_crop,
        size: config.preprocess.size,
        patch_size: config.patch_size,
        resize: resize.name(),
        letterbox_fill: match resize {
            Resize::Letterbox { fill } => Some(fill),
            Resize::Naive | Resize::Crop => None,
        },
        towers: towers
            .map(|(tower, planes)| Tower {
                name: tower.name.clone(),
                mean: planes.mean,
                std: planes.std,
            })
            .collect(),
    }
}

fn oft(config: &OftConfig) -> Oft {
    Oft {
        chunk: config.chunk,
        action_length: config.n_action,
        state_length: config.n_state,
        cameras: config.cameras.clone(),
        bounds: config.bounds.as_ref().to_owned(),
        head: config.head.as_ref().to_owned(),
        film: config.film,
        summary: crate::oft::summary(config),
    }
}

/// Tensors by component and type, in the order of the file.
fn components(file: &Gguf) -> Vec<Component> {
    let mut groups: Vec<Component> = Vec::new();
    for info in file.tensors() {
        let (component, dtype) = (component(&info.name).to_owned(), info.dtype.to_string());
        let same = |group: &Component| group.component == component && group.r#type == dtype;
        let i = groups.iter().position(same).unwrap_or_else(|| {
            let empty = Component { component, r#type: dtype, tensors: 0, parameters: 0, bytes: 0 };
            groups.push(empty);
            groups.len() - 1
        });
        groups[i].tensors += 1;
        groups[i].parameters += info.shape.iter().product::<usize>() as u64;
        groups[i].bytes += info.range.len() as u64;
    }
    groups
}
