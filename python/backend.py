"""Builds the wheel: maturin's build backend, after ggml's shared libraries and the programs were put into the package.

They come from the same build, whose messages say where. `OPENVLA_FEATURES` names further features, such as `cuda`, and
`OPENVLA_PROFILE` another profile of cargo's than `release`.
"""

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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "package" / "openvla_gguf"
PROGRAMS = ["openvla-run", "openvla-convert", "openvla-serve", "openvla-client", "openvla-doctor"]
PROFILE = os.environ.get("OPENVLA_PROFILE", "release")
FEATURES = os.environ.get("OPENVLA_FEATURES")


def _build(*args):
    """Builds something, and returns what cargo says about it."""
    command = ["cargo", "build", "--profile", PROFILE, "--locked", "--message-format=json", *args]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def _files():
    """The programs, ggml's libraries, and its modules for kinds of devices."""
    features = ",".join(filter(None, ["dynamic", FEATURES]))
    messages = _build("--features", features, *(word for name in PROGRAMS for word in ["--bin", name]))
    programs = [Path(m["executable"]) for m in messages if m.get("executable")]
    (script,) = {m["out_dir"] for m in messages if "llama-cpp-sys-2" in m.get("package_id", "") and "out_dir" in m}
    libraries = [*Path(script).glob("lib*/libggml*.so.[0-9]"), *Path(script).glob("backends/*.so")]
    if not libraries or len(programs) != len(PROGRAMS):
        raise SystemExit(f"the build gave {len(programs)} programs, and {len(libraries)} libraries of ggml in {script}")
    # The engine's tests alone need that one.
    return [*programs, *(path for path in libraries if path.name != "libggml-rpc.so")]


def _fill_package():
    for old in [*PACKAGE.glob("libggml*"), *PACKAGE.glob("openvla-*")]:
        old.unlink()
    for file in _files():
        subprocess.run([os.environ.get("STRIP", "strip"), "--strip-unneeded", file, "-o", PACKAGE / file.name], check=True)
    features = ["--features", FEATURES] if FEATURES else []
    os.environ["MATURIN_PEP517_ARGS"] = " ".join(["--profile", PROFILE, *features])


def build_wheel(*args, **kwargs):
    _fill_package()
    return _build_wheel(*args, **kwargs)


def build_editable(*args, **kwargs):
    _fill_package()
    return _build_editable(*args, **kwargs)
