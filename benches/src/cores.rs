//! How a step scales with a CPU's cores: each stage by 1, 2, 4, … threads, what threads wait for each other, and what
//! more of the same cores should make of it.
//!
//! ```text
//! serial  = (n · wall − cpu) / (n − 1)
//! wall(m) = max(serial + (cpu − serial) / m, bytes / bandwidth)
//! ```
//!
//! A stage took n threads `wall`, all of them together computed for `cpu`, and while one did what cannot be shared the
//! others waited. So m threads should take `wall(m)`, if no memory is shared by so many that each gets less of it than
//! one of the n did, but for the last term. `wall(1)` is predicted like the others, and measured: how far it is off is
//! how much of this can be believed.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use indicatif::ProgressBar;
use openvla::Options;
use openvla_convert::inspect::inspect;

use crate::machine::{cpu_ms, limits};
use crate::report::{row, significant};
use crate::subject::{Part, Run, Subject};
use crate::workload::INSTRUCTION;

/// Threads to project.
const PROJECTED: [usize; 5] = [4, 8, 16, 32, 64];

/// The fastest of some runs of a stage, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    wall: f64,
    /// Of all threads together.
    cpu: f64,
}

impl Cost {
    fn of(repetitions: usize, stage: Run<'_>) -> Result<Self> {
        stage()?; // graphs are built
        let mut least = Self { wall: f64::INFINITY, cpu: f64::INFINITY };
        for _ in 0..repetitions {
            let (begun, before) = (Instant::now(), cpu_ms());
            stage()?;
            let wall = begun.elapsed().as_secs_f64() * 1e3;
            if wall < least.wall {
                least = Self { wall, cpu: cpu_ms() - before };
            }
        }
        Ok(least)
    }

    /// The share of `n` threads' time in which they do not compute.
    fn waiting(self, n: usize) -> f64 {
        (1.0 - self.cpu / (n as f64 * self.wall)).max(0.0)
    }

    /// What one of `n` threads does while the others wait.
    fn serial(self, n: usize) -> f64 {
        let serial = (n as f64 * self.wall - self.cpu) / (n as f64 - 1.0);
        serial.clamp(0.0, self.cpu)
    }

    /// What `m` threads should take, where `n` took this, and `least` is what memory takes.
    fn projected(self, n: usize, m: usize, least: f64) -> f64 {
        let serial = self.serial(n);
        (serial + (self.cpu - serial) / m as f64).max(least)
    }
}

/// Tables of `repetitions` runs of each stage, with 1, 2, 4, … and all threads of `options`, and of the projection to
/// more, whose memory gives `bandwidth` bytes per second, or what a copy reaches here.
///
/// # Errors
/// What the model says, or if `options` have a GPU or a single thread.
pub fn tables(
    model: &Path,
    options: &Options,
    repetitions: usize,
    bandwidth: Option<f64>,
    progress: &ProgressBar,
) -> Result<String> {
    ensure!(options.devices.gpus()?.is_empty(), "cores are those of a CPU: try --device cpu");
    let all = options.n_threads;
    if all < 2 {
        bail!("one thread shares nothing: how a step scales takes two or more");
    }
    let counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n))
        .take_while(|n| *n < all)
        .chain([all])
        .collect();
    progress.set_length(counts.len() as u64);
    let file = inspect(model)?;
    let (mut measured, mut parts) = (Vec::new(), Vec::new());
    for n_threads in &counts {
        let mut options = options.clone();
        options.n_threads = *n_threads;
        let mut subject = Subject::open(model, &options, INSTRUCTION)?;
        parts = subject.stages(&file);
        let mut costs: Vec<(&str, Cost)> = Vec::new();
        subject.each_stage(|name, run| {
            costs.push((name, Cost::of(repetitions, run)?));
            Ok(())
        })?;
        measured.push(costs);
        progress.inc(1);
    }
    let bandwidth = match bandwidth {
        Some(bandwidth) => bandwidth,
        None => limits(options)?.copy_bytes_per_s,
    };
    let least = |name: &str| {
        let part = parts.iter().find(|part: &&Part| part.name == name);
        1e3 * part.map_or(0, |part| part.work.bytes) as f64 / bandwidth
    };
    let stages: Vec<Stage> = measured[0]
        .iter()
        .enumerate()
        .map(|(i, (name, _))| Stage {
            name,
            costs: measured.iter().map(|costs| costs[i].1).collect(),
            least: least(name),
        })
        .collect();
    Ok(report(&counts, &stages, bandwidth))
}

/// A stage, by each number of threads.
struct Stage {
    name: &'static str,
    costs: Vec<Cost>,
    /// Milliseconds that memory takes to give its weights.
    least: f64,
}

fn report(counts: &[usize], stages: &[Stage], bandwidth: f64) -> String {
    let ms = |ms: f64| significant(ms) + " ms";
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let head = |out: &mut String, names: Vec<String>| {
        row(out, &names);
        let rule = std::iter::once("---").chain(std::iter::repeat_n("---:", names.len() - 1));
        *out += &format!("|{}|\n", rule.collect::<Vec<_>>().join("|"));
    };
    let (all, last) = (counts[counts.len() - 1], counts.len() - 1);
    // A row is of one stage, or of all as the step.
    let rows = || {
        let each = stages.iter().map(|stage| (stage.name, std::slice::from_ref(stage)));
        each.chain([("step", stages)])
    };
    let sum = |of: &[Stage], value: &dyn Fn(&Stage) -> f64| of.iter().map(value).sum::<f64>();
    let wall = |of: &[Stage], i: usize| sum(of, &|stage| stage.costs[i].wall);
    let mut out = String::new();
    let of_threads = counts.iter().map(|n| format!("threads: {n}"));
    let names = ["speedup", "waiting", "serial"].map(str::to_owned);
    head(&mut out, [vec!["measured".to_owned()], of_threads.collect(), names.into()].concat());
    for (name, of) in rows() {
        let whole = Cost { wall: wall(of, last), cpu: sum(of, &|stage| stage.costs[last].cpu) };
        let walls = (0..counts.len()).map(|i| ms(wall(of, i)));
        let speedup = format!("{:.2}", wall(of, 0) / whole.wall);
        let serial = sum(of, &|stage| stage.costs[last].serial(all));
        let rest = [speedup, percent(whole.waiting(all)), ms(serial)];
        row(&mut out, &[vec![name.to_owned()], walls.collect(), rest.into()].concat());
    }
    out += &format!(
        "\nProjected from {all} threads, not measured, but for what 1 took; memory gives {:.1} GB/s.\n\n",
        bandwidth / 1e9
    );
    let of_threads = PROJECTED.iter().map(|n| format!("threads: {n}"));
    let names = ["projected", "threads: 1", "measured"].map(str::to_owned);
    head(&mut out, [Vec::from(names), of_threads.collect()].concat());
    for (name, of) in rows() {
        let at = |m, least: fn(&Stage) -> f64| {
            ms(sum(of, &|stage| stage.costs[last].projected(all, m, least(stage))))
        };
        let one = [name.to_owned(), at(1, |_| 0.0), ms(wall(of, 0))];
        row(
            &mut out,
            &[Vec::from(one), PROJECTED.map(|m| at(m, |stage| stage.least)).into()].concat(),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 ms that one thread does alone, 60 that are shared.
    #[test]
    fn what_cannot_be_shared_is_found_and_stays() {
        let by = |n: f64| Cost { wall: 10.0 + 60.0 / n, cpu: 70.0 };
        for n in [2, 4] {
            let cost = by(n as f64);
            assert!((cost.serial(n) - 10.0).abs() < 1e-9);
            for m in [1, 3, 64] {
                let wall = by(m as f64).wall;
                assert!((cost.projected(n, m, 0.0) - wall).abs() < 1e-9, "{n} and {m} threads");
            }
        }
        assert_eq!(by(2.0).waiting(2), 10.0 / 80.0);
        assert_eq!(by(2.0).projected(2, 64, 12.0), 12.0, "memory gives no more");
        let busy = Cost { wall: 10.0, cpu: 25.0 }; // clocks differ a little
        assert_eq!((busy.waiting(2), busy.serial(2)), (0.0, 0.0));
    }

    #[test]
    fn rows_are_stages_and_their_sum() {
        let stage = |name, wall| {
            let costs = vec![Cost { wall, cpu: wall }, Cost { wall: wall / 2.0, cpu: wall }];
            Stage { name, costs, least: 0.5 }
        };
        let said = report(&[1, 2], &[stage("vision", 32.0), stage("prefill", 64.0)], 5e10);
        for line in [
            "| measured | threads: 1 | threads: 2 | speedup | waiting | serial |",
            "| vision | 32.0 ms | 16.0 ms | 2.00 | 0.0 % | 0.000 ms |",
            "| step | 96.0 ms | 48.0 ms | 2.00 | 0.0 % | 0.000 ms |",
            "| vision | 32.0 ms | 32.0 ms | 8.00 ms | 4.00 ms | 2.00 ms | 1.00 ms | 0.500 ms |",
            "| step | 96.0 ms | 96.0 ms | 24.0 ms | 12.0 ms | 6.00 ms | 3.00 ms | 1.50 ms |",
        ] {
            assert!(said.lines().any(|found| found == line), "no {line:?} in\n{said}");
        }
        assert!(said.contains("memory gives 50.0 GB/s"), "{said}");
    }
}
