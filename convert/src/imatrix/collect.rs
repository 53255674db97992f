//! Collects an importance matrix: a model acts on robot prompts, each with its image, and the sums of
//! the squared inputs of its matrices are written to a file that [`crate::imatrix`] and llama.cpp read.
//!
//! ref: llama.cpp `tools/imatrix/imatrix.cpp`, `save_imatrix`

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;
use openvla::cli::{PICTURES, is_picture};
use openvla::image::RgbImage;
use openvla::oft::{Observation, normalized_state};
use openvla::{Config, Options, Policy};
use openvla_kernels::{DType, Header, MAX_TENSOR_NAME, Mapped, Squares, shape};
use regex::Regex;

use crate::atomic_file::AtomicFile;
use crate::imatrix::{COUNTS, SUMS, TYPE};
use crate::interrupt;

/// An upper bound of the file's size, for the check of free disk space: one f32 per column of
/// openvla-7b's matrices.
const MAX_BYTES: u64 = 1 << 24;

/// Where prompts come from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The folder of the third-person camera's images.
    pub images: PathBuf,
    /// OpenVLA-OFT: the folders of the wrist cameras' images, in the order that the model was trained with.
    pub wrists: Vec<PathBuf>,
    /// OpenVLA-OFT: a file with the arm's state on each line, a JSON list.
    pub states: Option<PathBuf>,
    /// A file with an instruction on each line.
    pub instructions: PathBuf,
}

/// What a robot saw at one moment.
#[derive(Debug, Clone)]
struct Frame {
    /// Of each camera.
    images: Vec<PathBuf>,
    state: Option<Vec<f64>>,
}

/// A model, and the prompts to run it on. All of them were checked, so that none fails late.
pub struct Collector {
    policy: Policy,
    /// Frames paired with instructions, in order; the shorter of the two lists is repeated.
    pairs: Vec<(Frame, String)>,
    /// The names of the images' folders and of the files, for the metadata.
    datasets: Vec<String>,
    /// Tokens of the longest prompt, image patches included.
    n_row: usize,
}

impl Collector {
    /// Opens a model and the sources of its prompts.
    ///
    /// # Errors
    /// Names the file that is missing, damaged or empty, cameras or a state that the model has not, and an instruction
    /// that is too long.
    pub fn new(model: &Path, sources: &Sources, mut options: Options) -> Result<Self> {
        let Sources { images, wrists, states, instructions } = sources;
        let files = states.iter().chain([instructions]);
        let datasets = [images].into_iter().chain(wrists).chain(files).map(|path| name(path));
        let folders: Vec<Vec<PathBuf>> =
            [images].into_iter().chain(wrists).map(|folder| list(folder)).collect::<Result<_>>()?;
        for path in folders.iter().flatten() {
            decode(path)?;
        }
        options.observe = true;
        let policy = Policy::open(model, &options)
            .with_context(|| format!("cannot open the model {}", model.display()))?;
        let frames = frames(&policy, sources, &folders)?;
        let lines = read_lines(instructions)?;
        let mut n_row = 0;
        for line in &lines {
            let shown = || line.chars().take(60).collect::<String>();
            let rows = rows(&policy, line);
            n_row = n_row.max(rows.with_context(|| {
                format!("the instruction {:?} in {}", shown(), instructions.display())
            })?);
        }
        let pairs = frames.iter().cycle().zip(lines.iter().cycle());
        let pairs = pairs.take(frames.len().max(lines.len()));
        let pairs = pairs.map(|(frame, line)| (frame.clone(), line.clone())).collect();
        Ok(Self { policy, pairs, datasets: datasets.collect(), n_row })
    }

    /// How many prompts there are.
    pub fn n_prompt(&self) -> usize {
        self.pairs.len()
    }

    /// Runs the model on each pair and writes the file. Returns the number of matrices in it.
    ///
    /// # Errors
    /// Names what cannot be computed or written. An existing file is then left unchanged.
    pub fn write(mut self, out: &Path, progress: &ProgressBar) -> Result<usize> {
        let mut file = AtomicFile::create(out, MAX_BYTES)?;
        for (frame, instruction) in &self.pairs {
            interrupt::check()?;
            act(&mut self.policy, frame, instruction)
                .with_context(|| format!("{} and {instruction:?}", frame.images[0].display()))?;
            progress.inc(1);
        }
        let squares = match &mut self.policy {
            Policy::OpenVla(policy) => policy.network().squares(),
            Policy::Oft(policy) => policy.network().squares(),
        };
        file.append(&self.header(&squares)?.encode())?;
        for (name, Squares { sums, n_row }) in &squares {
            let sums: Vec<f32> = sums.iter().map(|sum| *sum as f32).collect();
            ensure!(
                sums.iter().all(|sum| sum.is_finite()),
                "the squared inputs of {name} overflow; \
                 is the model file damaged?"
            );
            for numbers in [sums, vec![*n_row as f32]] {
                file.append(&numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())?;
            }
        }
        file.finish()?;
        Ok(squares.len())
    }

    fn header(&self, squares: &BTreeMap<String, Squares>) -> Result<Header> {
        let mut header = Header::default();
        header.set("general.type", TYPE.to_owned());
        header.set("imatrix.datasets", self.datasets.clone());
        // llama.cpp counts chunks of as many tokens as its context; ours are prompts.
        header.set("imatrix.chunk_count", u32::try_from(self.pairs.len())?);
        header.set("imatrix.chunk_size", u32::try_from(self.n_row)?);
        for (name, Squares { sums, .. }) in squares {
            ensure!(
                name.len() + SUMS.len() <= MAX_TENSOR_NAME,
                "the name {name} is too long for a file"
            );
            header.tensor(&format!("{name}{SUMS}"), DType::F32, shape(&[sums.len()]));
            header.tensor(&format!("{name}{COUNTS}"), DType::F32, shape(&[1]));
        }
        Ok(header)
    }
}

/// The last component of a path: the file must not tell how folders are named on this machine.
fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The sort key of a name: numbers compare by value, so that `f2` comes before `f10`.
fn natural(name: &str) -> Vec<(String, u128, String)> {
    let parts = Regex::new(r"([^0-9]*)([0-9]*)").expect("a pattern");
    let part = |[text, digits]: [&str; 2]| {
        // Numbers that overflow compare by their digits.
        (text.to_owned(), digits.parse().unwrap_or(u128::MAX), digits.to_owned())
    };
    parts.captures_iter(name).map(|found| part(found.extract().1)).collect()
}

/// The images of a folder, sorted by name.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot list the images in {}", folder.display());
    let mut images = Vec::new();
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        if is_picture(&path) {
            images.push(path);
        }
    }
    ensure!(
        !images.is_empty(),
        "{} holds no images (*.{}); it needs some, as the robot's camera takes them",
        folder.display(),
        PICTURES.join(", *.")
    );
    images.sort_by(|a, b| natural(&name(a)).cmp(&natural(&name(b))).then_with(|| a.cmp(b)));
    Ok(images)
}

fn decode(path: &Path) -> Result<RgbImage> {
    let image = Mapped::open(path).map_err(openvla::Error::from);
    let image = image.and_then(|bytes| openvla::decode(&bytes));
    image.with_context(|| format!("the image {}", path.display()))
}

/// The lines of a file that are not blank.
fn read_lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read the instructions in {}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    ensure!(
        !lines.is_empty(),
        "{} holds no instructions; one per line is needed, such as \"put eggplant into pot\"",
        path.display()
    );
    Ok(lines)
}

/// The frames of all cameras and states. Those of one moment have the same place in each list.
fn frames(policy: &Policy, sources: &Sources, folders: &[Vec<PathBuf>]) -> Result<Vec<Frame>> {
    let Sources { images, wrists, states, .. } = sources;
    let oft = policy.config().oft.as_ref();
    let Some(oft) = oft else {
        ensure!(
            wrists.is_empty() && states.is_none(),
            "--wrist and --states are for OpenVLA-OFT models; this is an OpenVLA, which sees one camera and reads no \
             state"
        );
        return Ok(folders[0].iter().map(|path| Frame::alone(path.clone())).collect());
    };
    ensure!(
        folders.len() == oft.cameras.len(),
        "the model has {} cameras ({}); give a folder of images for each that is on a wrist with --wrist, {} now",
        oft.cameras.len(),
        oft.cameras.join(", "),
        wrists.len()
    );
    let n = folders[0].len();
    let other = folders.iter().zip([images].into_iter().chain(wrists)).find(|(f, _)| f.len() != n);
    if let Some((found, folder)) = other {
        bail!(
            "{} holds {n} images and {} {}; a frame has one of each camera",
            images.display(),
            folder.display(),
            found.len()
        );
    }
    ensure!(
        states.is_some() == (oft.n_state > 0),
        "the model reads {}; {} --states",
        if oft.n_state > 0 { "the arm's state" } else { "no state" },
        if oft.n_state > 0 { "give one for each image with" } else { "leave out" }
    );
    let states = match states {
        Some(path) => read_states(path, policy.config(), n)?.into_iter().map(Some).collect(),
        None => vec![None; n],
    };
    let frame = |(i, state): (usize, Option<Vec<f64>>)| Frame {
        images: folders.iter().map(|images: &Vec<PathBuf>| images[i].clone()).collect(),
        state,
    };
    Ok(states.into_iter().enumerate().map(frame).collect())
}

impl Frame {
    /// Of one camera, without a state.
    fn alone(image: PathBuf) -> Self {
        Self { images: vec![image], state: None }
    }
}

/// A state on each of `n` lines.
fn read_states(path: &Path, config: &Config, n: usize) -> Result<Vec<Vec<f64>>> {
    let shown = path.display();
    let lines = read_lines(path)?;
    ensure!(lines.len() == n, "{shown} holds {} states for {n} images", lines.len());
    let (_, dataset) = config.statistics.first();
    let state = |line: &String| -> Result<Vec<f64>> {
        let state: Vec<f64> = serde_json::from_str(line).context("a JSON list is needed")?;
        normalized_state(Some(&state), dataset.state.as_ref())?;
        Ok(state)
    };
    let lines = lines.iter().enumerate();
    let states =
        lines.map(|(i, line)| state(line).with_context(|| format!("line {} of {shown}", i + 1)));
    states.collect()
}

/// Any data set will do: they share the network, and only the units of states and actions differ.
fn act(policy: &mut Policy, frame: &Frame, instruction: &str) -> Result<()> {
    let key = policy.config().statistics.first().0.to_owned();
    let images: Vec<RgbImage> =
        frame.images.iter().map(|path| decode(path)).collect::<Result<_>>()?;
    match policy {
        Policy::OpenVla(policy) => drop(policy.act(&images[0], instruction, Some(&key))?),
        Policy::Oft(policy) => {
            let images: Vec<&RgbImage> = images.iter().collect();
            let observation = Observation { images: &images, state: frame.state.as_deref() };
            drop(policy.act(&observation, instruction, Some(&key))?);
        }
    }
    Ok(())
}

/// Tokens of a prompt, image patches included.
///
/// # Errors
/// If the prompt and the longest action, or the chunk, exceed the context.
fn rows(policy: &Policy, instruction: &str) -> openvla::Result<usize> {
    let config = policy.config();
    let (n_row, n_more) = match policy {
        Policy::OpenVla(policy) => {
            let n_id = policy.prompt_ids(instruction)?.len();
            (config.n_patch() + n_id, config.statistics.longest())
        }
        Policy::Oft(policy) => (policy.n_row(policy.prompt_ids(instruction)?.len()), 0),
    };
    config.llama.check_rows(n_row + n_more)?;
    Ok(n_row)
}

#[cfg(test)]
mod tests {
    use super::natural;

    #[test]
    fn numbers_in_names_are_sorted_by_their_size() {
        let long = format!("f{}", "9".repeat(60));
        let sorted =
            ["10.png", "a", "f1.png", "f2.png", "f10.jpg", "f10.png", "f10b2", &long, "g0"];
        assert!(sorted.is_sorted_by_key(|name| natural(name)), "{sorted:?}");
        assert!(natural("f01") != natural("f1"), "the order is total");
    }
}
