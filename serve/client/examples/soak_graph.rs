//! What a server took during a soak, as a picture: `openvla-client soak --json` on stdin, SVG on stdout.

use std::fmt::Write as _;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Of a panel, in pixels, and what is around it.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 110.0;
const LEFT: f64 = 70.0;
const GAP: f64 = 44.0;

/// A panel's title, the number of a sample, and by how much it is divided.
const PANELS: [(&str, &str, f64); 4] = [
    ("resident memory, MB", "resident_bytes", 1e6),
    ("descriptors", "descriptors", 1.0),
    ("threads", "threads", 1.0),
    ("load of the machine", "load", 1.0),
];

fn main() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let report: Value = serde_json::from_str(&text).context("a report of soak --json is wanted")?;
    let samples = report["samples"].as_array().filter(|samples| samples.len() > 1);
    let samples = samples.context("the report has no samples: --spawn takes them")?;
    let number = |value: &Value, key: &str| value[key].as_f64().with_context(|| key.to_owned());
    let most = samples.last().map_or(Ok(0.0), |last| number(last, "minutes"))?;
    ensure!(most > 0.0, "the samples have no times");
    let (width, height) = (LEFT + WIDTH + 20.0, PANELS.len() as f64 * (HEIGHT + GAP) + 20.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>"
    );
    for (i, (title, key, unit)) in PANELS.iter().enumerate() {
        let top = 30.0 + i as f64 * (HEIGHT + GAP);
        let values = samples.iter().map(|sample| Ok(number(sample, key)? / unit));
        let values = values.collect::<Result<Vec<f64>>>()?;
        let highest = values.iter().copied().fold(1.0, f64::max) * 1.1;
        let mut points = String::new();
        for (sample, value) in samples.iter().zip(&values) {
            let x = LEFT + WIDTH * number(sample, "minutes")? / most;
            write!(points, "{x:.1},{:.1} ", top + HEIGHT * (1.0 - value / highest))?;
        }
        let (bottom, right) = (top + HEIGHT, LEFT + WIDTH);
        write!(
            svg,
            "<text x=\"{LEFT}\" y=\"{}\">{title}</text><path d=\"M{LEFT} {top}V{bottom}H{right}\" fill=\"none\" \
             stroke=\"#888\"/><polyline points=\"{points}\" fill=\"none\" stroke=\"#0072b2\"/>",
            top - 8.0
        )?;
        for (at, label) in [(bottom, "0".to_owned()), (top, format!("{highest:.0}"))] {
            let (x, y) = (LEFT - 6.0, at + 4.0);
            write!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"end\">{label}</text>")?;
        }
        for (x, label) in [(LEFT, "0".to_owned()), (right, format!("{most:.0} min"))] {
            let y = bottom + 15.0;
            write!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{label}</text>")?;
        }
    }
    svg.push_str("</svg>\n");
    std::io::stdout().write_all(svg.as_bytes())?;
    Ok(())
}
