"""Checkpoints of the earlier AC-HOPE-ViT predictor: what their tensors are called, and what they become here.

The five memories of a block, five modules there, are stacked here; everything else is renamed (`origin`). Reading is
weights only: a file that holds anything but tensors in plain containers is refused, never unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hopescale.errors import Problem, UserError

MEMORY_MODULES = ["M_k", "M_v", "M_eta", "M_alpha", "M_memory"]
"""In the order of `model.schema.MEMORIES`."""
STACKED = {"w1": "w1.weight", "w2": "w2.weight", "norm_weight": "norm.weight", "norm_bias": "norm.bias"}

TOP_LEVEL = {
    "embed": "predictor_embed",
    "frame_position": "frame_pos_embed",
    "target_position": "target_pos_embed",
    "norm": "predictor_norm",
    "project": "predictor_proj",
}
"""Modules that are called otherwise; action_encoder, state_encoder and extrinsics_encoder keep their names."""

IN_BLOCK = {
    "memory.query.": "q_proj.",
    "memory.out.": "out_proj.",
    "memory.longterm.gate.": "longterm_gate.",
    "cms.levels.": "cms.blocks.",
    "spatial_mixing.first.": "spatial_mix.0.",
    "spatial_mixing.second.": "spatial_mix.2.",
}
"""Beginnings that are called otherwise; norms keep their names."""

WRAPPERS_IN_FRONT = ("model.", "module.")
WRAPPERS_ANYWHERE = ("_orig_mod.", "_checkpoint_wrapped_module.")

NEVER_USED = ("extrinsics_encoder.weight", "extrinsics_encoder.bias")
"""In every file, and in no computation of the runs they come from."""

LONG_TERM = "M_longterm"
LONG_TERM_ALONE = (f".{LONG_TERM}.", ".longterm_gate.")

TO_CONVERT = (
    "if you trust the file, run where the file was made: python -c \"import torch; torch.save(torch.load('IN.ckpt', "
    "map_location='cpu', weights_only=False)['state_dict'], 'OUT.pt')\", and import OUT.pt"
)


class ForeignCheckpoint(UserError):
    """A file of the earlier predictor that cannot be taken over."""


def read_tensors(source: Path) -> dict[str, Tensor]:
    """The tensors of a Lightning checkpoint or a bare state dict, by their names without wrappers.

    Raises:
        ForeignCheckpoint: the file is not there, holds more than tensors, or holds no state dict.
    """
    if not source.is_file():
        raise _refused(source, "is not a file", "name a .ckpt or a file of torch.save")
    loaded = _load(source)
    found = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        inside = ", ".join(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise _refused(source, f"holds no state dict, but {inside}", "save model.state_dict() and import that")
    plain: dict[str, list[str]] = {}
    for name in found:
        plain.setdefault(_unwrapped(name), []).append(name)
    twice = [names for names in plain.values() if len(names) > 1]
    if twice:
        rule = f"holds tensors twice: {'; '.join(' and '.join(names) for names in twice)}"
        raise _refused(source, rule, "keep one copy of the weights in the file")
    return {name: found[names[0]] for name, names in plain.items()}


def _load(source: Path) -> Any:
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:
        needed = []  # not an archive that can be listed: loading says what it is
    if needed:
        rule = f"holds more than tensors ({', '.join(sorted(needed))}), and reading such objects can run any code"
        raise _refused(source, rule, TO_CONVERT)
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file can provoke
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        rule = f"cannot be read as tensors alone ({reason})"
        raise _refused(source, rule, f"check that it is whole; else, {TO_CONVERT}") from error


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS_ANYWHERE:
        name = name.replace(wrapper, "")
    while name.startswith(WRAPPERS_IN_FRONT):
        name = name.partition(".")[2]
    return name


class Origin(NamedTuple):
    """What a parameter of ours is made of."""

    names: list[str]
    """Earlier tensors: one, or one for each memory."""
    stacked: bool
    """Whether they are stacked, each with the dims of a matrix or a vector alone."""

    def piece_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one earlier tensor of a parameter of this shape."""
        if not self.stacked:
            return shape
        return shape[2:] if len(shape) == 4 else shape[1:]


def origin(name: str) -> Origin:
    """Where a parameter of ours comes from."""
    if not name.startswith("blocks."):
        module, _, kind = name.rpartition(".")
        return Origin([f"{TOP_LEVEL.get(module, module)}.{kind}"], stacked=False)
    _, number, inside = name.split(".", 2)
    block, (where, _, last) = f"hope_blocks.{number}.", inside.rpartition(".")
    if last in STACKED and where in ("memory", "memory.longterm"):
        modules = MEMORY_MODULES if where == "memory" else [LONG_TERM]
        return Origin([f"{block}{module}.{STACKED[last]}" for module in modules], stacked=True)
    for ours, theirs in IN_BLOCK.items():
        if inside.startswith(ours):
            return Origin([block + theirs + inside.removeprefix(ours)], stacked=False)
    return Origin([block + inside], stacked=False)


class Conversion(NamedTuple):
    """What became of a file."""

    tensors: dict[str, Tensor]
    """fp32, by the names of our parameters."""
    unused: list[str]
    """Tensors of the file that no model here has a use for."""


def convert(found: Mapping[str, Tensor], model: nn.Module, source: Path) -> Conversion:
    """Tensors for every parameter of a model.

    Args:
        found: tensors of the file, by plain name.
        model: its parameters tell names and shapes; it is left as it is.
        source: the file, for errors.

    Raises:
        ForeignCheckpoint: everything that is missing, left over, of another shape, or not finite.
    """
    wanted = {name: (origin(name), tuple(p.shape)) for name, p in model.named_parameters()}
    shapes = {theirs: made.piece_shape(shape) for made, shape in wanted.values() for theirs in made.names}
    unused = [name for name in NEVER_USED if name in found and name not in shapes]
    left = sorted(set(found) - set(shapes) - set(unused))
    long_term = [name for name in left if any(part in name for part in LONG_TERM_ALONE)]
    there = [name for name in shapes if name in found]
    misshaped = [
        f"{name} is {list(found[name].shape)}, to be {list(shapes[name])}"
        for name in there
        if tuple(found[name].shape) != shapes[name]
    ]
    fix = "pick the experiment the file was trained with, or set the model.* sizes to its own"
    findings = [
        ("lacks {} of the configuration's tensors", [name for name in shapes if name not in found], fix),
        ("holds {} tensors the configuration has no place for", sorted(set(left) - set(long_term)), fix),
        ("holds {} tensors of another shape", misshaped, fix),
        (
            "holds {} tensors of a long-term memory (phases 6 and 7), which the configuration has not",
            long_term,
            "pick experiment=phase6 or phase7, without compat=ac_hope, which ends with phase 5",
        ),
        (
            "holds {} tensors with values that are not finite",
            [name for name in there if not bool(torch.isfinite(found[name]).all())],
            "import an earlier checkpoint of that run",
        ),
    ]
    problems = [
        Problem("checkpoint", source, f"{rule.format(len(names))}: {', '.join(names)}", fix)
        for rule, names, fix in findings
        if names
    ]
    if problems:
        raise ForeignCheckpoint(problems)
    tensors = {
        name: torch.stack([found[piece].float() for piece in made.names]).reshape(shape)
        for name, (made, shape) in wanted.items()
    }
    return Conversion(tensors, unused)


def inferred_sizes(found: Mapping[str, Tensor]) -> dict[str, object]:
    """Fields of `model` that the shapes of a file tell; what they cannot tell is left out."""
    embed, action = found.get("predictor_embed.weight"), found.get("action_encoder.weight")
    places, mixing = found.get("frame_pos_embed.weight"), found.get("hope_blocks.0.spatial_mix.0.weight")
    memory = found.get("hope_blocks.0.M_k.w1.weight")
    sizes: dict[str, object] = {"temporal_embeddings": places is not None, "spatial_mixing": mixing is not None}
    if embed is not None and embed.ndim == 2:
        sizes |= {"width": embed.shape[0], "encoder_dim": embed.shape[1]}
        if memory is not None:
            sizes["memory.hidden_multiplier"] = memory.shape[0] / embed.shape[0]
    if action is not None:
        sizes["action_dim"] = action.shape[-1]
    if places is not None:
        sizes["frames"] = places.shape[0] - 2
    if mixing is not None and (side := round((mixing.shape[0] - 2) ** 0.5)) ** 2 == mixing.shape[0] - 2:
        sizes["grid"] = [side, side]
    if depth := _count(found, "hope_blocks."):
        sizes["block_pattern"] = ["H"] * depth
    return sizes


def level_multipliers(found: Mapping[str, Tensor]) -> list[float]:
    """Hidden multipliers of the CMS levels of the first block."""
    levels = _count(found, "hope_blocks.0.cms.blocks.")
    shapes = [found[name].shape for n in range(levels) if (name := f"hope_blocks.0.cms.blocks.{n}.fc1.weight") in found]
    return [shape[0] / shape[1] for shape in shapes if len(shape) == 2]


def _count(names: Iterable[str], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _refused(source: Path, rule: str, fix: str) -> ForeignCheckpoint:
    return ForeignCheckpoint(Problem("checkpoint", source, rule, fix))
