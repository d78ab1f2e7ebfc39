"""What a rank has to work with: figures of data sheets, or fitted to steps that were measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.errors import nearest
from hopescale.errors import ConfigError, Problem


@dataclass(frozen=True)
class Hardware:
    """One rank's device and its links. All rates are a second's."""

    name: str
    memory_bytes: float
    """Of the device."""
    flops_fp32: float
    """Operations of large fp32 products, TF32 off."""
    flops_bf16: float
    """The same in bf16."""
    efficiency: float
    """Share of these rates that the products of a step reach."""
    memory_bandwidth: float
    """Bytes that the device reads and writes, or all those that share a memory."""
    link_bandwidth: float
    """Bytes that a rank sends to others of its node."""
    link_latency: float
    """Seconds that one collective takes to begin, inside a node."""
    network_bandwidth: float
    """Bytes that a rank sends to other nodes."""
    network_latency: float
    """Seconds that one collective takes to begin, between nodes."""
    operator_latency: float
    """Seconds that it takes to hand an operator out."""
    queues: bool
    """Whether a device works on while operators are handed out."""
    overlap: float
    """Share of forward and backward that can hide collectives of parameters and gradients."""
    devices: int | None = None
    """Of a node, where ranks share them and one memory, as CPU cores do; None gives each rank a device of its own."""
    fitted_ranks: int | None = None
    """Most ranks of the steps that the figures were fitted to; None for figures of data sheets."""

    def rate(self, precision: str) -> float:
        """Operations of products in a precision."""
        return self.efficiency * (self.flops_bf16 if precision == "bf16" else self.flops_fp32)

    def share(self, ranks_of_node: int) -> float:
        """Part of a device that each of so many ranks has."""
        return 1.0 if self.devices is None else min(1.0, self.devices / ranks_of_node)

    def memory_share(self, ranks_of_node: int) -> float:
        """Part of the memory's bandwidth that each of so many ranks has."""
        return 1.0 if self.devices is None else 1 / ranks_of_node


def _gpu(name: str, gigabytes: float, fp32: float, bf16: float, memory: float, link: float, network: float) -> Hardware:
    """Of a data sheet: TFLOP/s without sparsity, TB/s, and GB/s one way."""
    rates = (gigabytes * 1e9, fp32 * 1e12, bf16 * 1e12, 0.4, memory * 1e12, link * 1e9, 2e-5, network * 1e9, 4e-5)
    return Hardware(name, *rates, operator_latency=5e-6, queues=True, overlap=0.8)


PRESETS = {
    hardware.name: hardware
    for hardware in (
        _gpu("a100", 80, 19.5, 312, 2.0, 300, 25),
        _gpu("h100", 80, 67, 989, 3.35, 450, 50),
        _gpu("h200", 141, 67, 989, 4.8, 450, 50),
        _gpu("b200", 180, 75, 2250, 8.0, 900, 50),
        _gpu("l40s", 48, 91.6, 362, 0.864, 32, 25),
        # A core of a server, orders of magnitude; nothing is hidden where ranks compute and send with the same core.
        Hardware("cpu", 4e9, 1e11, 4e11, 0.5, 1e10, 1e9, 3e-4, 1e9, 5e-4, 5e-6, queues=False, overlap=0.0),
    )
}
"""NVLink nodes with one 200 or 400 Gb/s adapter a GPU, an l40s on PCIe."""


def hardware_of(given: str | None, device: str) -> Hardware:
    """The hardware that `cluster.hardware` names, or what is planned for without it.

    Args:
        given: name, or path of a JSON file.
        device: `parallel.device`.

    Raises:
        ConfigError: there is no such name or file, or the file's figures are others or out of range.
    """
    name = given or ("cpu" if device == "cpu" else "h100")
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        fix = f"{nearest(name, PRESETS)}, or a .json file of the same figures"
        raise ConfigError(Problem("cluster.hardware", name, f"there is none of this name: {', '.join(PRESETS)}", fix))
    try:
        figures = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        fix = "write one as hopescale/plan/README.md shows, or name one of " + ", ".join(PRESETS)
        raise ConfigError(Problem("cluster.hardware", name, f"cannot be read: {error}", fix)) from None
    return _checked(name, figures)


RANGES = {
    "efficiency": (1e-9, 1.0, False),
    "overlap": (0.0, 1.0, False),
    "link_latency": (0.0, 1e3, False),
    "network_latency": (0.0, 1e3, False),
    "operator_latency": (0.0, 1e3, False),
    "devices": (1, 1e6, True),
    "fitted_ranks": (1, 1e6, True),
}
"""Least, most, and whether whole, of figures that are not just positive."""


def _checked(path: str, figures: object) -> Hardware:
    wanted = {field.name for field in fields(Hardware)}
    optional = {"devices", "fitted_ranks"}
    given = set(figures) if isinstance(figures, dict) else set()
    if not isinstance(figures, dict) or not wanted - optional <= given <= wanted:
        odd = sorted(map(str, (wanted - optional) ^ (given - optional)))
        rule = f"must be an object of {', '.join(sorted(wanted))}; missing or unknown: {', '.join(odd)}"
        raise ConfigError(Problem("cluster.hardware", path, rule, "write it as hopescale/plan/README.md shows"))
    problems = []
    for name, value in figures.items():
        low, high, whole = RANGES.get(name, (1e-9, 1e40, False))
        number = isinstance(value, int) if whole else isinstance(value, int | float)
        plain = {"name": (str, "text"), "queues": (bool, "true or false")}.get(name)
        if plain is not None:
            fine, meant = isinstance(value, plain[0]), plain[1]
        else:
            fine = number and type(value) is not bool and low <= value <= high
            meant = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
        if not (fine or (name in optional and value is None)):
            rule = f"{name}={value!r} must be {meant}"
            problems.append(Problem("cluster.hardware", path, rule, f"give {name} {meant}"))
    if problems:
        raise ConfigError(problems)
    return Hardware(**figures)


class Work(NamedTuple):
    """What a step asks of the busiest rank."""

    flops: float
    """Operations of products, over its share of a device."""
    moved: float
    """Bytes read and written, over its share of the memory."""
    operators: float
    """Handed out in forward and backward, over its share of a device."""
    sent: float
    """Bytes to other ranks, over the same: ranks that share a device send with it too."""
    messages: float
    """Collectives, each as often as ranks wait for each other in it, over the same."""


def fit(base: Hardware, steps: Sequence[tuple[Work, float]], ranks: int) -> Hardware:
    """Hardware of which some steps take the seconds that were measured.

    Fitted are rates of products, memory and the link, and what operators and collectives take to begin: by least
    squares of relative errors, none of the five negative; one that the steps do not tell from the others takes no time.

    Args:
        base: gives the other figures; no operator is taken to hide behind another's work.
        steps: work and seconds of each; of one rank alone, and of several.
        ranks: most that any of them had.
    """
    rows = torch.tensor([[*(amount / seconds for amount in work)] for work, seconds in steps], dtype=torch.float64)
    ones, scale = torch.ones(len(steps), dtype=torch.float64), rows.abs().amax(0).clamp_min(1e-300)
    best: tuple[float, torch.Tensor] | None = None
    for count in range(1, rows.shape[1] + 1):
        for chosen in combinations(range(rows.shape[1]), count):
            part = rows[:, chosen] / scale[list(chosen)]
            found = torch.linalg.lstsq(part, ones, driver="gelsd").solution
            error = float((part @ found - ones).square().sum())
            if bool((found >= 0).all()) and (best is None or error < best[0] - 1e-12):
                each = torch.zeros(rows.shape[1], dtype=torch.float64)
                each[list(chosen)] = found / scale[list(chosen)]
                best = (error, each)
    assert best is not None, "a sum of positive amounts can always be fitted by one of them"
    per_flop, per_byte, per_operator, per_sent, latency = (float(value) for value in best[1])
    flops = 1 / max(per_flop, 1e-30)
    figures = {
        "name": "fitted",
        "flops_fp32": flops,
        "flops_bf16": flops * base.flops_bf16 / base.flops_fp32,
        "efficiency": 1.0,
        "memory_bandwidth": 1 / max(per_byte, 1e-29),
        "link_bandwidth": 1 / max(per_sent, 1e-29),
        "link_latency": latency,
        "operator_latency": per_operator,
        "queues": False,
        "fitted_ranks": ranks,
    }
    return Hardware(**(asdict(base) | figures))
