//! The report as one HTML file, pictures inside.

use std::fmt::Write;
use std::io::Cursor;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use openvla::image::{ImageFormat, RgbImage};

use crate::hypothesis::Cause;
use crate::picture::within;
use crate::report::Report;
use crate::verdict::Finding;

/// A picture to show, and what it is.
pub struct Figure {
    /// What is said under it.
    pub caption: String,
    /// The picture.
    pub image: RgbImage,
}

/// Sides of pictures that are shown, in pixels.
const SIDE: u32 = 320;

/// The page. Colors are the reader's system's, light or dark.
const STYLE: &str = "
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; max-width: 20rem }
img { width: 100%; image-rendering: pixelated } figcaption { font-size: .85rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .2rem .6rem; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } tr:nth-child(even) { background: #8881 }
.bar { height: .7rem; background: #0072b2 } .worse { background: #d55e00 }
.verdict { border-left: .4rem solid #0072b2; padding: .5rem 1rem; white-space: pre-wrap }
pre { overflow-x: auto }";

/// Writes the page.
///
/// # Errors
/// If a picture cannot be encoded.
pub fn page(report: &Report, figures: &[Figure]) -> Result<String> {
    let mut out = String::from("<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">");
    out += "<meta name=\"viewport\" content=\"width=device-width\"><title>openvla-doctor</title>";
    write!(out, "<style>{STYLE}</style><h1>openvla-doctor</h1>")?;
    if let Some(diagnosis) = &report.diagnosis {
        write!(out, "<p class=\"verdict\">{}</p>", escaped(&diagnosis.sentence()))?;
    }
    for Figure { caption, image } in figures {
        let mut png = Cursor::new(Vec::new());
        within(image, SIDE).write_to(&mut png, ImageFormat::Png)?;
        let (data, caption) = (STANDARD.encode(png.into_inner()), escaped(caption));
        write!(
            out,
            "<figure><img alt=\"{caption}\" src=\"data:image/png;base64,{data}\"><figcaption>{caption}</figcaption></figure>"
        )?;
    }
    if let Some(diagnosis) = &report.diagnosis {
        out += "<h2>Hypotheses</h2><table><tr><th>cause<th>what<th>nats<th>gain<th>first<th>";
        let most = diagnosis.hypotheses.iter().map(|f| f.gain.abs()).fold(1e-9, f64::max);
        for finding in &diagnosis.hypotheses {
            write_row(&mut out, finding, most)?;
        }
        out += "</table>";
    }
    write!(out, "<h2>Report</h2><pre>{}</pre></html>", escaped(&report.text()))?;
    Ok(out)
}

fn write_row(out: &mut String, finding: &Finding, most: f64) -> Result<()> {
    let Finding { cause, name, log_likelihood, gain, gain_error, first, .. } = finding;
    let (cause, name, width) =
        (escaped(&Cause::name(*cause)), escaped(name), 100.0 * gain.abs() / most);
    let class = if *gain < 0.0 { "bar worse" } else { "bar" };
    write!(
        out,
        "<tr><td>{cause}<td>{name}<td class=\"n\">{log_likelihood:.2}<td class=\"n\">{gain:.2} ± {gain_error:.2}\
         <td class=\"n\">{:.0} %<td style=\"width:25%\"><div class=\"{class}\" style=\"width:{width:.0}%\"></div>",
        100.0 * first
    )?;
    Ok(())
}

/// Text as HTML has it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
