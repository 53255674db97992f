//! Files as `torch.save` writes them, and such as it never would.

/// A value as the instructions that make it.
pub type Code = Vec<u8>;

pub fn text(text: &str) -> Code {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

/// By the shortest instruction, as Python's pickler does.
pub fn int(value: i64) -> Code {
    if let Ok(value) = u8::try_from(value) {
        vec![b'K', value]
    } else if let Ok(value) = u16::try_from(value) {
        [&b"M"[..], &value.to_le_bytes()].concat()
    } else if let Ok(value) = i32::try_from(value) {
        [&b"J"[..], &value.to_le_bytes()].concat()
    } else {
        [&b"\x8A\x08"[..], &value.to_le_bytes()].concat()
    }
}

pub fn global(module: &str, name: &str) -> Code {
    format!("c{module}\n{name}\n").into_bytes()
}

pub fn tuple(items: &[Code]) -> Code {
    match items {
        [] => b")".to_vec(),
        [_, _, _, _, ..] => [b"(".to_vec(), items.concat(), b"t".to_vec()].concat(),
        _ => [items.concat(), vec![0x84 + items.len() as u8]].concat(),
    }
}

pub fn call(function: Code, arguments: &[Code]) -> Code {
    [function, tuple(arguments), b"R".to_vec()].concat()
}

pub fn ordered_dict() -> Code {
    call(global("collections", "OrderedDict"), &[])
}

pub fn storage(kind: &str, key: &str, numel: i64) -> Code {
    let kind = global("torch", &format!("{kind}Storage"));
    let id = tuple(&[text("storage"), kind, text(key), text("cuda:0"), int(numel)]);
    [id, b"Q".to_vec()].concat()
}

pub fn sizes(sizes: &[i64]) -> Code {
    tuple(&sizes.iter().copied().map(int).collect::<Vec<_>>())
}

pub fn view(storage: Code, start: i64, shape: &[i64], strides: &[i64]) -> Code {
    let arguments =
        [storage, int(start), sizes(shape), sizes(strides), b"\x89".to_vec(), ordered_dict()];
    call(global("torch._utils", "_rebuild_tensor_v2"), &arguments)
}

/// The whole of a storage.
pub fn tensor(kind: &str, key: &str, shape: &[i64]) -> Code {
    let numel = shape.iter().product();
    let strides: Vec<_> = (1..=shape.len()).map(|i| shape[i..].iter().product()).collect();
    view(storage(kind, key, numel), 0, shape, &strides)
}

/// A dict with items in one go.
pub fn filled(dict: Code, items: &[(&str, Code)]) -> Code {
    let items = items.iter().flat_map(|(name, value)| [text(name), value.clone()]);
    [dict, b"(".to_vec(), items.collect::<Vec<_>>().concat(), b"u".to_vec()].concat()
}

/// A whole pickle.
pub fn pickle(value: &Code) -> Vec<u8> {
    [&b"\x80\x02"[..], value, b"."].concat()
}

pub fn state_dict(tensors: &[(&str, Code)]) -> Vec<u8> {
    pickle(&filled(ordered_dict(), tensors))
}

/// An entry of an archive, and what its headers say of it.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub data: Vec<u8>,
    pub flags: u16,
    pub method: u16,
    /// The sizes in the directory.
    pub sizes: [u64; 2],
    /// Whether sizes and place are in a ZIP64 field.
    pub wide: bool,
}

impl Entry {
    pub fn new(name: &str, data: impl Into<Vec<u8>>) -> Self {
        let data = data.into();
        let sizes = [data.len() as u64; 2];
        Self { name: name.into(), data, flags: 0x0808, method: 0, sizes, wide: false }
    }
}

fn u16s(values: &[u16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// An archive with local headers that know no sizes, data at multiples of 64 bytes and data
/// descriptors, as torch's; `wide` adds the ZIP64 end record, as torch does.
pub fn zip(entries: &[Entry], wide: bool) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let header = file.len();
        let padding = (64 - (header + 30 + entry.name.len() + 4) % 64) % 64;
        file.extend(b"PK\x03\x04");
        file.extend(u16s(&[0, entry.flags, entry.method, 0, 0]));
        file.extend(u32s(&[0, 0, 0]));
        file.extend(u16s(&[entry.name.len() as u16, 4 + padding as u16]));
        file.extend(entry.name.as_bytes());
        file.extend(u16s(&[0x4246, padding as u16]));
        file.extend(vec![b'Z'; padding]);
        file.extend(&entry.data);
        file.extend(b"PK\x07\x08");
        file.extend(u32s(&[0; 3]));

        let place = [entry.sizes[0], entry.sizes[1], header as u64];
        let extra = if entry.wide { [u16s(&[1, 24]), u64s(&place)].concat() } else { vec![] };
        let [size, compressed, header] =
            place.map(|n| if entry.wide { u32::MAX } else { n as u32 });
        directory.extend(b"PK\x01\x02");
        directory.extend(u16s(&[0, 0, entry.flags, entry.method, 0, 0]));
        directory.extend(u32s(&[0, compressed, size]));
        directory.extend(u16s(&[entry.name.len() as u16, extra.len() as u16, 0, 0, 0]));
        directory.extend(u32s(&[0, header]));
        directory.extend(entry.name.as_bytes());
        directory.extend(extra);
    }
    let (n, size, start) = (entries.len() as u64, directory.len() as u64, file.len() as u64);
    file.extend(directory);
    if wide {
        let at = file.len() as u64;
        file.extend(b"PK\x06\x06");
        file.extend(u64s(&[44]));
        file.extend(u16s(&[0, 45]));
        file.extend(u32s(&[0, 0]));
        file.extend(u64s(&[n, n, size, start]));
        file.extend(b"PK\x06\x07");
        file.extend(u32s(&[0]));
        file.extend(u64s(&[at]));
        file.extend(u32s(&[1]));
    }
    file.extend(b"PK\x05\x06");
    file.extend(u16s(&[0, 0, n as u16, n as u16]));
    file.extend(u32s(&[size as u32, start as u32]));
    file.extend(u16s(&[0]));
    file
}

/// The entries of a file by `torch.save`.
pub fn entries(pickle: Vec<u8>, storages: &[(&str, Vec<u8>)]) -> Vec<Entry> {
    let mut entries =
        vec![Entry::new("head/data.pkl", pickle), Entry::new("head/byteorder", *b"little")];
    let stored = |(key, data): &(&str, Vec<u8>)| Entry::new(&format!("head/data/{key}"), &data[..]);
    entries.extend(storages.iter().map(stored));
    entries.push(Entry::new("head/version", *b"3\n"));
    entries
}

/// A whole file.
pub fn file(pickle: Vec<u8>, storages: &[(&str, Vec<u8>)]) -> Vec<u8> {
    zip(&entries(pickle, storages), true)
}
