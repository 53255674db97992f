"""Converting from Python."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import openvla_gguf
import pytest

EXAMPLE = pathlib.Path(__file__).parents[2] / "example"


def test_a_checkpoint_becomes_the_committed_file(tmp_path):
    out = openvla_gguf.convert(EXAMPLE / "openvla-tabletop", tmp_path / "model.gguf", threads=2)
    assert out == tmp_path / "model.gguf"
    got, want = (path.read_bytes() for path in [out, EXAMPLE / "tabletop.gguf"])
    assert got == want


def test_the_name_is_made_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = openvla_gguf.convert(str(EXAMPLE / "openvla-tabletop"), type="Q8_0", proof=False)
    assert out.name == "OpenVLA-1M-tabletop-v1.0-Q8_0.gguf"
    assert os.listdir(tmp_path) == [out.name]


def test_what_cannot_be_converted_is_an_error(tmp_path):
    for source, words in [(tmp_path, "config.json"), ("no such", "neither a folder nor")]:
        with pytest.raises(openvla_gguf.OpenVLAError, match=words):
            openvla_gguf.convert(source, tmp_path / "model.gguf")
    with pytest.raises(openvla_gguf.InputError, match="type"):
        openvla_gguf.convert(EXAMPLE / "openvla-tabletop", type="Q3")
    with pytest.raises(openvla_gguf.InputError, match="threads"):
        openvla_gguf.convert(EXAMPLE / "openvla-tabletop", threads=0)
    with pytest.raises(openvla_gguf.InputError, match="platform"):
        openvla_gguf.convert(EXAMPLE / "openvla-tabletop-oft", platform="franka")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    # Over and over, so that there is something to interrupt on any machine.
    program = textwrap.dedent(
        f"""
        import signal
        import openvla_gguf
        signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it
        try:
            while True:
                print("go", flush=True)
                openvla_gguf.convert({str(EXAMPLE / "openvla-tabletop")!r}, {str(tmp_path / "model.gguf")!r})
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        openvla_gguf.convert({str(EXAMPLE / "openvla-tabletop")!r}, {str(tmp_path / "later.gguf")!r}, proof=False)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "go\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert said.splitlines()[-1] == "interrupted" and child.returncode == 0
    assert set(os.listdir(tmp_path)) <= {"model.gguf", "later.gguf"}
    assert (tmp_path / "later.gguf").exists(), "what was interrupted does not interrupt the next"
