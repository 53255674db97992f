//! What a picture and the statements about it cost: seconds of a score of one statement, and of many.
//!
//! ```sh
//! openvla-convert random --q4 -o random.gguf
//! cargo run --release -p openvla-doctor --example cost -- -m random.gguf
//! ```

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Parser;
use openvla::cli::{self, ModelArgs};
use openvla::image::{Rgb, RgbImage};
use openvla::{Policy, Statement};

/// Measures what the doctor asks of an OpenVLA.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Times that each is measured; the best counts
    #[arg(short = 'n', default_value_t = 3)]
    times: usize,
}

const INSTRUCTION: &str = "put eggplant into pot";

fn main() -> Result<()> {
    let args: Args = cli::start();
    let Policy::OpenVla(mut policy) = args.model.open()? else {
        bail!(
            "an OpenVLA-OFT has nothing to share: a picture's chunk costs what a control step does"
        );
    };
    let space = policy.config().actions;
    let image = RgbImage::from_fn(256, 256, |x, y| Rgb([x as u8, y as u8, (x ^ y) as u8]));
    // Motions as the doctor's hypotheses differ: in all numbers, or in the last alone.
    let motion = |i: i32| -> Vec<u32> {
        (0..7).map(|axis| space.id(f64::from((i * 31 + axis * 17) % 200 - 100) / 100.0)).collect()
    };
    let motions: Vec<Vec<u32>> = (0..26).map(motion).collect();
    let statement = |(instruction, tokens)| Statement { instruction, tokens };
    let words = ["put eggplant into pot.", ""].map(|words| (words, &motions[0][..]));
    let all = motions.iter().map(|tokens| (INSTRUCTION, &tokens[..])).chain(words);
    let statements: Vec<Statement<'_>> = all.map(statement).collect();
    let mut out = std::io::stdout().lock();
    for n in [1, 7, statements.len()] {
        let mut seconds = f64::INFINITY;
        for _ in 0..args.times {
            let start = Instant::now();
            policy.score(&image, &statements[..n])?;
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        writeln!(out, "{n:>3} statements about a picture: {seconds:.4} s")?;
    }
    Ok(())
}
