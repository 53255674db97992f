//! Pickles of state dicts, taken apart and not run.
//!
//! A pickle is a program for a stack machine. This machine has the instructions that a state dict
//! needs, and knows what its few calls would return; whatever else there is, is refused by name.
//! Values refer to each other by index, so that nothing here recurses however deep they nest, and
//! every instruction adds one value at most, so that their number bounds memory.
//!
//! ref: CPython `Lib/pickletools.py`; torch 2.2 `_weights_only_unpickler.py`

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;

use super::bytes::Bytes;
use super::names::{Global, instruction};

/// The bytes that tensors are views of: an entry of the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage<'a> {
    /// The type of its numbers.
    pub dtype: Dtype,
    /// Its name in the archive.
    pub key: &'a str,
    /// How many numbers it has.
    pub numel: u64,
}

/// A contiguous part of a storage. Whether the storage is that large was not checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View<'a> {
    /// What it is a part of.
    pub storage: Storage<'a>,
    /// Numbers of the storage before it.
    pub start: u64,
    /// Numbers in it, at least one.
    pub numel: u64,
    /// PyTorch's order, slowest first.
    pub shape: Vec<usize>,
}

/// The instructions that are followed. A vision backbone with FiLM has 60 thousand.
const MAX_STEPS: usize = 1 << 19;
/// The dimensions of a tensor, at most. Convolutions of images have four.
const MAX_RANK: usize = 8;

/// The tensors of a state dict in their order.
///
/// # Errors
/// The instruction or the call that a state dict does not need, by name and with its place.
pub fn state_dict(pickle: &[u8]) -> Result<Vec<(&str, View<'_>)>> {
    let mut machine = Machine { code: Bytes(pickle), ..Machine::default() };
    let protocol = machine.code.array()?;
    ensure!(
        protocol == [0x80, 2],
        "its pickle is of another protocol than torch.save's default, 2; save it again without \
         pickle_protocol"
    );
    for _ in 0..MAX_STEPS {
        let at = pickle.len() - machine.code.0.len();
        let [opcode] = machine.code.array()?;
        if opcode == b'.' {
            return machine.result();
        }
        machine.step(opcode).with_context(|| format!("byte {at} of its pickle"))?;
    }
    bail!("its pickle has more than {MAX_STEPS} instructions")
}

#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Text(&'a str),
    /// A range of [`Machine::items`].
    Tuple(usize, usize),
    /// An index of [`Machine::dicts`].
    Dict(usize),
    Global(Global),
    Storage(Storage<'a>),
    /// An index of [`Machine::views`].
    Tensor(usize),
}

#[derive(Default)]
struct Machine<'a> {
    code: Bytes<'a>,
    stack: Vec<Value<'a>>,
    /// Heights of the stack at which a group of values starts.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    /// What tuples are ranges of.
    items: Vec<Value<'a>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    views: Vec<View<'a>>,
}

impl<'a> Machine<'a> {
    /// Follows an instruction, but for the last.
    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'K' | b'M' | b'J' | 0x8A => {
                let int = self.int(opcode)?;
                self.stack.push(Value::Int(int));
            }
            b'X' => {
                let n = self.code.u32()?;
                let text = std::str::from_utf8(self.code.slice(n as usize)?)?;
                self.stack.push(Value::Text(text));
            }
            b')' | 0x85..=0x87 => {
                let n = usize::from(opcode.saturating_sub(0x84)); // TUPLE1 is 0x85
                let start = self.since(n)?;
                self.tuple(start);
            }
            b't' => {
                let start = self.mark()?;
                self.tuple(start);
            }
            b'}' => self.dict(),
            b's' => {
                let start = self.since(2)?;
                self.set(start)?;
            }
            b'u' => {
                let start = self.mark()?;
                self.set(start)?;
            }
            b'q' | b'r' => {
                let index = self.index(opcode == b'q')?;
                let value = self.stack[self.since(1)?];
                self.memo.insert(index, value);
            }
            b'h' | b'j' => {
                let index = self.index(opcode == b'h')?;
                let value = self.memo.get(&index).context("it uses a value it has not stored")?;
                self.stack.push(*value);
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                let global = Global::named(module, name).with_context(|| {
                    let name = format!("{module}.{name}");
                    format!(
                        "it names {name:?}, which no state dict needs; nothing in it was executed"
                    )
                })?;
                self.stack.push(Value::Global(global));
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.stack.push(Value::Storage(storage));
            }
            b'R' => self.call()?,
            b'b' => self.drop_metadata()?,
            _ => bail!(
                "it has the instruction {}, which no state dict needs; nothing in it was executed",
                instruction(opcode)
            ),
        }
        Ok(())
    }

    fn int(&mut self, opcode: u8) -> Result<i64> {
        Ok(match opcode {
            b'K' => i64::from(self.code.array::<1>()?[0]),
            b'M' => i64::from(self.code.u16()?),
            b'J' => i64::from(i32::from_le_bytes(self.code.array()?)),
            _ => {
                let n = usize::from(self.code.array::<1>()?[0]);
                let bytes = self.code.slice(n)?;
                ensure!((1..=8).contains(&n), "it has an integer of {n} bytes");
                // The last byte has the sign.
                let sign = if bytes[n - 1] < 0x80 { 0 } else { 0xFF };
                let mut wide = [sign; 8];
                wide[..n].copy_from_slice(bytes);
                i64::from_le_bytes(wide)
            }
        })
    }

    /// An index of the memo.
    fn index(&mut self, is_short: bool) -> Result<u32> {
        if is_short { Ok(self.code.array::<1>()?[0].into()) } else { self.code.u32() }
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.code.0.iter().position(|byte| *byte == b'\n').context("it is cut off")?;
        let line = self.code.slice(end + 1)?;
        Ok(std::str::from_utf8(&line[..end])?)
    }

    /// Where the last `n` values start, none of which is before the last mark.
    fn since(&self, n: usize) -> Result<usize> {
        let least = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(n).filter(|start| *start >= least);
        start.context("it takes a value that is not there")
    }

    /// Where the values since the last mark start, which is taken.
    fn mark(&mut self) -> Result<usize> {
        self.marks.pop().context("it takes values since a mark that is not there")
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        let top = self.stack[self.since(1)?];
        self.stack.pop();
        Ok(top)
    }

    /// Makes the values from there on one.
    fn tuple(&mut self, start: usize) {
        let first = self.items.len();
        self.items.extend(self.stack.drain(start..));
        self.stack.push(Value::Tuple(first, self.items.len()));
    }

    fn dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    /// Puts the keys and values from there on into the dict below them.
    fn set(&mut self, start: usize) -> Result<()> {
        let pairs: Vec<_> = self.stack.drain(start..).collect();
        let (pairs, odd) = pairs.as_chunks();
        ensure!(odd.is_empty(), "it has a key without a value");
        let dict = self.top_dict()?;
        self.dicts[dict].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn top_dict(&self) -> Result<usize> {
        match self.stack[self.since(1)?] {
            Value::Dict(index) => Ok(index),
            other => bail!("it fills {}; a dict is wanted", other.kind()),
        }
    }

    /// What a persistent id stands for.
    fn storage(&self, id: Value<'a>) -> Result<Storage<'a>> {
        let Value::Tuple(start, end) = id else {
            bail!("it refers to {}; a storage is wanted", id.kind())
        };
        let [
            Value::Text("storage"),
            Value::Global(Global::Storage(dtype)),
            Value::Text(key),
            Value::Text(_), // the device that it was on
            Value::Int(numel),
        ] = self.items[start..end]
        else {
            bail!("it refers to something other than a storage");
        };
        let numel = u64::try_from(numel).context("a storage has a negative size")?;
        Ok(Storage { dtype, key, numel })
    }

    /// Puts what a call would return in place of the call.
    fn call(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Global(function), Value::Tuple(start, end)) = (function, arguments) else {
            bail!("it calls {} with {}", function.kind(), arguments.kind());
        };
        match function {
            Global::OrderedDict if start == end => self.dict(),
            Global::RebuildTensor => {
                let view = self.view(start..end)?;
                self.stack.push(Value::Tensor(self.views.len()));
                self.views.push(view);
            }
            Global::RebuildParameter => match self.items[start..end] {
                [tensor @ Value::Tensor(_), Value::Bool, Value::Dict(hooks)]
                    if self.dicts[hooks].is_empty() =>
                {
                    self.stack.push(tensor);
                }
                _ => bail!("it makes a parameter of something other than a tensor"),
            },
            Global::OrderedDict | Global::Storage(_) => {
                bail!("it calls {function:?} with {} arguments", end - start);
            }
        }
        Ok(())
    }

    /// What `_rebuild_tensor_v2` would return.
    fn view(&self, arguments: Range<usize>) -> Result<View<'a>> {
        let [
            Value::Storage(storage),
            Value::Int(start),
            Value::Tuple(shape, shape_end),
            Value::Tuple(strides, strides_end),
            Value::Bool, // whether a gradient is wanted
            Value::Dict(hooks),
        ] = self.items[arguments]
        else {
            bail!("it makes a tensor of something other than a storage, shape and strides");
        };
        ensure!(self.dicts[hooks].is_empty(), "a tensor has hooks, which would be run");
        let start = u64::try_from(start).context("a tensor starts before its storage")?;
        let shape = self.sizes(shape..shape_end)?;
        let strides = self.sizes(strides..strides_end)?;
        ensure!(shape.len() == strides.len(), "{shape:?} has strides {strides:?}");
        let mut numel = 1_u64;
        for (size, stride) in shape.iter().zip(&strides).rev() {
            ensure!(
                *size == 1 || *stride == numel,
                "a tensor of shape {shape:?} has strides {strides:?}; save tensor.contiguous()"
            );
            numel = numel.checked_mul(*size).with_context(|| format!("{shape:?} is too large"))?;
        }
        ensure!(numel > 0, "a tensor is of shape {shape:?}: nothing");
        let shape = shape.into_iter().map(usize::try_from).collect::<Result<_, _>>()?;
        Ok(View { storage, start, numel, shape })
    }

    /// A tuple of sizes.
    fn sizes(&self, tuple: Range<usize>) -> Result<Vec<u64>> {
        let n = tuple.len();
        ensure!(n <= MAX_RANK, "a tensor has {n} dimensions; {MAX_RANK} are read");
        let size = |value: &Value| match value {
            Value::Int(size) => u64::try_from(*size).context("a tensor has a negative size"),
            other => bail!("a tensor's size is {}", other.kind()),
        };
        self.items[tuple].iter().map(size).collect()
    }

    /// Takes the attributes of a state dict, which say nothing of its tensors.
    fn drop_metadata(&mut self) -> Result<()> {
        let attributes = self.pop()?;
        self.top_dict()?;
        let Value::Dict(attributes) = attributes else {
            bail!("it sets attributes by {}; a dict is wanted", attributes.kind());
        };
        match self.dicts[attributes][..] {
            [(Value::Text("_metadata"), _)] => Ok(()),
            _ => bail!("it sets attributes other than _metadata"),
        }
    }

    /// The tensors of the only value that is left.
    fn result(mut self) -> Result<Vec<(&'a str, View<'a>)>> {
        ensure!(self.code.0.is_empty(), "there are bytes after the end of its pickle");
        let (&[value], []) = (&self.stack[..], &self.marks[..]) else {
            bail!("its pickle makes {} values; one state dict is wanted", self.stack.len());
        };
        let Value::Dict(dict) = value else {
            bail!("it holds {}; a state dict is wanted", value.kind());
        };
        let mut tensors = Vec::new();
        for (key, value) in std::mem::take(&mut self.dicts[dict]) {
            let Value::Text(name) = key else {
                bail!("it has {} as a key; a tensor's name is wanted", key.kind());
            };
            let Value::Tensor(view) = value else {
                bail!("its value {name:?} is {}; a tensor is wanted", value.kind());
            };
            tensors.push((name, self.views[view].clone()));
        }
        Ok(tensors)
    }
}

impl Value<'_> {
    /// What it is, for people.
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a boolean",
            Self::Int(_) => "an integer",
            Self::Text(_) => "a string",
            Self::Tuple(..) => "a tuple",
            Self::Dict(_) => "a dict",
            Self::Global(_) => "a function or class",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}
