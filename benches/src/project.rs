//! Projections: what a card that was not measured might reach, from published numbers and counted launches.
//!
//! ```text
//! stage  = max(operations / (peak · e), bytes / (bandwidth · 0.92)) + launches · t
//! step   = preprocess + vision + projector + prefill + decode
//! ```
//!
//! Operations and bytes are those of the measured file ([`crate::work`]), preprocessing is taken as it was
//! measured, and launches are those of ggml's CUDA host side for openvla-7b, counted by `tests/null_cuda`.
//! What llama.cpp's users published for Llama-2-7B at Q4_0 gives the other two, on the card itself or else as
//! a range over all cards:
//!
//! - `t`, a launch with its gap and what little it does besides products: what tg128 has left after the weights
//!   were read at 92 % of the bandwidth;
//! - `e`, the share of the int8 peak that quantized products reach: what pp512 has left after its launches.
//!   Products of 16-bit files are cuBLAS's, for which half to four fifths of the peak are assumed.
//!
//! It assumes that the towers' smaller products reach the same share as the Llama's, that Hopper does with the
//! kernels that were made for Ampere what other cards do, and that steps are replayed as captured graphs. A
//! stage that takes more than the table's longer time on a card proves one of these wrong.

use anyhow::{Result, bail, ensure};

use crate::report::{row, significant};
use crate::results::Results;

/// What is published of a card.
struct Card {
    name: &'static str,
    /// GB.
    memory: f64,
    /// Bytes per second of its memory.
    bandwidth: f64,
    /// Dense operations per second of its tensor cores: of int8, and of 16-bit floats added in 32 bits.
    int8: f64,
    half: f64,
    /// Tokens per second of llama.cpp with Llama-2-7B at Q4_0: pp512, tg128.
    llama_cpp: Option<(f64, f64)>,
    /// Steps per second that we want of it at 4 bits.
    goal: Option<f64>,
}

const fn card(
    name: &'static str,
    [memory, gb_per_s, int8, half]: [f64; 4],
    llama_cpp: Option<(f64, f64)>,
    goal: Option<f64>,
) -> Card {
    let (bandwidth, int8, half) = (gb_per_s * 1e9, int8 * 1e12, half * 1e12);
    Card { name, memory, bandwidth, int8, half, llama_cpp, goal }
}

/// Sizes and peaks: the vendor's data. Rates: as llama.cpp's users published them by mid-2026.
const CARDS: [Card; 10] = [
    card("RTX 3060", [12.0, 360.0, 102.0, 25.5], Some((2408.0, 77.0)), Some(8.0)),
    card("RTX 3080", [10.0, 760.0, 238.0, 59.5], Some((5570.0, 140.0)), None),
    card("RTX 3090", [24.0, 936.0, 284.0, 71.0], Some((5175.0, 158.0)), Some(20.0)),
    card("RTX 4070", [12.0, 504.0, 233.0, 58.3], None, Some(15.0)),
    card("RTX 4090", [24.0, 1008.0, 660.6, 165.2], Some((11_993.0, 186.0)), Some(30.0)),
    card("RTX 5090", [32.0, 1792.0, 838.0, 209.5], Some((14_073.0, 290.0)), Some(50.0)),
    card("AGX Orin 64GB", [64.0, 204.8, 85.0, 42.5], None, Some(6.0)),
    card("Jetson Thor", [128.0, 273.0, 517.0, 258.5], None, None),
    card("H100", [80.0, 3350.0, 1979.0, 989.5], None, None),
    card("H200", [141.0, 4800.0, 1979.0, 989.5], None, Some(50.0)),
];

/// The share of a memory's bandwidth that reading many weights in a row reaches.
const READ: f64 = 0.92;

/// Of Llama-2-7B at Q4_0: 6.476 G weights in layers, and a head of 131 M at 6 bits for one row.
const LLAMA_FLOP_PER_ROW: f64 = 2.0 * 6.476e9;
const LLAMA_BYTES_PER_STEP: f64 = 6.476e9 * 4.5 / 8.0 + 131e6 * 6.5625 / 8.0;

/// Launches of each stage of openvla-7b at Q4_K_M, of decoding those of one token, on a card like an RTX 4090.
/// Counted by `tests/null_cuda`, which fails if they change.
pub const LAUNCHES: [(&str, usize); 4] =
    [("vision", 1230), ("projector", 14), ("prefill", 738), ("decode", 485)];

/// Launches of llama.cpp's graph, whose products are separate: of a prefill and of a decode step.
const LLAMA_LAUNCHES: [f64; 2] = [996.0, 616.0];

/// What a card makes of its peaks.
#[derive(Debug, Clone, Copy)]
struct Rates {
    /// Share of the peak that products reach.
    products: f64,
    /// Seconds for each launch.
    launch: f64,
}

impl Card {
    /// For quantized files, where llama.cpp's rates are published.
    fn published(&self) -> Option<Rates> {
        let (prompt, tokens) = self.llama_cpp?;
        let read = LLAMA_BYTES_PER_STEP / (self.bandwidth * READ);
        let [of_prefill, of_step] = LLAMA_LAUNCHES;
        let launch = (1.0 / tokens - read) / of_step;
        let products = 512.0 / prompt - of_prefill * launch;
        Some(Rates { products: 512.0 * LLAMA_FLOP_PER_ROW / products / self.int8, launch })
    }

    /// From the fastest to the slowest that is likely, and why.
    fn rates(&self, is_quantized: bool) -> ([Rates; 2], &'static str) {
        let all: Vec<_> = CARDS.iter().filter_map(Card::published).collect();
        let range = |of: fn(&Rates) -> f64| {
            let least = all.iter().map(of).fold(f64::INFINITY, f64::min);
            [least, all.iter().map(of).fold(0.0, f64::max)]
        };
        let launch = match self.published() {
            Some(own) => [own.launch; 2],
            None => range(|rates| rates.launch),
        };
        let (products, basis) = match (is_quantized, self.published()) {
            (true, Some(own)) => ([own.products; 2], "llama.cpp on this card"),
            (true, None) => (range(|rates| rates.products), "llama.cpp on other cards"),
            (false, _) => ([0.5, 0.8], "an assumed share of the peak"),
        };
        let best = Rates { products: products[1], launch: launch[0] };
        let worst = Rates { products: products[0], launch: launch[1] };
        ([best, worst], basis)
    }
}

/// A stage's time and what most of it is spent on.
struct Projected {
    stage: &'static str,
    seconds: f64,
    bound: &'static str,
}

fn stages(from: &Results, card: &Card, peak: f64, rates: Rates) -> Result<Vec<Projected>> {
    let project = |(stage, launches): (&'static str, usize)| {
        let measured = from.stage(stage)?;
        let times = if stage == "decode" { measured.rows.unwrap_or_default() as f64 } else { 1.0 };
        let products = measured.work.flop as f64 / (peak * rates.products);
        let read = measured.work.bytes as f64 / (card.bandwidth * READ);
        let launched = launches as f64 * times * rates.launch;
        let (work, bound) =
            if products > read { (products, "products") } else { (read, "reading weights") };
        let bound = if launched > work { "launches" } else { bound };
        Ok(Projected { stage, seconds: work + launched, bound })
    };
    LAUNCHES.into_iter().map(project).collect()
}

/// A Markdown table of projections for the named cards, or for all that are known.
///
/// # Errors
/// If a card is unknown, or the file is of F32 or an OpenVLA-OFT's.
pub fn table(from: &Results, names: &[String]) -> Result<String> {
    ensure!(
        from.model.chunks.is_none(),
        "projections are for OpenVLA, and this result is of an OpenVLA-OFT, whose launches were not counted"
    );
    let mut cards = Vec::new();
    for name in names {
        let Some(card) = CARDS.iter().find(|card| card.name.eq_ignore_ascii_case(name)) else {
            let known = CARDS.map(|card| card.name).join(", ");
            bail!("nothing is known of the card {name:?}; there are {known}");
        };
        cards.push(card);
    }
    if names.is_empty() {
        cards.extend(&CARDS);
    }
    let mut out = format!(
        "Projections, not measurements: {} {}, ggml as it is.\n\n",
        from.model.name,
        from.type_name()
    );
    out += "| card, projected | vision | projector | prefill | decode | step | Hz | goal | held back by | from |\n";
    out += "|---|---:|---:|---:|---:|---:|---:|---:|---|---|\n";
    for card in cards {
        row(&mut out, &line(from, card)?);
    }
    Ok(out)
}

fn line(from: &Results, card: &Card) -> Result<Vec<String>> {
    let goal = card.goal.map_or("–".into(), |hz| format!("{hz}"));
    // The file's weights are among what the device holds.
    let held = from.memory.iter().filter(|part| !part.component.starts_with("weights: "));
    let bytes: u64 = held.map(|part| part.bytes).sum();
    if bytes as f64 > card.memory * 1e9 {
        let why = format!("needs {:.1} GB of {}", bytes as f64 / 1e9, card.memory);
        let empty = vec![String::from("–"); 6];
        return Ok([vec![card.name.into()], empty, vec![goal, "memory".into(), why]].concat());
    }
    let peak = match from.type_name() {
        "F32" => bail!("projections are for files of 16 bits and less, and this result is of F32"),
        "F16" | "BF16" => None,
        _ => Some(card.int8),
    };
    let (rates, basis) = card.rates(peak.is_some());
    let preprocess = from.stage("preprocess")?.ms.p50;
    let [best, worst] = rates.map(|rates| stages(from, card, peak.unwrap_or(card.half), rates));
    let (best, worst) = (best?, worst?);
    let range = |low: f64, high: f64| {
        let (low, high) = (significant(low), significant(high));
        if low == high { low } else { format!("{low} … {high}") }
    };
    let sum = |all: &[Projected]| preprocess + 1e3 * all.iter().map(|s| s.seconds).sum::<f64>();
    let mut cells = vec![card.name.to_owned()];
    for (low, high) in best.iter().zip(&worst) {
        cells.push(range(1e3 * low.seconds, 1e3 * high.seconds) + " ms");
    }
    let (low, high) = (sum(&best), sum(&worst));
    cells.push(range(low, high) + " ms");
    cells.push(range(1e3 / high, 1e3 / low));
    let slowest = worst.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let slowest = slowest.map(|s| format!("{}: {}", s.stage, s.bound)).unwrap_or_default();
    cells.extend([goal, slowest, basis.to_owned()]);
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fifth to a third of the int8 peak; a few microseconds for each launch. A typing error would show.
    #[test]
    fn what_llama_cpp_reaches_is_plausible() {
        for card in &CARDS {
            let Some(Rates { products, launch }) = card.published() else { continue };
            let is_plausible = (0.2..0.4).contains(&products) && (1e-6..4e-6).contains(&launch);
            assert!(is_plausible, "{}: {products} {launch}", card.name);
        }
    }

    /// Its own published rates come back out of the model.
    #[test]
    fn the_model_gives_what_it_was_made_from() {
        for card in &CARDS {
            let (Some(rates), Some((prompt, tokens))) = (card.published(), card.llama_cpp) else {
                continue;
            };
            let [of_prefill, of_step] = LLAMA_LAUNCHES.map(|n| n * rates.launch);
            let decode = LLAMA_BYTES_PER_STEP / (card.bandwidth * READ) + of_step;
            let prefill = 512.0 * LLAMA_FLOP_PER_ROW / (card.int8 * rates.products) + of_prefill;
            assert!((1.0 / decode / tokens - 1.0).abs() < 1e-9, "{}", card.name);
            assert!((512.0 / prefill / prompt - 1.0).abs() < 1e-9, "{}", card.name);
        }
    }
}
