//! Results as tables: one measurement in full, or many side by side.

use std::fmt::Write;

use anyhow::Result;
use indicatif::HumanCount;

use crate::results::{Chunks, Load, Results, Stage};

/// One measurement as Markdown, as llama-bench prints it, with what it was measured on above.
pub fn markdown(r: &Results) -> String {
    let mut out = format!(
        "{} {}, {} parameters, {} bytes; {} ({}); {} steps; {} of {}\n\n",
        r.model.name,
        r.type_name(),
        HumanCount(r.model.parameters),
        HumanCount(r.model.bytes),
        r.machine_label(),
        r.origin.machine.os,
        r.repetitions,
        r.origin.commit,
        r.origin.date
    );
    out += "| stage | rows | p50 ms | p99 ms | Hz | GB/s | of a copy | GFLOP/s | of a product |\n";
    out += "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n";
    for stage in &r.stages {
        let rows = stage.rows.map_or(String::new(), |n| n.to_string());
        let mut cells = vec![stage.name.clone(), rows];
        cells.extend([stage.ms.p50, stage.ms.p99, stage.hz()].map(significant));
        cells.extend(share(stage.bytes_per_s(), r.limits.copy_bytes_per_s));
        cells.extend(share(stage.flop_per_s(), r.limits.flop_per_s()));
        row(&mut out, &cells);
    }
    let limits = [
        ("a copy of 256 MiB", r.limits.copy_bytes_per_s, 5),
        ("a product, F32", r.limits.product_f32_flop_per_s, 7),
        ("a product, F16", r.limits.product_f16_flop_per_s, 7),
    ];
    for (name, rate, column) in limits {
        let mut cells = [const { String::new() }; 9];
        (cells[0], cells[column]) = (name.to_owned(), significant(rate / 1e9));
        row(&mut out, &cells);
    }
    out += "\n| memory | bytes |\n|---|---:|\n";
    for part in &r.memory {
        row(&mut out, &[part.component.clone(), part.bytes.to_string()]);
    }
    let peak = r.peak_bytes.map_or("not known".to_owned(), |bytes| bytes.to_string());
    row(&mut out, &["process, at its peak".to_owned(), peak]);
    out += "\n| start | open ms | first step ms | bytes from disk |\n|---|---:|---:|---:|\n";
    for (name, load) in [(cold_name(r), &r.load_cold), ("warm", &r.load_warm)] {
        let read = load.disk_bytes.map_or("not known".to_owned(), |n| n.to_string());
        row(
            &mut out,
            &[name.into(), significant(load.open_ms), significant(load.first_step_ms), read],
        );
    }
    out
}

/// Whether the file really came from a disk is up to the system.
fn cold_name(r: &Results) -> &'static str {
    match r.load_cold {
        Load { disk_bytes: Some(read), .. } if read >= r.model.bytes / 2 => "cold",
        Load { disk_bytes: None, .. } => "cold, if the system dropped its pages",
        _ => "not cold: the system kept its pages",
    }
}

/// One measurement as CSV: a line for each stage, with what it was measured on in each.
pub fn csv(r: &Results) -> String {
    let mut out =
        "model,type,model_bytes,parameters,device,cpu,os,threads,kernels,commit,date,stage,rows,n,\
        min_ms,p50_ms,mean_ms,p99_ms,max_ms,hz,bytes,flop,bytes_per_s,flop_per_s,\
        copy_bytes_per_s,product_flop_per_s\n"
            .to_owned();
    let (m, model) = (&r.origin.machine, &r.model);
    for stage in &r.stages {
        let Stage { name, rows, ms, work } = stage;
        let text = [&model.name, r.type_name()].map(quoted);
        let numbers = [ms.min, ms.p50, ms.mean, ms.p99, ms.max, stage.hz()].map(|x| x.to_string());
        let rates = [
            stage.bytes_per_s(),
            stage.flop_per_s(),
            r.limits.copy_bytes_per_s,
            r.limits.flop_per_s(),
        ]
        .map(|x| x.to_string());
        let cells: Vec<String> = text
            .into_iter()
            .chain([model.bytes.to_string(), model.parameters.to_string()])
            .chain([&m.device, &m.cpu, &m.os].map(|text| quoted(text)))
            .chain([
                m.threads.to_string(),
                m.kernels.clone(),
                quoted(&r.origin.commit),
                quoted(&r.origin.date),
                quoted(name),
            ])
            .chain([rows.map_or(String::new(), |n| n.to_string()), ms.n.to_string()])
            .chain(numbers)
            .chain([work.bytes.to_string(), work.flop.to_string()])
            .chain(rates)
            .collect();
        let _ = writeln!(out, "{}", cells.join(","));
    }
    out
}

/// Many measurements as Markdown, one in a line: what the README shows. Those of OpenVLA-OFT have a table of their own.
///
/// # Errors
/// If one lacks a stage.
pub fn table(all: &[Results]) -> Result<String> {
    let (oft, openvla): (Vec<_>, Vec<_>) = all.iter().partition(|r| r.model.chunks.is_some());
    let mut tables = Vec::new();
    if !openvla.is_empty() {
        let mut out = "| machine | type | Hz | step | preprocess | vision | projector | prefill | \
            decode | memory at its peak |\n"
            .to_owned();
        out += "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n";
        for r in openvla {
            let hz = significant(r.stage("step")?.hz());
            let mut cells = vec![r.machine_label(), r.type_name().to_owned(), hz];
            cells.extend(times(r, ["preprocess", "vision", "projector", "prefill", "decode"])?);
            row(&mut out, &cells);
        }
        tables.push(out);
    }
    if !oft.is_empty() {
        let mut out =
            "| machine | OpenVLA-OFT | rows | actions per second | step | preprocess | vision | \
            projector | forward | head | memory at its peak |\n"
                .to_owned();
        out += "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n";
        for r in oft {
            let Some(Chunks { cameras, actions }) = r.model.chunks else { continue };
            let s = if cameras == 1 { "" } else { "s" };
            let what = format!("{}, {cameras} camera{s}, chunks of {actions}", r.type_name());
            let rows = r.stage("forward")?.rows.unwrap_or_default();
            let rate = significant(actions as f64 * r.stage("step")?.hz());
            let mut cells = vec![r.machine_label(), what, rows.to_string(), rate];
            cells.extend(times(r, ["preprocess", "vision", "projector", "forward", "head"])?);
            row(&mut out, &cells);
        }
        tables.push(out);
    }
    Ok(tables.join("\n"))
}

/// Cells of the whole step, the stages and the memory.
fn times(r: &Results, stages: [&str; 5]) -> Result<Vec<String>> {
    let ms = |name| Ok(format!("{} ms", significant(r.stage(name)?.ms.p50)));
    let mut cells: Vec<String> =
        std::iter::once("step").chain(stages).map(ms).collect::<Result<_>>()?;
    let peak = r.peak_bytes.map(|n| format!("{:.2} GB", n as f64 / 1e9));
    cells.push(peak.unwrap_or_else(|| "not known".to_owned()));
    Ok(cells)
}

/// A line of a Markdown table.
pub fn row(out: &mut String, cells: &[String]) {
    let cells: Vec<_> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

/// Three digits, or all before the point.
pub fn significant(x: f64) -> String {
    match x.abs() {
        100.0.. => format!("{x:.0}"),
        10.0.. => format!("{x:.1}"),
        1.0.. => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}

/// In billions, and in percent of a limit; nothing where nothing was counted.
fn share(rate: f64, limit: f64) -> [String; 2] {
    match rate {
        0.0 => [String::new(), String::new()],
        _ => [significant(rate / 1e9), format!("{:.0} %", 100.0 * rate / limit)],
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}
