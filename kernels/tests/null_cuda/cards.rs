//! Cards to run on, and what happened there.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use crate::act;

/// The GPUs of a process.
#[derive(Clone)]
pub struct Cards {
    pub count: usize,
    /// Compute capability times ten.
    pub capability: usize,
    pub multiprocessors: usize,
    /// Of each, in MB.
    pub memory: Vec<usize>,
    /// As `--device` takes it.
    pub device: String,
    pub n_gpu_layers: Option<usize>,
    /// The allocation from which on there is no memory left.
    pub refuse: Option<usize>,
    /// The launch from which on every call fails.
    pub gone: Option<usize>,
    /// What else is wrong, as the runtime's variable.
    pub fault: Option<(&'static str, usize)>,
}

impl Default for Cards {
    /// One like an RTX 4090.
    fn default() -> Self {
        Self {
            count: 1,
            capability: 89,
            multiprocessors: 128,
            memory: vec![24_576],
            device: "cuda".to_owned(),
            n_gpu_layers: None,
            refuse: None,
            gone: None,
            fault: None,
        }
    }
}

impl Cards {
    /// One for each number of MB.
    pub fn of(memory: &[usize]) -> Self {
        Self { count: memory.len(), memory: memory.to_vec(), ..Self::default() }
    }

    /// Runs a model on them, in a process of its own.
    pub fn run(&self, module: &Path, model: &Path) -> Run {
        let log = tempfile::NamedTempFile::new().unwrap();
        let memory: Vec<_> = self.memory.iter().map(usize::to_string).collect();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(act::WORD).args([module, model]).arg(&self.device);
        command.arg(self.n_gpu_layers.map_or("all".to_owned(), |n| n.to_string()));
        command.env("NULLCUDA_LOG", log.path());
        command.env("NULLCUDA_COUNT", self.count.to_string());
        command.env("NULLCUDA_CC", self.capability.to_string());
        command.env("NULLCUDA_SMS", self.multiprocessors.to_string());
        command.env("NULLCUDA_MEM_MB", memory.join(","));
        for (variable, value) in [("NULLCUDA_REFUSE", self.refuse), ("NULLCUDA_GONE", self.gone)] {
            value.map(|value| command.env(variable, value.to_string()));
        }
        self.fault.map(|(variable, value)| command.env(variable, value.to_string()));
        let output = command.output().unwrap();
        Run::new(output, &std::fs::read_to_string(log.path()).unwrap())
    }
}

/// What a process did on its cards.
pub struct Run {
    pub output: Output,
    /// Runs of each stage, in their order.
    calls: BTreeMap<String, Vec<Call>>,
    /// The most bytes that each card held.
    pub peaks: BTreeMap<usize, usize>,
    /// Allocations, and launches: kernels that run by themselves, and graphs.
    pub n_malloc: usize,
    pub n_launch: usize,
}

/// One run of a stage.
#[derive(Default)]
pub struct Call {
    /// What the host had the cards do, but for kernels.
    pub events: Vec<String>,
    /// Kernels and copies that were launched one by one, and those that were captured, by name.
    pub launched: BTreeMap<String, usize>,
    pub captured: BTreeMap<String, usize>,
}

impl Call {
    /// Events that begin with a word.
    pub fn count(&self, word: &str) -> usize {
        self.events.iter().filter(|event| event.starts_with(word)).count()
    }
}

impl Run {
    fn new(output: Output, log: &str) -> Self {
        let (calls, peaks) = (BTreeMap::new(), BTreeMap::new());
        let mut run = Self { output, calls, peaks, n_malloc: 0, n_launch: 0 };
        let mut stage = String::new();
        for line in log.lines() {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            if word == "STAGE" {
                stage = rest.to_owned();
                run.calls.entry(stage.clone()).or_default().push(Call::default());
                continue;
            }
            assert_ne!(word, "BAD", "in stage {stage}: {line}");
            run.n_malloc += usize::from(rest.starts_with("malloc ") || rest.starts_with("refuse "));
            if let Some((_, used)) = rest.split_once(", then ") {
                let (_, device) = rest.split_once(" on ").unwrap();
                let device = device.split(',').next().unwrap().parse().unwrap();
                let peak = run.peaks.entry(device).or_default();
                *peak = used.parse::<usize>().unwrap().max(*peak);
            }
            let is_kernel = rest.starts_with("kernel ");
            run.n_launch += usize::from(is_kernel || rest.starts_with("replay "));
            let Some(call) = run.calls.get_mut(&stage).and_then(|calls| calls.last_mut()) else {
                continue; // ggml's start
            };
            let name = if is_kernel { rest["kernel ".len()..].to_owned() } else { rest.to_owned() };
            match (word, is_kernel) {
                ("CAPTURE", _) => *call.captured.entry(name).or_default() += 1,
                (_, true) => *call.launched.entry(name).or_default() += 1,
                (_, false) => call.events.push(name),
            }
        }
        run
    }

    /// What the process said on stderr.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    pub fn calls(&self, stage: &str) -> &[Call] {
        self.calls.get(stage).map_or(&[], Vec::as_slice)
    }

    /// Launches of a stage: what was captured of it.
    pub fn launches(&self, stage: &str) -> usize {
        self.calls(stage)[1].captured.values().sum()
    }

    /// Checks that it ended well.
    pub fn ended_well(self) -> Self {
        assert!(self.output.status.success(), "{:?}: {}", self.output.status, self.said());
        self
    }

    /// Checks that it ended in words and exit code 1.
    pub fn ended_in_words(self, words: &[&str]) -> Self {
        let said = self.said();
        assert_eq!(self.output.status.code(), Some(1), "{:?}: {said}", self.output.status);
        assert!(said.contains("error: ") && !said.contains("panicked"), "{said}");
        for word in words {
            assert!(said.contains(word), "{word:?} is missing in: {said}");
        }
        self
    }
}
