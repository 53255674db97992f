"""Becomes a program that ends when the process that started it does, however that ends: PARENT PROGRAM ARGUMENT…

Run as a file, not imported: code between fork and exec is unsafe in a process with threads, such as Ray's.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the process that started this one has ended")
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
