//! Files that are refused, each with words that tell why.

use super::*;

fn why(file: &[u8]) -> String {
    format!("{:#}", torch::read(Cursor::new(file)).unwrap_err())
}

/// Why a pickle is refused, in a file whose one storage has six floats.
fn why_not(pickle: Vec<u8>) -> String {
    why(&file(pickle, &[("0", floats(6))]))
}

/// Why a state dict of that one value is refused.
fn why_not_value(value: Code) -> String {
    why_not(state_dict(&[("x", value)]))
}

fn assert_says(error: &str, words: &str) {
    assert!(error.contains(words), "{error:?} does not say {words:?}");
}

fn six(start: i64, shape: &[i64], strides: &[i64]) -> Code {
    view(storage("Float", "0", 6), start, shape, strides)
}

#[test]
fn calls_are_refused_by_name() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "ComplexFloatStorage"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch.storage", "UntypedStorage"),
        ("collections", "OrderedDict\r"),
        ("__builtin__", "OrderedDict"),
    ] {
        let error = why_not_value(call(global(module, name), &[text("touch /tmp/owned")]));
        assert_says(&error, &format!("names {:?}", format!("{module}.{name}")));
        assert_says(&error, "nothing in it was executed");
    }
    let storage = global("torch", "FloatStorage");
    assert_says(&why_not_value(call(storage, &[int(1 << 40)])), "calls Storage(F32) with 1");
    let items = tuple(&[tuple(&[text("a"), int(1)])]);
    let error = why_not_value(call(global("collections", "OrderedDict"), &[items]));
    assert_says(&error, "calls OrderedDict with 1");
    assert_says(&why_not_value(call(text("print"), &[])), "calls a string with a tuple");
}

#[test]
fn instructions_are_refused_by_name() {
    for (code, name) in [
        (&b"i"[..], "INST"),
        (b"o", "OBJ"),
        (b"\x81", "NEWOBJ"),
        (b"\x93", "STACK_GLOBAL"),
        (b"\x82\x01", "EXT1"),
        (b"\x95", "FRAME"),
        (b"\x80\x02", "PROTO"),
        (b"]", "EMPTY_LIST"),
        (b"2", "DUP"),
        (b"Pid\n", "PERSID"),
        (b"\x8B", "LONG4"),
        (b"\xF0", "of no name"),
    ] {
        assert_says(&why_not_value(code.to_vec()), &format!("instruction {name}, which"));
    }
    for protocol in [0, 1, 3, 4, 5] {
        let error = why_not([&[0x80, protocol][..], &ordered_dict(), b"."].concat());
        assert_says(&error, "pickle_protocol");
    }
}

#[test]
fn values_that_no_state_dict_has_are_refused() {
    for (value, words) in [
        (text("x"), "value \"x\" is a string"),
        (b"}".to_vec(), "value \"x\" is a dict"),
        (storage("Float", "0", 6), "value \"x\" is a storage"),
        (b"h\x09".to_vec(), "a value it has not stored"),
        (b"u".to_vec(), "a key without a value"),
        (b"t".to_vec(), "a mark that is not there"),
        (b"\x87".to_vec(), "takes a value that is not there"),
        (b"X\xFF\xFF\xFF\xFF".to_vec(), "cut off"),
        (b"X\x01\0\0\0\xFF".to_vec(), "utf-8"),
        (b"\x8A\x09123456789".to_vec(), "integer of 9 bytes"),
        (b"\x8A\0".to_vec(), "integer of 0 bytes"),
        ([int(1), b"Q".to_vec()].concat(), "refers to an integer"),
        ([tuple(&[int(1)]), b"Q".to_vec()].concat(), "other than a storage"),
        (storage("Float", "0", -6), "negative size"),
        ([int(1), b"}b".to_vec()].concat(), "fills an integer"),
        (b"}}b".to_vec(), "attributes other than _metadata"),
        (b"}Nb".to_vec(), "attributes by None"),
        (call(global("torch._utils", "_rebuild_parameter"), &[int(1)]), "makes a parameter"),
        (call(global("torch._utils", "_rebuild_tensor_v2"), &[int(1)]), "makes a tensor"),
    ] {
        assert_says(&why_not_value(value), words);
    }
    let hooks = filled(ordered_dict(), &[("hook", int(1))]);
    let hooked =
        [storage("Float", "0", 6), int(0), tuple(&[]), tuple(&[]), b"\x89".to_vec(), hooks];
    let hooked = call(global("torch._utils", "_rebuild_tensor_v2"), &hooked);
    assert_says(&why_not_value(hooked), "hooks");
    for (pickle, words) in [
        (pickle(&tensor("Float", "0", &[6])), "it holds a tensor; a state dict"),
        (pickle(&Code::new()), "makes 0 values"),
        (pickle(&[ordered_dict(), ordered_dict()].concat()), "makes 2 values"),
        ([pickle(&ordered_dict()), b".".to_vec()].concat(), "bytes after the end"),
        (
            pickle(&[ordered_dict(), int(1), tensor("Float", "0", &[6]), b"s".to_vec()].concat()),
            "an integer as a key",
        ),
        (
            state_dict(&[("x", tensor("Float", "0", &[6])), ("x", tensor("Float", "0", &[6]))]),
            "\"x\" twice",
        ),
        (b"\x80\x02".to_vec(), "cut off"),
        (Vec::new(), "cut off"),
    ] {
        assert_says(&why_not(pickle), words);
    }
}

#[test]
fn sizes_and_strides_that_do_not_fit_are_refused() {
    for (value, words) in [
        (six(0, &[3, 2], &[1, 3]), "save tensor.contiguous()"),
        (six(0, &[2, 2], &[3, 1]), "save tensor.contiguous()"),
        (six(0, &[6], &[0]), "save tensor.contiguous()"),
        (six(0, &[6], &[1, 1]), "has strides [1, 1]"),
        (six(0, &[7], &[1]), "it has 7 numbers from number 0 on, its storage 6"),
        (six(1, &[6], &[1]), "it has 6 numbers from number 1 on, its storage 6"),
        (six(6, &[], &[]), "it has 1 numbers from number 6 on"),
        (six(-1, &[6], &[1]), "starts before its storage"),
        (six(i64::MAX, &[6], &[1]), "its storage 6 in all"),
        (six(0, &[-6], &[1]), "negative size"),
        (six(0, &[0, 6], &[6, 1]), "nothing"),
        (six(0, &[i64::MAX, i64::MAX], &[i64::MAX, 1]), "too large"),
        (six(0, &[1; 9], &[1; 9]), "9 dimensions"),
        (tensor("Float", "1", &[6]), "no entry \"head/data/1\""),
        (tensor("Float", "../0", &[6]), "no entry \"head/data/../0\""),
        (tensor("Half", "0", &[6]), "6 numbers of F16, but \"head/data/0\" has 24 bytes"),
        (view(storage("Float", "0", 1 << 62), 0, &[6], &[1]), "numbers of F32, but"),
    ] {
        assert_says(&why_not_value(value), words);
    }
}

#[test]
fn bombs_are_refused_or_do_no_harm() {
    let dict = filled(ordered_dict(), &[("x", tensor("Float", "0", &[6]))]);
    let with = |code: Vec<u8>| pickle(&[code, dict.clone()].concat());
    let n = 1 << 19;
    assert_says(&why_not(with(b"N".repeat(n))), "more than 524288 instructions");
    assert_says(&why_not(with(b"(".repeat(n))), "more than 524288 instructions");
    // As deep as the instructions reach, in tuples and in a dict that holds itself.
    let deep = [b")".to_vec(), b"\x85".repeat(n - 100)].concat();
    assert_says(&why_not(with(deep)), "makes 2 values");
    assert_says(&why_not_value(b"}q\x01X\x01\0\0\0ah\x01s".to_vec()), "is a dict");
    // A tuple of many dimensions, used over and over.
    let many = [b"(".to_vec(), int(1).repeat(1000), b"t".to_vec()].concat();
    let parts =
        [storage("Float", "0", 6), int(0), many.clone(), many, b"\x89".to_vec(), ordered_dict()];
    let bomb = call(global("torch._utils", "_rebuild_tensor_v2"), &parts);
    assert_says(&why_not_value(bomb), "1000 dimensions");
    // The pickle is larger than any; its size alone is looked at.
    assert_says(&why_not(vec![b'N'; (1 << 24) + 1]), "has 16777217 bytes; 16777216 are read");
}

#[test]
fn archives_that_contradict_themselves_are_refused() {
    let pickle = state_dict(&[("x", tensor("Float", "0", &[6]))]);
    let sound = entries(pickle, &[("0", floats(6))]);
    let changed = |change: fn(&mut Entry)| {
        let mut entries = sound.clone();
        change(&mut entries[2]);
        entries
    };
    for (entries, words) in [
        (changed(|entry| entry.method = 8), "\"head/data/0\" is compressed"),
        (changed(|entry| entry.flags |= 1), "encrypted"),
        (changed(|entry| entry.sizes[0] -= 4), "two sizes, 24 and 20"),
        (changed(|entry| entry.sizes = [20; 2]), "6 numbers of F32, but \"head/data/0\" has 20"),
        (changed(|entry| entry.sizes = [4000; 2]), "4000 bytes are not there"),
        (changed(|entry| (entry.wide, entry.sizes) = (true, [u64::MAX; 2])), "are not there"),
        (
            changed(|entry| entry.name = "head/byteorder".into()),
            "\"head/byteorder\" is there twice",
        ),
        (changed(|entry| entry.name = "b/data.pkl".into()), "2 entries named data.pkl"),
        (sound[1..].to_vec(), "0 entries named data.pkl"),
        (Vec::new(), "0 entries named data.pkl"),
    ] {
        assert_says(&why(&zip(&entries, true)), words);
    }
    let mut big = sound.clone();
    big[1] = Entry::new("head/byteorder", *b"big");
    assert_says(&why(&zip(&big, true)), "byte order is \"big\"");
}

#[test]
fn damaged_headers_are_refused() {
    let pickle = state_dict(&[("x", tensor("Float", "0", &[6]))]);
    let sound = file(pickle, &[("0", floats(6))]);
    let n = sound.len();
    let directory = n - 22 - 20 - 56;
    let start = u64::from_le_bytes(sound[directory + 48..][..8].try_into().unwrap()) as usize;
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = sound.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        why(&file)
    };
    for (at, bytes, words) in [
        (n - 22, &b"QK"[..], "cut off or not a ZIP"),
        (n - 18, b"\x01", "cut off or not a ZIP"), // another disk
        (n - 2, b"\x01", "cut off or not a ZIP"),  // a comment
        (n - 6, b"\x01\0\0\0", "disagree"),        // where the directory starts
        (n - 14, b"\xFE\xFF\xFE\xFF", "disagree"), // entries
        (n - 42, b"QK", "not before the end record"),
        (n - 34, b"\xFF", "ZIP64 record is not before its locator"),
        (directory, b"QK", "ZIP64 record is damaged"),
        (start, b"QK", "its directory is damaged"),
        (start + 28, b"\xFF\xFF", "its directory is damaged"), // the length of a name
        (start + 42, b"\xFF\xFF\xFF\x7F", "starts beyond the data"),
        (start + 34, b"\x01", "split archive"),
        (start + 46, b"\xFF", "not UTF-8"),
        (0, b"QK", "is damaged: it has no header"),
        (30, b"H", "its header has another name"),
        (26, b"\xFF\xFF", "\"head/data.pkl\" is damaged"),
        (28, b"\xFF\xFF", "bytes are not there"),
    ] {
        assert_says(&patched(at, bytes), words);
    }
    assert_says(&why(&[sound.clone(), vec![0]].concat()), "cut off or not a ZIP");
    assert_says(&why(b"<html>404</html>, as a proxy serves it"), "cut off or not a ZIP");
    assert_says(&why(b""), "cut off or not a ZIP");
    let legacy = b"\x80\x02\x8A\x0Al\xFC\x9CF\xF9 j\xA8P\x19.\x80\x02M\xE9\x03.";
    assert_says(&why(legacy), "before version 1.6");
}
