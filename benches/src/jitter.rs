//! How evenly steps take their time, and what holds the slowest up: waiting for a core, or page faults.
//!
//! Linux counts both (`/proc/self/task/*/schedstat`, `/proc/self/stat`); they are read between steps, outside of
//! what is measured.

use std::fmt::Write;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::ProgressBar;

use crate::workload::Workload;

/// Steps before those that count: graphs are built, caches filled.
const WARM_UP: usize = 20;

/// One step.
#[derive(Debug, Clone, Copy)]
struct Step {
    ms: f64,
    /// How long threads that could run waited for a core: of all threads together, in milliseconds.
    waited: f64,
    /// Pages that were not mapped when they were touched.
    faults: u64,
}

/// What Linux has counted of this process so far.
struct Counters {
    waited: f64,
    faults: u64,
}

impl Counters {
    fn read() -> Result<Self> {
        let mut waited = 0.0;
        for task in std::fs::read_dir("/proc/self/task").context("cannot read /proc/self/task")? {
            // A thread may have ended since it was listed.
            let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else {
                continue;
            };
            let nanoseconds = text.split(' ').nth(1).and_then(|field| field.parse::<f64>().ok());
            waited += nanoseconds.context("/proc/self/task/*/schedstat has no second field")? / 1e6;
        }
        let stat =
            std::fs::read_to_string("/proc/self/stat").context("cannot read /proc/self/stat")?;
        // The program's name, in parentheses, may have blanks; minflt and majflt are fields 10 and 12 (proc(5)).
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let field = |i: usize| fields.get(i - 3).and_then(|field| field.parse::<u64>().ok());
        let faults = field(10).zip(field(12)).map(|(minor, major)| minor + major);
        Ok(Self { waited, faults: faults.context("/proc/self/stat has no field of page faults")? })
    }
}

/// A table of `n` steps: the median, the slowest of 100, 1000 and 10,000, and the slowest.
///
/// # Errors
/// What the model says, or if this system does not count what is asked.
pub fn table(workload: &mut Workload, n: usize, progress: &ProgressBar) -> Result<String> {
    progress.set_length(n as u64);
    for _ in 0..WARM_UP {
        workload.act()?;
    }
    let mut steps = Vec::with_capacity(n);
    let mut before = Counters::read()?;
    for _ in 0..n {
        let begun = Instant::now();
        workload.act()?;
        let ms = begun.elapsed().as_secs_f64() * 1e3;
        let after = Counters::read()?;
        let (waited, faults) = (after.waited - before.waited, after.faults - before.faults);
        steps.push(Step { ms, waited, faults });
        before = after;
        progress.inc(1);
    }
    steps.sort_by(|a, b| a.ms.total_cmp(&b.ms));
    Ok(report(&steps))
}

/// Of steps that are sorted by their time.
fn report(steps: &[Step]) -> String {
    let mut table = String::from(
        "| steps | at most | mean wait for a core | mean page faults |\n|---|---:|---:|---:|\n",
    );
    let mut from = 0;
    for (name, share) in [
        ("the faster half", 0.5),
        ("up to 90 %", 0.9),
        ("up to 99 %", 0.99),
        ("up to 99.9 %", 0.999),
        ("up to 99.99 %", 0.9999),
        ("the slowest", 1.0),
    ] {
        let to = (steps.len() as f64 * share).ceil() as usize;
        // Too few steps to tell these apart.
        let Some(last) = steps[from..to].last() else { continue };
        let n = (to - from) as f64;
        let waited = steps[from..to].iter().map(|step| step.waited).sum::<f64>() / n;
        let faults = steps[from..to].iter().map(|step| step.faults as f64).sum::<f64>() / n;
        let _ = writeln!(table, "| {name} | {:.2} ms | {waited:.2} ms | {faults:.1} |", last.ms);
        from = to;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_of_the_steps_that_the_rows_above_do_not_have() {
        let step =
            |i| Step { ms: f64::from(i), waited: if i > 900 { 2.0 } else { 0.0 }, faults: 1 };
        let steps: Vec<Step> = (1..=1000).map(step).collect();
        let table = report(&steps);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows[0], "| the faster half | 500.00 ms | 0.00 ms | 1.0 |");
        assert_eq!(rows[1], "| up to 90 % | 900.00 ms | 0.00 ms | 1.0 |");
        assert_eq!(rows[2], "| up to 99 % | 990.00 ms | 2.00 ms | 1.0 |");
        assert_eq!(rows[3], "| up to 99.9 % | 999.00 ms | 2.00 ms | 1.0 |");
        // Ten thousandths of a thousand steps are the last step, which no row below has again.
        assert_eq!(rows[4], "| up to 99.99 % | 1000.00 ms | 2.00 ms | 1.0 |");
        assert_eq!(rows.len(), 5);
    }

    #[test]
    fn linux_counts_what_is_asked() {
        let before = Counters::read().unwrap();
        let touched = vec![1_u8; 1 << 24];
        assert_eq!(touched.iter().map(|byte| u64::from(*byte)).sum::<u64>(), 1 << 24);
        let after = Counters::read().unwrap();
        assert!(after.faults > before.faults, "16 MiB that were not mapped before");
        assert!(after.waited >= before.waited);
    }
}
