"""Ending a process in which a process group lived."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit, sys
from hopescale.parallel.process_group import end_process

class Witness:
    def __del__(self):
        sys.stderr.write("finalized")

witness = Witness()
atexit.register(print, "exit handler ran")
sys.stdout.write("buffered, ")
end_process(75)
"""


def test_a_process_ends_with_its_code_and_its_exit_handlers_but_is_never_finalized() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert ended.returncode == 75
    assert ended.stdout == "buffered, exit handler ran\n"
    assert ended.stderr == ""
