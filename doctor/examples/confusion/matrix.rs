//! What was injected against what was said.

use std::collections::BTreeMap;
use std::fmt::Write;

use openvla_doctor::hypothesis::Cause;
use serde_json::{Value, json};

use crate::fault::FAULTS;

/// How often each verdict was given, by fault and the fault's kind.
#[derive(Default)]
pub struct Matrix(BTreeMap<(Cause, String), BTreeMap<Cause, usize>>);

impl Matrix {
    /// Counts a verdict.
    pub fn note(&mut self, fault: Cause, kind: &str, said: Cause) {
        *self.0.entry((fault, kind.to_owned())).or_default().entry(said).or_default() += 1;
    }

    /// The verdicts on a fault, of all its kinds.
    fn row(&self, fault: Cause) -> BTreeMap<Cause, usize> {
        let mut row = BTreeMap::new();
        for (_, said) in self.0.iter().filter(|((known, _), _)| *known == fault) {
            said.iter().for_each(|(cause, n)| *row.entry(*cause).or_default() += n);
        }
        row
    }

    /// Faults with their counts, and each kind's.
    pub fn json(&self) -> Value {
        let named = |row: &BTreeMap<Cause, usize>| -> Value {
            row.iter().map(|(cause, n)| (cause.name(), json!(n))).collect()
        };
        let kinds = |fault: Cause| -> Value {
            let kinds = self.0.iter().filter(|((known, _), _)| *known == fault);
            kinds.map(|((_, kind), said)| (kind.clone(), named(said))).collect()
        };
        let rows = FAULTS.iter().map(|fault| {
            (
                fault.name(),
                json!({ "verdicts": named(&self.row(*fault)), "by_kind": kinds(*fault) }),
            )
        });
        rows.collect()
    }

    /// A line for each fault, and one for each of its kinds.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let words = |row: &BTreeMap<Cause, usize>| {
            let words: Vec<_> =
                row.iter().map(|(cause, n)| format!("{} {n}", cause.name())).collect();
            words.join(", ")
        };
        for ((fault, kind), said) in &self.0 {
            let _ = writeln!(out, "{:<17} {kind:<24} {}", fault.name(), words(said));
        }
        out
    }

    /// A square for each fault and verdict, the darker the more.
    pub fn svg(&self) -> String {
        const SIDE: usize = 44;
        const LEFT: usize = 130;
        const TOP: usize = 120;
        let said: Vec<Cause> = FAULTS.into_iter().chain([Cause::Unknown]).collect();
        let (width, height) = (LEFT + SIDE * said.len() + 10, TOP + SIDE * FAULTS.len() + 10);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
             font-size=\"13\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"8\" y=\"16\" font-size=\"14\">injected (rows), named (columns), percent of episodes</text>\n"
        );
        for (x, cause) in said.iter().enumerate() {
            let (x, y) = (LEFT + SIDE * x + SIDE / 2, TOP - 8);
            let name = cause.name();
            let _ =
                writeln!(out, "<text transform=\"translate({x},{y}) rotate(-55)\">{name}</text>");
        }
        for (y, fault) in FAULTS.iter().enumerate() {
            let row = self.row(*fault);
            let n = row.values().sum::<usize>().max(1);
            let (top, name) = (TOP + SIDE * y, fault.name());
            let middle = top + SIDE / 2 + 5;
            let right = LEFT - 8;
            let _ = writeln!(
                out,
                "<text x=\"{right}\" y=\"{middle}\" text-anchor=\"end\">{name}</text>"
            );
            for (x, cause) in said.iter().enumerate() {
                let count = row.get(cause).copied().unwrap_or(0);
                let share = count as f64 / n as f64;
                let color = if cause == fault { "#0072b2" } else { "#d55e00" };
                let left = LEFT + SIDE * x;
                let opacity = if count == 0 { 0.0 } else { 0.1 + 0.9 * share };
                let _ = writeln!(
                    out,
                    "<rect x=\"{left}\" y=\"{top}\" width=\"{SIDE}\" height=\"{SIDE}\" fill=\"{color}\" \
                     fill-opacity=\"{opacity:.2}\" stroke=\"#ccc\"/>"
                );
                if count > 0 {
                    let (center, ink) =
                        (left + SIDE / 2, if share > 0.5 { "white" } else { "black" });
                    let _ = writeln!(
                        out,
                        "<text x=\"{center}\" y=\"{middle}\" text-anchor=\"middle\" fill=\"{ink}\">{:.0}</text>",
                        100.0 * share
                    );
                }
            }
        }
        out + "</svg>\n"
    }
}
