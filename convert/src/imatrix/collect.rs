//! Collects an importance matrix: a model acts on robot prompts, each with its image, and the sums of
//! the squared inputs of its matrices are written to a file that [`crate::imatrix`] and llama.cpp read.
//!
//! ref: llama.cpp `tools/imatrix/imatrix.cpp`, `save_imatrix`

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use openvla::cli::{PICTURES, is_picture};
use openvla::image::RgbImage;
use openvla::{OpenVla, Options};
use openvla_kernels::{DType, Header, MAX_TENSOR_NAME, Mapped, Squares, shape};
use regex::Regex;

use crate::atomic_file::AtomicFile;
use crate::imatrix::{COUNTS, SUMS, TYPE};
use crate::interrupt;

/// An upper bound of the file's size, for the check of free disk space: one f32 per column of
/// openvla-7b's matrices.
const MAX_BYTES: u64 = 1 << 24;

/// A model, and the prompts to run it on. All of them were checked, so that none fails late.
pub struct Collector {
    policy: OpenVla,
    /// Images paired with instructions, in order; the shorter of the two lists is repeated.
    pub pairs: Vec<(PathBuf, String)>,
    /// The names of the images' folder and the instructions' file, for the metadata.
    datasets: Vec<String>,
    /// Tokens of the longest prompt, image patches included.
    n_row: usize,
}

impl Collector {
    /// Opens a model, a folder of images and a text file of instructions, one per line.
    ///
    /// # Errors
    /// Names the file that is missing, damaged or empty, and an instruction that is too long.
    pub fn new(
        model: &Path,
        images: &Path,
        instructions: &Path,
        mut options: Options,
    ) -> Result<Self> {
        let datasets = [images, instructions].map(name).to_vec();
        let images = list(images)?;
        for path in &images {
            decode(path)?;
        }
        options.observe = true;
        let policy = OpenVla::open(model, &options)
            .with_context(|| format!("cannot open the model {}", model.display()))?;
        let lines = read_lines(instructions)?;
        let mut n_row = 0;
        for line in &lines {
            let shown = || line.chars().take(60).collect::<String>();
            let rows = rows(&policy, line);
            n_row = n_row.max(rows.with_context(|| {
                format!("the instruction {:?} in {}", shown(), instructions.display())
            })?);
        }
        let pairs = images.iter().cycle().zip(lines.iter().cycle());
        let pairs = pairs.take(images.len().max(lines.len()));
        let pairs = pairs.map(|(image, line)| (image.clone(), line.clone())).collect();
        Ok(Self { policy, pairs, datasets, n_row })
    }

    /// Runs the model on each pair and writes the file. Returns the number of matrices in it.
    ///
    /// # Errors
    /// Names what cannot be computed or written. An existing file is then left unchanged.
    pub fn write(mut self, out: &Path, progress: &ProgressBar) -> Result<usize> {
        let mut file = AtomicFile::create(out, MAX_BYTES)?;
        // Any key will do: the data sets share the network, and only the units of the actions differ.
        let key = self.policy.config().statistics.first().0.to_owned();
        for (path, instruction) in &self.pairs {
            interrupt::check()?;
            let act = self.policy.act(&decode(path)?, instruction, Some(&key));
            act.with_context(|| format!("{} and {instruction:?}", path.display()))?;
            progress.inc(1);
        }
        let squares = self.policy.network().squares();
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

/// Tokens of a prompt, image patches included.
///
/// # Errors
/// If the prompt and the longest action exceed the context.
fn rows(policy: &OpenVla, instruction: &str) -> openvla::Result<usize> {
    let config = policy.config();
    let n_row = config.n_patch() + policy.prompt_ids(instruction)?.len();
    config.llama.check_rows(n_row + config.statistics.longest())?;
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
