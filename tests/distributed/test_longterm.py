"""What long-term memories carry over depends neither on the number of ranks nor on where a run was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]

PROGRAM = Path(__file__).parent / "longterm_program.py"


def test_sharded_long_term_memories_equal_the_unsharded_reference_and_resume_bit_for_bit(
    torchrun, tmp_path: Path
) -> None:
    out = tmp_path / "seen.json"
    run = torchrun(2, PROGRAM, str(out), timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    for every, seen in json.loads(out.read_text()).items():
        assert {name: error for name, error in seen["errors"].items() if error > 1e-5} == {}, every
        assert all(error < 1e-5 for error in seen["waiting_errors"])
        assert seen["differs_after_resuming"] == []
        assert seen["differs_between_ranks"] == []
        assert seen["smallest_carried"] > 1e-3
        assert seen["rows_lost"] == []
        memories = [f"blocks.{n}.memory.longterm" for n in (0, 1)]
        expected = [f"model/{name}.carried{part}" for name in memories for part in (1, 2)]
        # Three steps with a move every second one leave one step waiting.
        expected += [f"waiting/{name}.waiting{part}" for name in memories for part in (1, 2) if every == "2"]
        assert seen["names"] == sorted(expected)
