//! Collects an importance matrix: a model acts on robot prompts, each with its image in the context,
//! and the squares of what its matrices were multiplied by go to a file that [`crate::imatrix`] and
//! llama.cpp read.
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

use crate::beside::Beside;
use crate::imatrix::{COUNTS, SUMS, TYPE};
use crate::interrupt;

/// More bytes than a number for each column of openvla-7b.
const ROOM: u64 = 1 << 24;

/// A model, and the prompts it is to act on. All of them were looked at, so that none fails late.
pub struct Calibration {
    policy: OpenVla,
    /// Each image with an instruction, in order; where there are fewer of one, they start again.
    pub pairs: Vec<(PathBuf, String)>,
    /// Where those came from, for the file's metadata.
    datasets: Vec<String>,
    /// Rows of the longest prompt, its image among them.
    n_row: usize,
}

impl Calibration {
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

    /// Acts on each pair and writes the file. Gives the number of matrices in it.
    ///
    /// # Errors
    /// What cannot be computed or written. The file is then as it was before.
    pub fn write(mut self, out: &Path, progress: &ProgressBar) -> Result<usize> {
        let mut file = Beside::create(out, ROOM)?;
        // Every data set's motions are made by the same networks; only their units differ.
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
                "what {name} is multiplied by is too large to be squared; \
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

/// The last part of a path: where things are on this machine is nobody else's business.
fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A name as it is sorted: numbers in it by their size, so that `f2` comes before `f10`.
fn natural(name: &str) -> Vec<(String, u128, String)> {
    let parts = Regex::new(r"([^0-9]*)([0-9]*)").expect("a pattern");
    let part = |[text, digits]: [&str; 2]| {
        // Longer ones than a number can be go by their digits.
        (text.to_owned(), digits.parse().unwrap_or(u128::MAX), digits.to_owned())
    };
    parts.captures_iter(name).map(|found| part(found.extract().1)).collect()
}

/// The images of a folder, by name.
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
        "{} holds no images (*.{}); some are needed, as the robot's camera takes them",
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

/// The lines of a file that say something.
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

/// Rows of a prompt. One that does not fit with the longest motion would fail in the middle.
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
        assert!(natural("f01") != natural("f1"), "no order is left to chance");
    }
}
