"""Programs that a test writes to be called in place of real ones."""

from __future__ import annotations

from pathlib import Path


def write_program(folder: Path, name: str, *lines: str) -> None:
    """Write a script for bash that everybody may run."""
    program = folder / name
    program.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    program.chmod(0o755)
