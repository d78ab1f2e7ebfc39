from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.metrics.sinks.rank_file import FILE_BYTES, MAGIC, SLOT_BYTES, RankFile, read_rank_file

WRITER = """
import sys
from pathlib import Path
from hopescale.metrics.sinks.rank_file import RankFile
file = RankFile(Path(sys.argv[1]), 0)
number = 0
print("ready", flush=True)
while True:
    number += 1
    # Records of changing length, so that mixing two of them cannot go unnoticed.
    file.write([("loss", {}, number)] * (1 + number * 37 % 400), time=number)
"""


def test_last_record_is_read_and_survives_the_writer(tmp_path: Path):
    file = RankFile(tmp_path / "node", 3)
    assert read_rank_file(file.path) is None
    for number in range(5):
        file.write([("loss", {}, 0.5), ("memory_bytes", {"rank": "3"}, number)], time=10.0 + number)
    file.close()
    assert file.path.name == "rank-00003.bin"
    assert read_rank_file(file.path) == {
        "rank": 3,
        "time": 14.0,
        "samples": [["loss", {}, 0.5], ["memory_bytes", {"rank": "3"}, 4]],
    }


def test_reader_never_sees_a_mixture_while_another_process_writes_until_it_is_killed(tmp_path: Path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    path = tmp_path / "rank-00000.bin"
    try:
        writer.stdout.readline()
        last = 0
        for _ in range(1500):
            record = read_rank_file(path)
            if record is None:
                assert last == 0
                continue
            number = record["time"]
            assert number >= last
            assert record["samples"] == [["loss", {}, number]] * (1 + number * 37 % 400)
            last = number
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert last > 0
    assert read_rank_file(path) is not None


@settings(deadline=None, max_examples=60)
@given(version=st.integers(2, 5), noise=st.binary(min_size=1, max_size=300), start=st.integers(0, 300))
def test_a_writer_killed_in_the_middle_of_a_record_leaves_the_one_before(tmp_path_factory, version, noise, start):
    file = RankFile(tmp_path_factory.mktemp("ranks"), 0)
    for number in range(1, version + 1):
        file.write([("loss", {}, float(number))], time=number)
    under_construction = len(MAGIC) + (version + 1) % 2 * SLOT_BYTES
    content = bytearray(file.path.read_bytes())
    content[under_construction + start : under_construction + start + len(noise)] = noise
    # A slot starts with its version, which is 0 until the record is whole.
    content[under_construction : under_construction + 8] = bytes(8)
    file.path.write_bytes(content)
    record = read_rank_file(file.path)
    assert record is not None
    assert record["time"] == version


@settings(deadline=None, max_examples=60)
@given(position=st.integers(0, 60), bit=st.integers(0, 7))
def test_a_damaged_record_is_not_served(tmp_path_factory, position, bit):
    file = RankFile(tmp_path_factory.mktemp("ranks"), 0)
    file.write([("loss", {}, 1.0)], time=1)
    content = bytearray(file.path.read_bytes())
    content[len(MAGIC) + SLOT_BYTES + position] ^= 1 << bit
    file.path.write_bytes(content)
    assert read_rank_file(file.path, attempts=2) is None


def test_the_file_has_a_fixed_size_on_disk_and_foreign_files_are_no_records(tmp_path: Path):
    file = RankFile(tmp_path, 0)
    status = file.path.stat()
    assert status.st_size == FILE_BYTES
    assert status.st_blocks * 512 >= FILE_BYTES
    assert status.st_mode & 0o077 == 0
    (tmp_path / "rank-00001.bin").write_bytes(b"something else")
    assert read_rank_file(tmp_path / "rank-00001.bin") is None


def test_a_record_that_does_not_fit_is_an_error_and_keeps_the_last_one(tmp_path: Path):
    file = RankFile(tmp_path, 0)
    file.write([("loss", {}, 1.0)], time=1)
    with pytest.raises(ValueError, match="does not fit"):
        file.write([("loss", {}, 1.0)] * 5000, time=2)
    record = read_rank_file(file.path)
    assert record is not None
    assert record["time"] == 1


def test_a_full_catalog_fits(tmp_path: Path):
    from hopescale.metrics.catalog import CATALOG, OF_THE_RUN

    samples = [
        (metric.key, {name: "x" * (64 if name == "group" else 12) for name in metric.labels}, 1.2345678901234567e-123)
        for metric in CATALOG
        for _ in range(metric.overall + max(1, len(metric.label_values), OF_THE_RUN.get("".join(metric.labels), 0)))
    ]
    RankFile(tmp_path, 0).write(samples, time=1.0)
