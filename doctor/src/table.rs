//! Tables of numbers in files: `.csv`, `.jsonl` and numpy's `.npy`.
//!
//! out  a row for each line, or for each index of the array's first dimension; all equally long, all finite

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The largest file that is read: a million rows of numbers, and more.
const MAX_BYTES: u64 = 256 << 20;

/// Endings of files that can be read, in the order that they are looked for.
const ENDINGS: [&str; 3] = ["jsonl", "csv", "npy"];

/// The file `stem.jsonl`, `stem.csv` or `stem.npy` of a folder, if there is one.
///
/// # Errors
/// If there are several.
pub fn find(folder: &Path, stem: &str) -> Result<Option<PathBuf>> {
    let paths = ENDINGS.map(|ending| folder.join(format!("{stem}.{ending}")));
    let mut there = paths.into_iter().filter(|path| path.is_file());
    let (first, second) = (there.next(), there.next());
    if let (Some(first), Some(second)) = (&first, &second) {
        bail!("{} and {} are both there; keep one", first.display(), second.display());
    }
    Ok(first)
}

/// The bytes of a regular file that is not too large.
///
/// # Errors
/// What the system says, or that it is something else: a device may have no end, and a pipe no writer.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let cannot = || format!("cannot read {}", path.display());
    let found = path.metadata().with_context(cannot)?;
    ensure!(found.is_file(), "{} is not a regular file", path.display());
    let bytes = found.len();
    ensure!(
        bytes <= MAX_BYTES,
        "{} has {bytes} bytes; at most {MAX_BYTES} are read",
        path.display()
    );
    std::fs::read(path).with_context(cannot)
}

/// What a file holds: rows of numbers, and of JSON lines what else they say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    /// The numbers.
    pub rows: Vec<Vec<f64>>,
    /// The objects that they were in, or nothing.
    pub objects: Vec<Value>,
}

impl Table {
    /// Reads a file by its ending. Objects of JSON lines have the numbers under `key`.
    ///
    /// # Errors
    /// If it cannot be read, a row has more or fewer numbers than the first, or one is not a finite number.
    pub fn read(path: &Path, key: &str) -> Result<Self> {
        let bytes = read_bytes(path)?;
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let text = || std::str::from_utf8(&bytes).context("it is not UTF-8");
        let table = match ending {
            "jsonl" => text().and_then(|text| Self::jsonl(text, key)),
            "csv" => text().and_then(csv),
            _ => npy(&bytes),
        };
        let table = table.and_then(Self::checked);
        table.with_context(|| format!("cannot use {}", path.display()))
    }

    fn jsonl(text: &str, key: &str) -> Result<Self> {
        let mut table = Self::default();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let at = || format!("line {}", i + 1);
            // Python writes NaN, which is no JSON.
            let value: Value = serde_json::from_str(line).with_context(at)?;
            let list = if value.is_object() { &value[key] } else { &value };
            let list = list.as_array().with_context(|| {
                format!("line {} has no list of numbers, and none under \"{key}\"", i + 1)
            })?;
            let number = |value: &Value| value.as_f64();
            let row: Option<_> = list.iter().map(number).collect();
            table.rows.push(row.with_context(|| format!("line {}: not all are numbers", i + 1))?);
            table.objects.push(value);
        }
        Ok(table)
    }

    fn checked(self) -> Result<Self> {
        let n = self.rows.first().map_or(0, Vec::len);
        ensure!(n > 0, "it holds no numbers");
        for (i, row) in self.rows.iter().enumerate() {
            ensure!(row.len() == n, "row {i} has {} numbers, the first has {n}", row.len());
            if let Some(axis) = row.iter().position(|x| !x.is_finite()) {
                bail!("number {axis} of row {i} is {}; finite ones are needed", row[axis]);
            }
        }
        Ok(self)
    }
}

/// Numbers between commas; a first line of names is skipped.
fn csv(text: &str) -> Result<Table> {
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row: std::result::Result<Vec<f64>, _> =
            line.split(',').map(|number| number.trim().parse()).collect();
        match row {
            Ok(row) => rows.push(row),
            Err(_) if i == 0 => {} // names
            Err(_) => bail!("line {} is not numbers between commas: {line:.60?}", i + 1),
        }
    }
    Ok(Table { rows, objects: Vec::new() })
}

/// An array of two dimensions of floats, in C order, as `np.save` writes it.
fn npy(bytes: &[u8]) -> Result<Table> {
    let wanted = "an array [frames, numbers] of float32 or float64 in C order is needed";
    let rest = bytes.strip_prefix(b"\x93NUMPY").context("it is not numpy's")?;
    let (n_length, rest) = match rest.split_first_chunk() {
        Some(([1, _], rest)) => (2, rest),
        Some(([2 | 3, _], rest)) => (4, rest),
        _ => bail!("its version of numpy's format is unknown"),
    };
    let (length, rest) = rest.split_at_checked(n_length).context("it is cut off")?;
    let length = length.iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte));
    let (header, data) = rest.split_at_checked(length).context("it is cut off")?;
    let header = std::str::from_utf8(header).context("its header is not text")?;
    // A literal of Python's: {'descr': '<f8', 'fortran_order': False, 'shape': (12, 7), }
    let value = |key: &str| {
        let (_, rest) = header.split_once(&format!("'{key}':"))?;
        let end =
            if rest.trim_start().starts_with('(') { rest.find(')')? } else { rest.find(',')? };
        Some(rest[..end].trim().trim_start_matches('(').trim_matches('\''))
    };
    let shape = value("shape").with_context(|| format!("its header has no shape; {wanted}"))?;
    let shape: Vec<usize> = shape
        .split(',')
        .filter(|n| !n.trim().is_empty())
        .map(|n| n.trim().parse().with_context(|| format!("its shape is ({shape})")))
        .collect::<Result<_>>()?;
    let (&[n_row, n], Some("False")) = (&shape[..], value("fortran_order")) else {
        bail!("its shape is {shape:?}; {wanted}");
    };
    let numbers: Vec<f64> = match value("descr") {
        Some("<f4") => {
            let number = |bytes: &[u8; 4]| f64::from(f32::from_le_bytes(*bytes));
            data.as_chunks().0.iter().map(number).collect()
        }
        Some("<f8") => data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        other => bail!("its type is {}; {wanted}", other.unwrap_or("unknown")),
    };
    let is_whole = n > 0 && n_row.checked_mul(n) == Some(numbers.len());
    ensure!(is_whole, "it holds {} numbers, not {n_row} times {n}", numbers.len());
    let rows = numbers.chunks(n).map(<[f64]>::to_vec).collect();
    Ok(Table { rows, objects: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy_of(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    }

    #[test]
    fn the_three_formats_hold_the_same() {
        let wanted = vec![vec![1.0, -2.5], vec![0.0, 3.0]];
        let csv = csv("dx, dy\n1,-2.5\n\n0, 3\n").unwrap();
        let jsonl =
            Table::jsonl("[1, -2.5]\n{\"action\": [0, 3], \"time\": 7}\n", "action").unwrap();
        let doubles: Vec<u8> =
            wanted.iter().flatten().flat_map(|x: &f64| x.to_le_bytes()).collect();
        let floats: Vec<u8> =
            wanted.iter().flatten().flat_map(|x| (*x as f32).to_le_bytes()).collect();
        let npy8 = npy(&npy_of("<f8", "(2, 2)", &doubles)).unwrap();
        let npy4 = npy(&npy_of("<f4", "(2, 2)", &floats)).unwrap();
        for table in [&csv, &jsonl, &npy8, &npy4] {
            assert_eq!(table.rows, wanted);
        }
        assert_eq!(jsonl.objects[1]["time"], 7);
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let said = |result: Result<Table>| {
            let error = result.and_then(Table::checked).unwrap_err();
            format!("{error:#}")
        };
        assert!(said(csv("1,2\n3\n")).contains("row 1 has 1 numbers, the first has 2"));
        assert!(said(csv("1,2\n3,NaN\n")).contains("number 1 of row 1 is NaN"));
        assert!(said(csv("1,2\n3,x\n")).contains("line 2"));
        assert!(said(csv("dx,dy\n")).contains("no numbers"));
        assert!(said(Table::jsonl("{\"motion\": [1]}", "action")).contains("\"action\""));
        assert!(said(Table::jsonl("[1, NaN]", "action")).contains("line 1"));
        assert!(said(npy(b"\x93NUMPY\x01\x00\xff")).contains("cut off"));
        assert!(said(npy(&npy_of("<i8", "(1, 1)", &[0; 8]))).contains("type is <i8"));
        assert!(said(npy(&npy_of("<f8", "(1,)", &[0; 8]))).contains("shape is [1]"));
        let huge = format!("({}, 7)", usize::MAX);
        assert!(said(npy(&npy_of("<f8", &huge, &[0; 8]))).contains("holds 1 numbers"));
    }
}
