"""What the PyPI package `gguf` reads in a file, as JSON: keys, tensors, and what its name says.

    python gguf_reader.py FILE ENCODING
"""

import json
import re
import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, dequantize
from gguf.utility import naming_convention

# ggml's docs/gguf.md, "GGUF Naming Convention", for a whole model in one file; the scheme has ASCII
# alone, and here a model may be tuned for something in any script.
NAME = re.compile(
    r"(?P<base>[A-Za-z0-9\s]+(-[A-Za-z\s][A-Za-z0-9\s]*)*)"
    r"-(?P<size>(\d+x)?(\d+\.)?\d+[A-Za-z])"
    r"(-(?P<finetune>[\w\s-]+))?"
    r"-(?P<version>v\d+(\.\d+)*)"
    r"-(?P<encoding>\w+)\.gguf"
)


def kind(field):
    """`STRING`, or `ARRAY STRING`."""
    return " ".join(GGUFValueType(kind).name for kind in field.types)


def tensor(found):
    numbers = dequantize(found.data, found.tensor_type).ravel()
    return {
        "type": found.tensor_type.name,
        "shape": [int(n) for n in found.shape],
        "first": [float(x) for x in numbers[:8]],
        "last": float(numbers[-1]),
    }


def main():
    path, encoding = sys.argv[1:]
    reader = GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    keys = {name: {"kind": kind(f), "value": f.contents()} for name, f in fields.items()}
    parts = ["name", "basename", "finetune", "version", "size_label"]
    parts = [keys.get(f"general.{part}", {}).get("value") for part in parts]
    print(json.dumps({
        "keys": keys,
        "tensors": {found.name: tensor(found) for found in reader.tensors},
        "composed": naming_convention(*parts, encoding) + ".gguf",
        "parsed": NAME.fullmatch(Path(path).name).groupdict(),
    }))


if __name__ == "__main__":
    main()
