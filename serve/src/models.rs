//! Where models come from: the file that the program was started with, and those that take its place while it serves.

use std::path::Path;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, ensure};
use openvla::cli::ModelArgs;
use openvla::image::RgbImage;
use openvla::{Config, Gguf, OpenVla, Proof, Request, Session, oft};
use openvla_convert::{sha256, verify};
use sha2::{Digest, Sha256};

use crate::memory;
use crate::observation::{Motion, Observation};
use crate::policy::{ModelInfo, Policy, Turn, one_by_one};

/// Opens models. Whatever opens one alone is one, too.
pub trait Models: Send + Sync + 'static {
    /// A model of whatever kind.
    type Policy: Policy + Send + 'static;

    /// Opens a file, or the one that the program was started with.
    ///
    /// # Errors
    /// If it cannot be opened.
    fn open(&self, file: Option<&Path>) -> Result<Self::Policy>;

    /// Opens a file that is to take the place of what is `served`, which goes on meanwhile.
    ///
    /// # Errors
    /// If it cannot be opened, or cannot take that place.
    fn open_beside(&self, file: Option<&Path>, served: &ModelInfo) -> Result<Self::Policy> {
        let policy = self.open(file)?;
        served.check_successor(&policy.info())?;
        Ok(policy)
    }
}

impl<P: Policy + Send + 'static, F: Fn() -> Result<P> + Send + Sync + 'static> Models for F {
    type Policy = P;

    fn open(&self, _: Option<&Path>) -> Result<P> {
        self()
    }
}

/// Model files, all opened as the command line says.
pub struct Files(pub ModelArgs);

/// The policy of a file.
pub struct FilePolicy {
    policy: openvla::Policy,
    info: ModelInfo,
}

impl Files {
    fn args(&self, file: Option<&Path>) -> ModelArgs {
        file.map_or_else(|| self.0.clone(), |file| self.0.of(file))
    }
}

impl FilePolicy {
    fn load(args: &ModelArgs, file: &Gguf) -> Result<Self> {
        let policy = openvla::Policy::load(file, &args.options())?;
        Ok(Self { info: describe(policy.config(), file), policy })
    }
}

impl Models for Files {
    type Policy = FilePolicy;

    fn open(&self, file: Option<&Path>) -> Result<FilePolicy> {
        let args = self.args(file);
        FilePolicy::load(&args, &args.file()?)
    }

    fn open_beside(&self, file: Option<&Path>, served: &ModelInfo) -> Result<FilePolicy> {
        let args = self.args(file);
        let file = args.file()?;
        let options = args.options();
        served.check_successor(&describe(&options.config(&file)?, &file))?;
        memory::check(options.host_bytes(&file)? + served.scratch)?;
        check_threads(args.threads() + 1)?;
        // The file's own, whatever the command line says about pictures.
        let config = Config::read(&file)?;
        let proof = Proof::read(&file, &config)?;
        ensure!(
            !proof.checksums.is_empty(),
            "{} has no checksums; write it again with this version's openvla-convert",
            file.file()
        );
        let damaged = proof.damaged(&file, |_| ());
        ensure!(
            damaged.is_empty(),
            "{} is damaged, in {}: get it again from where it came from",
            file.file(),
            damaged.join(", ")
        );
        let mut loaded = FilePolicy::load(&args, &file)?;
        let limit = verify::limit(&file);
        for case in verify::cases(&config, &proof, &mut loaded.policy)? {
            ensure!(
                case.error <= limit,
                "{} does not act as its checkpoint does: the relative error of its reference case {:?} is {:.3}, more \
                 than {limit}",
                file.file(),
                case.instruction,
                case.error
            );
        }
        Ok(loaded)
    }
}

fn describe(config: &Config, file: &Gguf) -> ModelInfo {
    ModelInfo::new(config, file.file().to_owned(), fingerprint(file))
}

/// What tells files apart: a hash of all that comes before the weights, of which each has its checksum there.
fn fingerprint(file: &Gguf) -> String {
    let start = file.tensors().iter().map(|tensor| tensor.range.start).min();
    let header = &file.bytes()[..start.unwrap_or(file.bytes().len())];
    sha256::hex(&Sha256::digest(header)[..8])
}

impl Policy for FilePolicy {
    fn info(&self) -> ModelInfo {
        self.info.clone().with_memory(&self.policy.usage())
    }

    fn act(
        &mut self,
        session: &mut Session,
        observation: &Observation,
        unnorm_key: Option<&str>,
    ) -> openvla::Result<Motion> {
        let Observation { image, wrists, state, instruction, .. } = observation;
        match &mut self.policy {
            openvla::Policy::OpenVla(policy) => {
                policy.act_in(session, image, instruction, unnorm_key).map(Motion::from)
            }
            openvla::Policy::Oft(policy) => {
                let images: Vec<&RgbImage> = [image].into_iter().chain(wrists).collect();
                let seen = oft::Observation { images: &images, state: state.as_deref() };
                policy.act(&seen, instruction, unnorm_key).map(Motion::from)
            }
        }
    }

    fn max_batch(&self) -> usize {
        match &self.policy {
            openvla::Policy::OpenVla(policy) if policy.shares_passes() => OpenVla::MAX_BATCH,
            _ => 1,
        }
    }

    fn act_each(
        &mut self,
        turns: &mut [Turn<'_>],
        answer: &mut dyn FnMut(usize, openvla::Result<Motion>),
    ) {
        let openvla::Policy::OpenVla(policy) = &mut self.policy else {
            return one_by_one(self, turns, answer);
        };
        let requests = turns.iter_mut().map(|Turn { session, observation, unnorm_key }| {
            let Observation { image, instruction, .. } = observation;
            Request { session, image, instruction, unnorm_key: *unnorm_key }
        });
        let mut requests: Vec<_> = requests.collect();
        policy.act_each(&mut requests, |at, result| answer(at, result.map(Motion::from)));
    }
}

/// Starts so many threads at a time and ends them. Where ggml's or tokio's cannot be started, the program would end or
/// hang.
///
/// # Errors
/// If there cannot be as many.
pub fn check_threads(n: usize) -> Result<()> {
    let gate = Mutex::new(());
    thread::scope(|scope| {
        let _closed = gate.lock(); // so that none ends before all have started
        (0..n).try_for_each(|_| {
            thread::Builder::new().spawn_scoped(scope, || drop(gate.lock())).map(drop)
        })
    })
    .with_context(|| {
        format!(
            "the server needs {n} threads, and no more may be started here; raise the container's \
             pids limit or `ulimit -u`, or lower --threads"
        )
    })
}
