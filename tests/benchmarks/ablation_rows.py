"""What is compared: one change at a time from an experiment, and the clips it trains on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from data_pipeline.pixels.simulate import SimulationSpec
from hopescale.config.compose import load_config, to_tree

HIDDEN = SimulationSpec(partitions=("hidden",), num_train=900, num_heldout=96, size=64)
DATA: dict[str, SimulationSpec] = {
    "full": SimulationSpec(),
    "hidden": HIDDEN,
    "hidden-16": replace(HIDDEN, frames=16),
    "hidden-32": replace(HIDDEN, frames=32),
}
"""Clips by the name of their data set; `full` is what `hopescale demo` makes."""


@dataclass(frozen=True)
class Row:
    """One configuration of a comparison.

    Attributes:
        group: Comparison it belongs to: rows of a group share everything but their changes.
        name: Unique in its group.
        experiment: File of configs/experiment it changes.
        data: Key of `DATA`.
        changes: Settings on top of the experiment.
    """

    group: str
    name: str
    experiment: str
    data: str
    changes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Group and name, as typed to choose it."""
        return f"{self.group}/{self.name}"

    @property
    def settings(self) -> list[str]:
        """What makes its configuration."""
        return [f"experiment={self.experiment}", *self.changes]

    def differences(self) -> dict[str, Any]:
        """Fields of the resolved configuration that differ from the experiment's, with the row's values.

        Raises:
            ConfigError: this version of the model does not take the changes.
        """
        own, plain = _flat(to_tree(load_config(self.settings))), _experiment(self.experiment)
        return {field: value for field, value in own.items() if plain.get(field) != value}


EARLIER_OPTIMIZER = ("optimizer=m3_k2", "optimizer.lr=6e-3")


def _pattern(letters: str) -> str:
    return f"model.block_pattern=[{','.join(letters)}]"


def _rows() -> list[Row]:
    changes = {
        "default": (),
        "meta-grad-fo": ("model.memory.meta_grad=fo",),
        "detach-1": ("model.memory.detach_interval=1",),
        "heads-1": ("model.memory.heads=1",),
        "self-modify-main": ("model.memory.self_modify=[main]",),
        "eta-max-30": ("model.memory.eta_max=30.0",),
        "eta-max-150": ("model.memory.eta_max=150.0",),
        "eta-max-600": ("model.memory.eta_max=600.0",),
        "spatial-mixing": ("model.spatial_mixing=true",),
    }
    changes |= {"-".join(letters): (_pattern(letters),) for letters in ("THT", "TTT", "HHH", "SSS", "UUU")}
    # The optimizer of these rows is not the demo's of today, which was chosen after them.
    rows = [Row("demo", name, "demo", "full", (*EARLIER_OPTIMIZER, *change)) for name, change in changes.items()]
    # S-S-S remembers nothing: what it reaches is reached without memory.
    rows += [
        Row("hidden", "-".join(letters), "hidden", "hidden", (_pattern(letters),))
        for letters in ("SHS", "HHH", "TTT", "THT", "SSS")
    ]
    # Longer clips, fewer of them a step: as many frames a step as the probe.
    rows += [
        Row("length", f"{'-'.join(letters)}-{frames - 1}", "hidden", f"hidden-{frames}", change)
        for frames in (16, 32)
        for letters in ("SHS", "TTT")
        for change in [(_pattern(letters), f"model.frames={frames}", f"train.global_batch={128 // frames}")]
    ]
    return rows + _optimizer_rows()


def _optimizer_rows() -> list[Row]:
    """Time scales of M3's momentum, how slow ones drain, and AdamW, each at three learning rates."""
    kinds = {
        "k1": (1,),
        "k2-mean": (1, 4),
        "k2-sum": (1, 4),
        "k4-mean": (1, 4, 16, 64),
        "k4-sum": (1, 4, 16, 64),
    }
    changes: dict[str, tuple[str, ...]] = {
        name: (
            f"optimizer.levels=[{','.join(f'{{period: {p}, eta: 0.9, theta: 0.1}}' for p in periods)}]",
            f"optimizer.drain={'sum' if name.endswith('sum') else 'mean'}",
        )
        for name, periods in kinds.items()
    }
    changes["adamw"] = ("optimizer=adamw",)
    return [
        Row("optimizer", f"{name}-lr{rate}", "demo", "full", (*change, f"optimizer.lr={rate}"))
        for rate in (1.2e-2, 6e-3, 3e-3)
        for name, change in changes.items()
    ]


@cache
def _experiment(name: str) -> dict[str, Any]:
    return _flat(to_tree(load_config([f"experiment={name}"])))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, part in tree.items() for k, v in _flat(part, f"{prefix}.{name}" if prefix else name).items()}


ROWS = _rows()
