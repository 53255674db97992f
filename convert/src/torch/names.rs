//! Names in pickles: the few functions and classes that state dicts need, and what Python calls the
//! instructions that are refused.

use safetensors::Dtype;

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`, called without arguments.
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// `torch.FloatStorage` and its like, which are never called.
    Storage(Dtype),
}

impl Global {
    /// The one of that name, if it is known.
    pub fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", storage) => Self::Storage(match storage.strip_suffix("Storage")? {
                "BFloat16" => Dtype::BF16,
                "Half" => Dtype::F16,
                "Float" => Dtype::F32,
                "Double" => Dtype::F64,
                "Long" => Dtype::I64,
                "Int" => Dtype::I32,
                "Short" => Dtype::I16,
                "Char" => Dtype::I8,
                "Byte" => Dtype::U8,
                "Bool" => Dtype::BOOL,
                _ => return None,
            }),
            _ => return None,
        })
    }
}

/// What Python calls an instruction that is refused.
pub fn instruction(opcode: u8) -> &'static str {
    /// Each after its character.
    const PRINTABLE: &str = "0POP 1POP_MARK 2DUP BBINBYTES CSHORT_BINBYTES FFLOAT GBINFLOAT IINT \
        LLONG PPERSID SSTRING TBINSTRING USHORT_BINSTRING VUNICODE ]EMPTY_LIST aAPPEND dDICT \
        eAPPENDS gGET iINST lLIST oOBJ pPUT";
    const FROM_0X80: [&str; 25] = [
        "PROTO",
        "NEWOBJ",
        "EXT1",
        "EXT2",
        "EXT4",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "NEWTRUE",
        "NEWFALSE",
        "LONG1",
        "LONG4",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES8",
        "EMPTY_SET",
        "ADDITEMS",
        "FROZENSET",
        "NEWOBJ_EX",
        "STACK_GLOBAL",
        "MEMOIZE",
        "FRAME",
        "BYTEARRAY8",
        "NEXT_BUFFER",
        "READONLY_BUFFER",
    ];
    let high = opcode.checked_sub(0x80).and_then(|at| FROM_0X80.get(usize::from(at)));
    let printable = || PRINTABLE.split(' ').find_map(|entry| entry.strip_prefix(opcode as char));
    high.copied().or_else(printable).unwrap_or("of no name")
}
