//! Projections: what a card that was not measured might reach, from published numbers.
//!
//! ```text
//! step    = preprocess + (vision + projector + prefill) FLOP / (int8 peak · e) + decode bytes / (bandwidth · d)
//! e, d    = what llama.cpp reaches on the card itself, with Llama-2-7B at Q4_0, where that is
//!           published: pp512 · FLOP of a row / int8 peak, tg128 · bytes of a step / bandwidth;
//!           else the range of those over all cards where it is
//! ```
//!
//! Preprocessing runs on the processor, and is taken as it was measured. FLOP and bytes are those of
//! the measured file ([`crate::work`]). The formula is about ggml as it is, with quantised files,
//! whose products run on int8 units; and it leaves out what is launched and copied between stages.

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
    /// Dense int8 operations per second of its tensor cores.
    int8: f64,
    /// Tokens per second of llama.cpp with Llama-2-7B at Q4_0: pp512, tg128.
    llama_cpp: Option<(f64, f64)>,
}

const fn card(
    name: &'static str,
    memory: f64,
    gb_per_s: f64,
    tops: f64,
    llama_cpp: Option<(f64, f64)>,
) -> Card {
    Card { name, memory, bandwidth: gb_per_s * 1e9, int8: tops * 1e12, llama_cpp }
}

/// Sizes and peaks: the vendor's data. Rates: as llama.cpp's users published them by mid-2026.
const CARDS: [Card; 8] = [
    card("RTX 3060", 12.0, 360.0, 102.0, Some((2408.0, 77.0))),
    card("RTX 3080", 10.0, 760.0, 238.0, Some((5570.0, 140.0))),
    card("RTX 3090", 24.0, 936.0, 284.0, Some((5175.0, 158.0))),
    card("RTX 4070", 12.0, 504.0, 233.0, None),
    card("RTX 4090", 24.0, 1008.0, 660.6, Some((11_993.0, 186.0))),
    card("RTX 5090", 32.0, 1792.0, 838.0, Some((14_073.0, 290.0))),
    card("AGX Orin 64GB", 64.0, 204.8, 85.0, None),
    card("H200", 141.0, 4800.0, 1979.0, None),
];

/// Of Llama-2-7B at Q4_0: 6.476 G weights in layers, and a head of 131 M at 6 bits for one row.
const LLAMA_FLOP_PER_ROW: f64 = 2.0 * 6.476e9;
const LLAMA_BYTES_PER_STEP: f64 = 6.476e9 * 4.5 / 8.0 + 131e6 * 6.5625 / 8.0;

impl Card {
    /// Shares of the int8 peak and of the bandwidth that llama.cpp reaches.
    fn reached(&self) -> Option<[f64; 2]> {
        let (prompt, tokens) = self.llama_cpp?;
        let (flop, bytes) = (prompt * LLAMA_FLOP_PER_ROW, tokens * LLAMA_BYTES_PER_STEP);
        Some([flop / self.int8, bytes / self.bandwidth])
    }
}

/// The least and the most of [`Card::reached`].
fn range() -> [[f64; 2]; 2] {
    let all: Vec<_> = CARDS.iter().filter_map(Card::reached).collect();
    let over = |i: usize, fold: fn(f64, f64) -> f64, start| {
        all.iter().map(|reached| reached[i]).fold(start, fold)
    };
    let least = [0, 1].map(|i| over(i, f64::min, f64::INFINITY));
    let most = [0, 1].map(|i| over(i, f64::max, 0.0));
    [least, most]
}

/// A Markdown table of projections for the named cards, or for all that are known.
///
/// # Errors
/// If a card is unknown, or the file is not quantised.
pub fn table(from: &Results, names: &[String]) -> Result<String> {
    let quantised = !["F32", "F16", "BF16"].contains(&from.type_name());
    ensure!(
        quantised,
        "projections are for quantised files, and this result is of {}",
        from.type_name()
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
    out += "| card, projected | vision to prefill | decode | step | Hz | from |\n";
    out += "|---|---:|---:|---:|---:|---|\n";
    for card in cards {
        row(&mut out, &line(from, card)?);
    }
    Ok(out)
}

fn line(from: &Results, card: &Card) -> Result<Vec<String>> {
    let bytes: u64 = from.memory.iter().map(|part| part.bytes).sum();
    if bytes as f64 > card.memory * 1e9 {
        let empty = || String::from("–");
        let why = format!("needs {:.1} GB of {}", bytes as f64 / 1e9, card.memory);
        return Ok(vec![card.name.into(), empty(), empty(), empty(), empty(), why]);
    }
    let (reached, basis) = match card.reached() {
        Some(reached) => (vec![reached], "llama.cpp on this card"),
        None => (range().into(), "llama.cpp on other cards, least to most"),
    };
    let preprocess = from.stage("preprocess")?.ms.p50;
    let mut flop = 0;
    for name in ["vision", "projector", "prefill"] {
        flop += from.stage(name)?.work.flop;
    }
    let bytes = from.stage("decode")?.work.bytes;
    let ms = |[e, d]: [f64; 2]| {
        [1e3 * flop as f64 / (card.int8 * e), 1e3 * bytes as f64 / (card.bandwidth * d)]
    };
    let ms: Vec<_> = reached.into_iter().map(ms).collect();
    let step = |[compute, decode]: &[f64; 2]| preprocess + compute + decode;
    let cell = |of: &dyn Fn(&[f64; 2]) -> f64| {
        ms.iter().map(|ms| significant(of(ms))).collect::<Vec<_>>().join(" … ")
    };
    Ok(vec![
        card.name.to_owned(),
        format!("{} ms", cell(&|ms| ms[0])),
        format!("{} ms", cell(&|ms| ms[1])),
        format!("{} ms", cell(&step)),
        cell(&|ms| 1e3 / step(ms)),
        basis.to_owned(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fifth to a third of the int8 peak, most of the bandwidth. A typing error would show.
    #[test]
    fn llama_cpp_reaches_less_than_the_peaks() {
        for card in &CARDS {
            let Some([e, d]) = card.reached() else { continue };
            assert!((0.2..0.35).contains(&e) && (0.6..0.85).contains(&d), "{}: {e} {d}", card.name);
        }
    }
}
