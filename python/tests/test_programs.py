"""The programs that the wheel installs."""

import json
import pathlib
import subprocess
import sysconfig

EXAMPLE = pathlib.Path(__file__).parents[2] / "example"
BIN = pathlib.Path(sysconfig.get_path("scripts"))


def program(name, *args, cwd=None):
    return subprocess.run([BIN / name, *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_they_act_and_convert(tmp_path):
    done = program("openvla-convert", EXAMPLE / "openvla-tabletop", "--q4", "-o", "model.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = program("openvla-run", "-m", tmp_path / "model.gguf", EXAMPLE / "tabletop.png", "put eggplant into pot", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == [799, 545, 545, 799, 799, 799, 544]


def test_they_end_as_the_programs_do():
    for name in ["openvla-run", "openvla-convert", "openvla-serve", "openvla-client", "openvla-doctor"]:
        done = program(name, "--version")
        assert (done.returncode, done.stdout.split()[0]) == (0, name)
        assert program(name, "--no-such-option").returncode == 2
