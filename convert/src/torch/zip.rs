//! ZIP archives whose entries are stored as they are, so that they can be mapped.
//!
//! Sizes are those of the directory at the end of the file: torch writes local headers before it
//! knows them, as zeros, and appends them to the data. Stricter than the format: the directory and
//! its end records are the last bytes of the file, without a comment or a gap, as torch has them.
//!
//! ref: PKWARE APPNOTE 6.3.10, 4.3

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::bytes::Bytes;

/// An archive whose directory was read and checked.
pub struct Archive<F> {
    file: F,
    /// Where the directory starts: all entries end before it.
    end: u64,
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    /// Where its local header starts.
    header: u64,
    size: u64,
}

/// The largest directory that is read. Each storage takes about a hundred bytes.
const MAX_DIRECTORY: u64 = 1 << 24;

const END: &[u8; 4] = b"PK\x05\x06";
const END_BYTES: u64 = 22;
const LOCATOR: &[u8; 4] = b"PK\x06\x07";
const LOCATOR_BYTES: u64 = 20;
const END_64: &[u8; 4] = b"PK\x06\x06";
const END_64_BYTES: u64 = 56;
const CENTRAL: &[u8; 4] = b"PK\x01\x02";
const CENTRAL_BYTES: u64 = 46;
const LOCAL: &[u8; 4] = b"PK\x03\x04";
const LOCAL_BYTES: u64 = 30;
/// How torch's files started before version 1.6: a pickle.
const PICKLE: u8 = 0x80;

impl<F: Read + Seek> Archive<F> {
    /// Reads an archive's directory.
    ///
    /// # Errors
    /// What is damaged, compressed or encrypted, or there twice.
    pub fn open(mut file: F) -> Result<Self> {
        let length = file.seek(SeekFrom::End(0)).context("it cannot be read")?;
        if length > 0 && read_at(&mut file, 0, 1)? == [PICKLE] {
            bail!(
                "it is a bare pickle, as torch wrote it before version 1.6; load it with a newer \
                 torch and torch.save it again"
            );
        }
        let Range { start, end } = directory(&mut file, length)?;
        let mut archive = Self { file, end: start, entries: BTreeMap::new() };
        let directory = read_at(&mut archive.file, start, end - start)?;
        let mut rest = Bytes(&directory);
        while !rest.0.is_empty() {
            let (name, entry) = central(&mut rest).context("its directory is damaged")?;
            ensure!(entry.header < start, "the entry {name:?} starts beyond the data");
            ensure!(!archive.entries.contains_key(name), "the entry {name:?} is there twice");
            archive.entries.insert(name.to_owned(), entry);
        }
        Ok(archive)
    }

    /// The names of all entries.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Where an entry's bytes are in the file, if there is one of that name.
    ///
    /// # Errors
    /// If it is not what the directory says, or reaches beyond the data.
    pub fn locate(&mut self, name: &str) -> Result<Option<Range<u64>>> {
        let Some(Entry { header, size }) = self.entries.get(name) else { return Ok(None) };
        let wrong = || format!("the entry {name:?} is damaged");
        let local = read_at(&mut self.file, *header, LOCAL_BYTES).with_context(wrong)?;
        ensure!(local.starts_with(LOCAL), "{}: it has no header", wrong());
        let mut lengths = Bytes(&local[26..]);
        let (n_name, n_extra) = (u64::from(lengths.u16()?), u64::from(lengths.u16()?));
        let named = read_at(&mut self.file, header + LOCAL_BYTES, n_name).with_context(wrong)?;
        ensure!(named == name.as_bytes(), "{}: its header has another name", wrong());
        let start = header + LOCAL_BYTES + n_name + n_extra; // all small, but the first, which is in the file
        let end = start.checked_add(*size).filter(|end| *end <= self.end);
        let end = end.with_context(|| format!("{}: {size} bytes are not there", wrong()))?;
        Ok(Some(start..end))
    }

    /// The bytes of an entry, if there is one of that name.
    ///
    /// # Errors
    /// As [`Archive::locate`], or if there are more than `most`.
    pub fn read(&mut self, name: &str, most: usize) -> Result<Option<Vec<u8>>> {
        let Some(Range { start, end }) = self.locate(name)? else { return Ok(None) };
        let size = end - start;
        ensure!(size <= most as u64, "the entry {name:?} has {size} bytes; {most} are read");
        read_at(&mut self.file, start, size).map(Some)
    }
}

/// Where the directory is.
fn directory<F: Read + Seek>(file: &mut F, length: u64) -> Result<Range<u64>> {
    let cut_off = "it is cut off or not a ZIP archive, which torch.save writes";
    let mut end = length.checked_sub(END_BYTES).context(cut_off)?;
    let record = read_at(file, end, END_BYTES)?;
    ensure!(record.starts_with(END), cut_off);
    let mut fields = Bytes(&record[4..]);
    let disks = [fields.u16()?, fields.u16()?];
    let counts = [fields.u16()?, fields.u16()?];
    let (size, start, comment) = (fields.u32()?, fields.u32()?, fields.u16()?);
    ensure!(disks == [0; 2] && counts[0] == counts[1] && comment == 0, cut_off);
    let mut found = (u64::from(counts[0]), u64::from(size), u64::from(start));
    let locator = match end.checked_sub(LOCATOR_BYTES) {
        Some(at) => read_at(file, at, LOCATOR_BYTES)?,
        None => Vec::new(),
    };
    if locator.starts_with(LOCATOR) {
        let at = Bytes(&locator[8..]).u64()?;
        let expected = end.checked_sub(LOCATOR_BYTES + END_64_BYTES);
        ensure!(expected == Some(at), "its ZIP64 record is not before its locator");
        let record = read_at(file, at, END_64_BYTES)?;
        ensure!(record.starts_with(END_64), "its ZIP64 record is damaged");
        let mut fields = Bytes(&record[32..]);
        let wide = (fields.u64()?, fields.u64()?, fields.u64()?);
        let agrees = |narrow: u64, most: u64, wide: u64| narrow == most || narrow == wide;
        ensure!(
            agrees(found.0, u64::from(u16::MAX), wide.0)
                && agrees(found.1, u64::from(u32::MAX), wide.1)
                && agrees(found.2, u64::from(u32::MAX), wide.2),
            "its two end records disagree"
        );
        (found, end) = (wide, at);
    }
    let (n, size, start) = found;
    let is_there = start.checked_add(size) == Some(end) && n <= size / CENTRAL_BYTES;
    ensure!(is_there, "its directory is not before the end record; {cut_off}");
    ensure!(size <= MAX_DIRECTORY, "its directory has {size} bytes; {MAX_DIRECTORY} are read");
    Ok(start..end)
}

/// Takes an entry of the directory, with its name.
fn central<'a>(rest: &mut Bytes<'a>) -> Result<(&'a str, Entry)> {
    let mut fields = Bytes(rest.slice(CENTRAL_BYTES as usize)?);
    ensure!(fields.array()? == *CENTRAL, "an entry starts otherwise");
    let _versions: [u8; 4] = fields.array()?;
    let (flags, method) = (fields.u16()?, fields.u16()?);
    let _time_and_checksum: [u8; 8] = fields.array()?;
    let (compressed, size) = (fields.u32()?, fields.u32()?);
    let lengths = [fields.u16()?, fields.u16()?, fields.u16()?].map(usize::from);
    let (disk, _attributes, header) = (fields.u16()?, fields.array::<6>()?, fields.u32()?);
    let name = std::str::from_utf8(rest.slice(lengths[0])?).context("a name is not UTF-8")?;
    let mut wide = zip64(rest.slice(lengths[1])?)?;
    rest.slice(lengths[2])?; // a comment
    let mut widen = |narrow| match narrow {
        u32::MAX => wide.u64(),
        _ => Ok(u64::from(narrow)),
    };
    // In the order of the extra field, which is not that of the entry.
    let (size, compressed, header) = (widen(size)?, widen(compressed)?, widen(header)?);
    ensure!(method == 0, "the entry {name:?} is compressed; torch.save stores without");
    ensure!(flags & 1 == 0, "the entry {name:?} is encrypted");
    ensure!(compressed == size, "the entry {name:?} has two sizes, {compressed} and {size}");
    ensure!(disk == 0, "the entry {name:?} is in another part of a split archive");
    Ok((name, Entry { header, size }))
}

/// What an entry's extra fields say of numbers that have more than 32 bits.
fn zip64(extra: &[u8]) -> Result<Bytes<'_>> {
    let mut rest = Bytes(extra);
    while !rest.0.is_empty() {
        let (id, n) = (rest.u16()?, rest.u16()?);
        let content = rest.slice(n.into())?;
        if id == 1 {
            return Ok(Bytes(content));
        }
    }
    Ok(Bytes(&[]))
}

/// Bytes of a file. Callers know that so many are there, or at least that they are few.
fn read_at<F: Read + Seek>(file: &mut F, offset: u64, n: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(n)?];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes).context("it is cut off")?;
    Ok(bytes)
}
