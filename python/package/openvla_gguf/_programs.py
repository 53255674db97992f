"""The programs of the package, which lie beside the libraries that they load."""

import os
import sys
from pathlib import Path


def _become(name: str) -> None:
    program = Path(__file__).with_name(name)
    os.execv(program, [name, *sys.argv[1:]])


def run() -> None:
    _become("openvla-run")


def convert() -> None:
    _become("openvla-convert")


def serve() -> None:
    _become("openvla-serve")


def client() -> None:
    _become("openvla-client")


def doctor() -> None:
    _become("openvla-doctor")
