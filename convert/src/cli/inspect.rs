//! `inspect`: describes a model file, as text or as JSON.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use indicatif::{BinaryBytes, HumanCount};
use openvla::{ActionCard, Gripper, Profile};
use openvla_convert::inspect::{Inspection, inspect};

/// With at most this many data sets, all are shown in full.
const FEW: usize = 3;

/// Describes a model file: its origin, tensors, preprocessing and data sets.
#[derive(clap::Args)]
pub struct Inspect {
    /// The file
    model: PathBuf,
    /// Print one JSON object with everything, for programs
    #[arg(long)]
    json: bool,
    /// Show one data set's actions in full, by its name (as --unnorm-key)
    #[arg(long, value_name = "KEY", conflicts_with = "json")]
    dataset: Option<String>,
}

pub fn run(args: &Inspect) -> Result<()> {
    let text = report(args).map_err(|error| anyhow!(printable(&format!("{error:#}"))))?;
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

fn report(args: &Inspect) -> Result<String> {
    let report = inspect(&args.model)?;
    if args.json {
        let text: String = serde_json::to_string_pretty(&report)?.chars().map(json_char).collect();
        return Ok(text + "\n");
    }
    let shown = match &args.dataset {
        Some(key) => {
            let found = report.statistics.select(Some(key)).map_err(|error| {
                let hint = error.hint().unwrap_or_default();
                anyhow!("{error}; {hint}")
            })?;
            vec![found.0]
        }
        None if report.datasets.len() <= FEW => {
            report.datasets.keys().map(String::as_str).collect()
        }
        None => Vec::new(),
    };
    let mut out = String::new();
    facts(&report, &mut out)?;
    out.push('\n');
    tensors(&report, &mut out)?;
    image(&report, &mut out)?;
    datasets(&report, &shown, &mut out)?;
    Ok(out)
}

/// The file's general metadata, one line each, without what is unknown.
fn facts(report: &Inspection, out: &mut String) -> Result<()> {
    let general = &report.general;
    writeln!(out, "{}", printable(&general.name))?;
    let known = |parts: &[&Option<String>]| {
        let known: Vec<&str> = parts.iter().filter_map(|part| part.as_deref()).collect();
        known.join(", ")
    };
    let source = match (&general.source.repository, &general.source.revision) {
        (Some(repository), Some(revision)) => format!("{repository} at {revision}"),
        _ => known(&[&general.source.repository, &general.source.url]),
    };
    let base = general.base_models.iter().map(|base| {
        known(&[&Some(base.name.clone()), &base.version, &base.organization, &base.repo_url])
    });
    let size = BinaryBytes(report.file_bytes);
    let dtype = report.r#type.map_or_else(|| format!("type {}", general.file_type), str::to_owned);
    let converter = general.converter_version.as_ref().map(|v| format!("openvla-convert {v}"));
    let made_of = match report.source_files.len() {
        0 => "files that it does not name".to_owned(),
        n => format!("{n} files, whose SHA-256 it has (--json)"),
    };
    let carried = |yes, what| if yes { what } else { "none" };
    for (label, value) in [
        ("file", format!("{}, {size}, {dtype}", report.file)),
        ("what", known(&[&general.description])),
        ("version", general.version.clone()),
        ("tuned for", known(&[&general.finetune])),
        ("tuned from", base.collect::<Vec<_>>().join("; ")),
        ("made by", known(&[&general.organization])),
        ("code", known(&[&general.repo_url])),
        ("license", known(&[&general.license, &general.license_name, &general.license_link])),
        ("source", source),
        ("made of", made_of),
        ("converter", known(&[&converter])),
        ("checksums", carried(report.checksums, "in the file").to_owned()),
        ("test cases", carried(report.reference_cases, "in the file").to_owned()),
    ] {
        if !value.is_empty() {
            writeln!(out, "  {label:<11} {}", printable(&value))?;
        }
    }
    Ok(())
}

fn tensors(report: &Inspection, out: &mut String) -> Result<()> {
    let mut row = |[component, dtype, n, parameters, bytes]: [&str; 5]| {
        writeln!(out, "  {component:<15} {dtype:<7} {n:>7} {parameters:>13} {bytes:>11}")
    };
    row(["component", "type", "tensors", "parameters", "bytes"])?;
    for group in &report.tensors {
        let [name, n] = [printable(&group.component), group.tensors.to_string()];
        let parameters = HumanCount(group.parameters).to_string();
        row([&name, &group.r#type, &n, &parameters, &BinaryBytes(group.bytes).to_string()])?;
    }
    let n: u64 = report.tensors.iter().map(|group| group.tensors).sum();
    let parameters = HumanCount(report.parameters).to_string();
    row(["all", "", &n.to_string(), &parameters, &BinaryBytes(report.tensor_bytes).to_string()])?;
    Ok(())
}

fn image(report: &Inspection, out: &mut String) -> Result<()> {
    let image = &report.image;
    let (size, patch) = (image.size, image.patch_size);
    let fill = image.letterbox_fill.map(|fill| format!(" with {fill:?}")).unwrap_or_default();
    if let Some(oft) = &report.oft {
        writeln!(out, "\n{}", printable(&oft.summary))?;
    }
    writeln!(out, "\nimage: {size} x {size} by {}{fill}, patches of {patch}", image.resize)?;
    if image.profile != Profile::Raw.name() || image.center_crop {
        let crop = if image.center_crop { "their center cropped" } else { "not cropped" };
        writeln!(out, "  first prepared as `{}`, {crop}", image.profile)?;
    }
    for tower in &image.towers {
        let name = printable(&tower.name);
        writeln!(out, "  {name:<14} mean {:?}, std {:?}", tower.mean, tower.std)?;
    }
    let template = printable(&report.prompt.template);
    writeln!(out, "prompt: {template}, then id {}", report.prompt.suffix_token_id)?;
    Ok(())
}

/// The `shown` data sets in full, or else one line each.
fn datasets(report: &Inspection, shown: &[&str], out: &mut String) -> Result<()> {
    if shown.is_empty() {
        writeln!(out, "\n{} data sets; --dataset KEY shows one", report.datasets.len())?;
        for (name, card) in &report.datasets {
            writeln!(out, "  {}: {}", printable(name), summary(card))?;
        }
        return Ok(());
    }
    for (name, card) in report.datasets.iter().filter(|(name, _)| shown.contains(&name.as_str())) {
        writeln!(out, "\ndata set {}: {}", printable(name), summary(card))?;
        writeln!(out, "  {:<8} {:>12} {:>12}  {:<12} scaled", "", "from q01", "to q99", "unit")?;
        for d in &card.dimensions {
            let (name, unit) = (printable(&d.name), printable(&d.unit));
            let scaled = if d.normalized { "yes" } else { "no: -1..1 as it is" };
            writeln!(out, "  {name:<8} {:>12.5} {:>12.5}  {unit:<12} {scaled}", d.q01, d.q99)?;
        }
        if let Some(note) = &card.note {
            writeln!(out, "  note: {}", printable(note))?;
        }
    }
    Ok(())
}

fn summary(card: &ActionCard) -> String {
    let rate = card.rate_hz.map_or("rate unknown".to_owned(), |hz| format!("{hz} Hz"));
    let gripper = match card.gripper {
        Some(Gripper { open, closed }) => format!("gripper {open} open, {closed} closed"),
        None => "gripper unknown".to_owned(),
    };
    format!("{} dimensions, {rate}, {gripper}", card.dimensions.len())
}

/// Escapes control characters: a file's strings must not command the terminal.
pub fn printable(text: &str) -> String {
    let escape = |c: char| match c {
        '"' | '\'' => c.to_string(),
        c => c.escape_debug().to_string(),
    };
    text.chars().map(escape).collect()
}

/// Escapes the control characters that JSON leaves as they are: all but ASCII's.
pub fn json_char(c: char) -> String {
    match c {
        '\n' => c.to_string(),
        c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_file_cannot_command_a_terminal() {
        let text = "It's\u{1b}[2J\u{9b}1m\u{202e}\r\n\u{7f} \"ü\"";
        let shown = r#"It's\u{1b}[2J\u{9b}1m\u{202e}\r\n\u{7f} "ü""#;
        assert_eq!(printable(text), shown);
        let json: String = serde_json::to_string(text).unwrap().chars().map(json_char).collect();
        assert!(!json.contains(char::is_control), "{json:?}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }
}
