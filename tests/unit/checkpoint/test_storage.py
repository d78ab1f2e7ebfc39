from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from hopescale.checkpoint.manager import load_tensors
from hopescale.checkpoint.storage import ALIGNMENT, TENSORS_FILE, RawReader, RawWriter
from hopescale.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_rank")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(5, 3, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "double": torch.randn(3, dtype=torch.float64, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "counts": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


def save(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(content, storage_writer=RawWriter(folder, 0), planner=planner)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "saved", tensors())
    return tmp_path / "saved"


def blank() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


def test_tensors_come_back_bit_equal(saved: Path) -> None:
    into = blank()
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    load_tensors(saved, into)
    for name, expected in tensors().items():
        assert torch.equal(into[name], expected), name
        assert into[name].data_ptr() == places[name]


def test_a_part_of_the_tensors_can_be_loaded(saved: Path) -> None:
    into = {"scalar": torch.zeros(())}
    load_tensors(saved, into)
    assert into["scalar"].item() == 2.5


def test_files_hold_raw_bytes_and_json(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["rank-00000.bin", TENSORS_FILE]
    listed = json.loads((saved / TENSORS_FILE).read_text())
    assert listed.keys() == tensors().keys()
    raw = (saved / "rank-00000.bin").read_bytes()
    for name, expected in tensors().items():
        entry = listed[name]
        (piece,) = entry["pieces"]
        assert entry["shape"] == list(expected.shape) == piece["shape"]
        assert piece["begin"] % ALIGNMENT == 0
        content = raw[piece["begin"] : piece["begin"] + piece["num_bytes"]]
        assert content == expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_a_folder_is_written_once(saved: Path) -> None:
    with pytest.raises(CheckpointException, match=r"rank-00000\.bin"):
        save(saved, tensors())


def test_only_tensors_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="is not a tensor"):
        save(tmp_path / "saved", {"step": 3})


@pytest.mark.parametrize(
    ("name", "into"),
    [
        ("absent", torch.zeros(2)),
        ("matrix", torch.zeros(3, 5)),
        ("matrix", torch.zeros(5, 3, dtype=torch.float64)),
    ],
)
def test_tensors_of_another_name_shape_or_dtype_are_refused(saved: Path, name: str, into: Tensor) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} must be {re.escape(str(list(into.shape)))} {into.dtype}"):
        load_tensors(saved, {name: into})


def craft(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the entry of `matrix`: 5 x 3 floats in one piece."""
    listed = json.loads((folder / TENSORS_FILE).read_text())
    change(listed["matrix"])
    (folder / TENSORS_FILE).write_text(json.dumps(listed))


def piece(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entry: entry["pieces"][0].update(fields)


CRAFTED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a path upwards": piece(file="../secret.bin"),
    "an absolute path": piece(file="/etc/passwd"),
    "a path downwards": piece(file="folder/rank-00000.bin"),
    "the folder itself": piece(file=".."),
    "fewer bytes than the shape takes": piece(num_bytes=56),
    "more bytes than the shape takes": piece(num_bytes=64),
    "a negative place": piece(begin=-64),
    "a place past the end of the file": piece(begin=1 << 40),
    "a negative start": piece(start=[-1, 0]),
    "a start of other rank": piece(start=[0]),
    "a negative shape": piece(shape=[-5, -3]),
    "a piece beyond its tensor": piece(start=[1, 0]),
    "a piece that is not all of its tensor": piece(shape=[4, 3], num_bytes=48),
    "no piece at all": lambda entry: entry["pieces"].clear(),
    "two pieces in one place": lambda entry: entry["pieces"].append(dict(entry["pieces"][0])),
    "pieces that overlap and leave a gap": lambda entry: entry.update(
        pieces=[
            {**entry["pieces"][0], "shape": [3, 3], "num_bytes": 36},
            {**entry["pieces"][0], "start": [2, 0], "shape": [2, 3], "num_bytes": 24},
        ]
    ),
    "an unknown dtype": lambda entry: entry.update(dtype="complex128"),
    "an unknown dtype without pieces": lambda entry: entry.update(dtype="object", pieces=[]),
    "a dtype of another size": lambda entry: entry.update(dtype="float64"),
    "a missing field": lambda entry: entry["pieces"][0].pop("begin"),
    "a text in place of a number": piece(begin="0"),
    "a fraction in place of a number": piece(begin=0.5),
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED.keys())
def test_a_crafted_list_of_tensors_is_refused(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    (saved.parent / "secret.bin").write_bytes(bytes(4096))
    craft(saved, change)
    into = torch.full((5, 3), 7.0)
    with pytest.raises(CheckpointError):
        load_tensors(saved, {"matrix": into})
    assert (into == 7).all()


def test_a_list_of_tensors_that_is_not_json_is_refused(saved: Path) -> None:
    (saved / TENSORS_FILE).write_text("{")
    with pytest.raises(CheckpointError):
        RawReader(saved).read_metadata()
