//! The weights: drawn from a seeded generator, rounded to bf16, written as safetensors.
//!
//! All values come from one stream of random words, tensor after tensor. Each takes as many words,
//! so any of them can be drawn without those before it: a file is written one tensor at a time, in
//! its own order, and a tensor is drawn on all cores.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Permissions};
use std::iter::zip;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use half::bf16;
use indicatif::{BinaryBytes, ProgressBar};
use openvla_convert::random::{Size, Spec, Tensor, deviates};
use openvla_vocabulary::write_json;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::{Value, json};

/// What the published files hold at most, in bytes.
const FULL_FILE: usize = 7_000_000_000;

/// Writes `model.safetensors`, or the numbered files and `model.safetensors.index.json`. A file
/// appears under its name once it is whole.
pub fn write(dir: &Path, spec: &Spec, progress: &ProgressBar) -> Result<()> {
    let tensors = spec.tensors();
    let files = files(spec, &tensors)?;
    let bytes = tensors.iter().map(|tensor| 2 * tensor.n() as u64).sum();
    check_space(dir, bytes)?;
    progress.set_length(bytes);
    for (name, part) in &files {
        let path = dir.join(name);
        let drawn = part.iter().map(|tensor| {
            (&tensor.name, Drawn { tensor, seed: spec.seed, progress: progress.clone() })
        });
        // transformers insists on this.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        serialize_to_file(drawn, Some(metadata), &path)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(fs::set_permissions(&path, Permissions::from_mode(0o644))?))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if files.len() > 1 {
        write_json(dir, "model.safetensors.index.json", &index(&files))?;
    }
    Ok(())
}

/// The files' names, and what each holds.
///
/// Small checkpoints' tensors are dealt out like cards, so that a decoder layer is spread over
/// several files; the published files are filled one after the other.
pub fn files<'a>(spec: &Spec, tensors: &'a [Tensor]) -> Result<Vec<(String, Vec<&'a Tensor>)>> {
    let (n, most) = (spec.shards, tensors.len());
    ensure!((1..=most).contains(&n), "{n} shards asked for; 1 to {most} can be filled");
    let parts: Vec<Vec<&Tensor>> = match spec.size {
        Size::Full => filled(tensors),
        _ => (0..n).map(|shard| tensors.iter().skip(shard).step_by(n).collect()).collect(),
    };
    let filled = parts.len();
    ensure!(filled == n, "{n} shards asked for; at full size there are {filled}");
    let name = |shard| match n {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{shard:05}-of-{n:05}.safetensors"),
    };
    Ok((1..).map(name).zip(parts).collect())
}

/// As transformers splits: the next file begins where a tensor would overfill one.
fn filled(tensors: &[Tensor]) -> Vec<Vec<&Tensor>> {
    let mut files = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in tensors {
        bytes += 2 * tensor.n();
        if bytes > FULL_FILE {
            files.push(Vec::new());
            bytes = 2 * tensor.n();
        }
        files.last_mut().expect("one file at least").push(tensor);
    }
    files
}

/// `model.safetensors.index.json`.
pub fn index(files: &[(String, Vec<&Tensor>)]) -> Value {
    let all = || files.iter().flat_map(|(file, part)| part.iter().map(move |t| (t, file)));
    let total: usize = all().map(|(tensor, _)| 2 * tensor.n()).sum();
    let weight_map: BTreeMap<_, _> = all().map(|(tensor, file)| (&tensor.name, file)).collect();
    json!({ "metadata": { "total_size": total }, "weight_map": weight_map })
}

fn check_space(dir: &Path, wanted: u64) -> Result<()> {
    let disk = rustix::fs::statvfs(dir).with_context(|| format!("cannot ask {}", dir.display()))?;
    let free = disk.f_bavail * disk.f_frsize;
    ensure!(
        free >= wanted,
        "{} of weights do not fit in {}, whose disk has {} free; name a folder on another",
        BinaryBytes(wanted),
        dir.display(),
        BinaryBytes(free)
    );
    Ok(())
}

/// A tensor whose values are drawn when they are written.
struct Drawn<'a> {
    tensor: &'a Tensor,
    seed: u64,
    progress: ProgressBar,
}

impl View for Drawn<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = draw(self.tensor, self.seed);
        self.progress.inc(bytes.len() as u64);
        bytes.into()
    }

    fn data_len(&self) -> usize {
        2 * self.tensor.n()
    }
}

/// Values that a core draws at a time: their words stay in its cache.
const AT_A_TIME: usize = 4096;
/// A tensor's values, little-endian bf16.
fn draw(tensor: &Tensor, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 2 * tensor.n()];
    let (mut start, mut rest) = (tensor.start, bytes.as_mut_slice());
    for segment in &tensor.segments {
        let (own, others) = rest.split_at_mut(2 * segment.n);
        own.par_chunks_mut(2 * AT_A_TIME).enumerate().for_each(|(i, out)| {
            let deviates = deviates(seed, start + i * AT_A_TIME, out.len() / 2);
            for (out, x) in zip(out.as_chunks_mut().0, deviates) {
                *out = bf16::from_f32(segment.mean + segment.std * x).to_le_bytes();
            }
        });
        (start, rest) = (start + segment.n, others);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use openvla_convert::random::Segment;

    #[test]
    fn a_disk_too_small_is_told_before_the_work() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(check_space(dir, 1).is_ok());
        let error = check_space(dir, u64::MAX).unwrap_err().to_string();
        assert!(error.contains("16.00 EiB of weights do not fit in"), "{error}");
    }

    /// Across the chunks that cores draw, and across segments.
    #[test]
    fn a_tensor_continues_the_stream_where_the_one_before_it_ends() {
        let n = AT_A_TIME + 3;
        let segment = |n| Segment { n, mean: 0.0, std: 1.0 };
        let tensor = |start, segments: Vec<Segment>| {
            let shape = vec![segments.iter().map(|segment| segment.n).sum()];
            Tensor { name: String::new(), shape, segments, start }
        };
        let whole = draw(&tensor(5, vec![segment(2 * n)]), 7);
        assert_eq!(whole, draw(&tensor(5, vec![segment(1), segment(2 * n - 1)]), 7));
        assert_eq!(whole[2 * n..], draw(&tensor(5 + n, vec![segment(n)]), 7));
    }

    mod shared {
        use super::*;

        #[test]
        #[ignore = "needs ../shared"]
        fn every_tensor_is_in_the_published_file() -> Result<()> {
            let spec = Spec { size: Size::Full, shards: 3, ..Spec::EXAMPLE };
            let tensors = spec.tensors();
            let published = "../../shared/real_configs/openvla-7b/model.safetensors.index.json";
            let published = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(published))?;
            let published: Value = serde_json::from_slice(&published)?;
            assert_eq!(index(&files(&spec, &tensors)?), published);
            let other = Spec { shards: 4, ..spec };
            assert!(files(&other, &tensors).unwrap_err().to_string().contains("there are 3"));
            Ok(())
        }
    }
}
