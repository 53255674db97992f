//! Results as a picture: control steps per second by machine and type, as Figure 6 of the OpenVLA
//! paper (arXiv 2406.09246) has them.

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::significant;
use crate::results::Results;

/// Of the picture, in pixels: a bar, the space between machines, and the height.
const BAR: u32 = 64;
const GAP: u32 = 48;
const HEIGHT: u32 = 360;

/// Colors that color-blind people can tell apart. ref: Okabe and Ito, 2008
pub const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(240, 228, 66),
];

/// An SVG with a bar for each result, grouped by machine. `all` is sorted, as
/// [`Results::read_all`] gives it. Results of OpenVLA-OFT are left out: a step of theirs is several actions.
///
/// # Errors
/// If no result is left, one lacks the whole step, or the picture cannot be drawn.
pub fn svg(all: &[Results]) -> Result<String> {
    let all: Vec<&Results> = all.iter().filter(|r| r.model.chunks.is_none()).collect();
    ensure!(
        !all.is_empty(),
        "none of these is a result of OpenVLA; `table` shows those of OpenVLA-OFT"
    );
    let groups: Vec<&[&Results]> =
        all.chunk_by(|a, b| a.machine_label() == b.machine_label()).collect();
    let mut types: Vec<&str> = all.iter().map(|r| r.type_name()).collect();
    types.sort_unstable();
    types.dedup();
    let hz: Vec<f64> = all.iter().map(|r| Ok(r.stage("step")?.hz())).collect::<Result<_>>()?;
    let most = hz.iter().copied().fold(0.0, f64::max);
    // A machine's name wants room too.
    let names = groups.iter().map(|group| 7 * group[0].machine_label().len() as u32);
    let widths: Vec<u32> = groups
        .iter()
        .zip(names)
        .map(|(group, name)| (BAR * group.len() as u32).max(name))
        .collect();
    let width = widths.iter().map(|width| width + GAP).sum::<u32>();

    let mut out = String::new();
    let root = SVGBackend::with_string(&mut out, (width + 100, HEIGHT)).into_drawing_area();
    let drawn = (|| {
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption("control steps per second", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(0..width as i32, 0.0..most * 1.15)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .y_desc("Hz")
            .y_label_formatter(&|hz| significant(*hz))
            .light_line_style(WHITE)
            .draw()?;
        let centered = |v| ("sans-serif", 13).into_text_style(&root).pos(Pos::new(HPos::Center, v));
        let (mut left, mut hz) = (GAP as i32 / 2, hz.into_iter());
        for (group, width) in groups.iter().zip(widths) {
            let middle = left + width as i32 / 2;
            let mut at = middle - (BAR as usize * group.len()) as i32 / 2;
            for (result, hz) in group.iter().zip(&mut hz) {
                let (kind, next) = (result.type_name(), at + BAR as i32);
                let color = types.iter().position(|t| *t == kind).unwrap_or(0) % COLORS.len();
                let corners = [(at + 4, 0.0), (next - 4, hz)];
                chart.draw_series([Rectangle::new(corners, COLORS[color].filled())])?;
                let above = ((at + next) / 2, hz);
                let words = format!("{kind}: {}", significant(hz));
                chart.draw_series([Text::new(words, above, centered(VPos::Bottom))])?;
                at = next;
            }
            let (x, y) = chart.backend_coord(&(middle, 0.0));
            let name = group[0].machine_label();
            root.draw_text(&name, &centered(VPos::Top), (x, y + 10))?;
            left += (width + GAP) as i32;
        }
        root.present()
    })();
    drawn.ok().context("the picture cannot be drawn")?;
    drop(root);
    Ok(out)
}
