//! What several robots cost that are served together: [`openvla::OpenVla::act_all`].

use std::fmt::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use openvla::{Action, OpenVla, Request, Session};

use crate::machine::cpu_ms;
use crate::workload::Workload;

/// How many are served together.
const ROBOTS: [usize; 4] = [1, 2, 4, OpenVla::MAX_BATCH];

/// The least of some steps, in milliseconds.
#[derive(Clone, Copy)]
struct Step {
    /// From the first picture to the last motion.
    whole: f64,
    /// After the first tokens.
    decode: f64,
    /// Of the processor, all threads together: what other programs disturb least.
    processor: f64,
}

/// A table of `n` steps for each number of robots, in turns. The least counts, since other programs only make steps
/// slower.
///
/// # Errors
/// What the model says, or if a robot gets other tokens than alone.
pub fn table(workload: &mut Workload, n: usize) -> Result<String> {
    let wanted = workload.act()?.tokens;
    let none = f64::INFINITY;
    let mut least = ROBOTS.map(|_| Step { whole: none, decode: none, processor: none });
    for round in 0..=n {
        for (robots, least) in ROBOTS.into_iter().zip(&mut least) {
            let (begun, processor) = (Instant::now(), cpu_ms());
            let actions = together(workload, robots)?;
            let whole = begun.elapsed().as_secs_f64() * 1e3;
            let processor = cpu_ms() - processor;
            for Action { tokens, .. } in &actions {
                ensure!(*tokens == wanted, "{tokens:?} of {robots} robots, {wanted:?} alone");
            }
            let decode = actions.iter().map(|action| action.timing_ms.decode).fold(0.0, f64::max);
            // The first round builds graphs.
            if round > 0 {
                least.whole = least.whole.min(whole);
                least.decode = least.decode.min(decode);
                least.processor = least.processor.min(processor);
            }
        }
    }
    let mut table = String::from(
        "| robots | step | decode | step, for each robot | decode | processor | robots · Hz |\n\
         |---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for (robots, Step { whole, decode, processor }) in ROBOTS.into_iter().zip(least) {
        let n = robots as f64;
        let (each, hz) = ([whole, decode, processor].map(|ms| ms / n), 1e3 * n / whole);
        writeln!(
            table,
            "| {robots} | {whole:.0} ms | {decode:.0} ms | {:.0} ms | {:.0} ms | {:.0} ms | {hz:.3} |",
            each[0], each[1], each[2]
        )?;
    }
    Ok(table)
}

fn together(workload: &mut Workload, n: usize) -> Result<Vec<Action>> {
    let Workload { policy, image, instruction, key, .. } = workload;
    let mut sessions = vec![Session::default(); n];
    let request =
        |session| Request { session, image: &*image, instruction, unnorm_key: Some(key.as_str()) };
    let mut requests: Vec<_> = sessions.iter_mut().map(request).collect();
    Ok(policy.act_all(&mut requests).into_iter().collect::<openvla::Result<_>>()?)
}
