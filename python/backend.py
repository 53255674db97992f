"""Builds the wheel: maturin's build backend, after ggml's shared libraries were put into the package.

They come from the same build, whose messages say where. `OPENVLA_FEATURES` names features, such as `cuda`.
"""

import glob
import json
import os
import subprocess
from pathlib import Path

from maturin import (  # noqa: F401
    build_editable as _build_editable,
    build_sdist,
    build_wheel as _build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "package" / "openvla_gguf"


def _libraries():
    """Builds the extension once, and returns what it loads: ggml's libraries, and its modules for kinds of devices."""
    features = os.environ.get("OPENVLA_FEATURES", "")
    command = ["cargo", "build", "--release", "--locked", "--message-format=json", "--features", features]
    built = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True).stdout
    messages = [json.loads(line) for line in built.splitlines() if line.startswith("{")]
    scripts = [m for m in messages if m["reason"] == "build-script-executed" and "llama-cpp-sys-2" in m["package_id"]]
    folder = Path(scripts[0]["out_dir"])
    libraries = [*folder.glob("lib*/libggml*.so.[0-9]"), *folder.glob("backends/*.so")]
    libraries = [path for path in libraries if path.name != "libggml-rpc.so"]  # tests of the engine alone need it
    if not libraries:
        raise SystemExit(f"ggml was not built as shared libraries: there are none in {folder}")
    return libraries


def _with_libraries():
    for old in glob.glob(str(PACKAGE / "libggml*.so*")):
        os.remove(old)
    for library in _libraries():
        subprocess.run(["strip", "--strip-unneeded", library, "-o", PACKAGE / library.name], check=True)
    if os.environ.get("OPENVLA_FEATURES"):
        os.environ["MATURIN_PEP517_ARGS"] = f"--features {os.environ['OPENVLA_FEATURES']}"


def build_wheel(*args, **kwargs):
    _with_libraries()
    return _build_wheel(*args, **kwargs)


def build_editable(*args, **kwargs):
    _with_libraries()
    return _build_editable(*args, **kwargs)
