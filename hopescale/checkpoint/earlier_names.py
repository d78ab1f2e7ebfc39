"""Checkpoints of the earlier AC-HOPE-ViT predictor: what their tensors are called, and what they become here.

The five memories of a block, five modules there, are stacked here; everything else is renamed (`origin`). Reading is
weights only: of hyper-parameters kept as omegaconf objects nothing is made, and a file that holds anything else but
tensors in plain containers is refused, never unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import count
from math import isqrt
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple, Self

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

OMEGACONF = (
    *("omegaconf.listconfig.ListConfig", "omegaconf.dictconfig.DictConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes")),
    *(f"typing.{name}" for name in ("Any", "List", "Dict")),
    *(f"builtins.{name}" for name in ("dict", "list", "int", "float", "str", "bool", "bytes")),
)
"""What a Lightning checkpoint names for hyper-parameters that Hydra gave: containers, nodes, and the types in them."""

TO_CONVERT = (
    "if you trust the file, run where the file was made: python -c \"import torch; torch.save(torch.load('IN.ckpt', "
    "map_location='cpu', weights_only=False)['state_dict'], 'OUT.pt')\", and import OUT.pt"
)


class ForeignCheckpoint(UserError):
    """A file of the earlier predictor that cannot be taken over."""


class _Inert:
    """Stands in for an object that is left unread: made of anything, filled with anything, it holds nothing."""

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


def _inert_dict(*_: object) -> dict[object, object]:
    # In place of a defaultdict, which the reader of weights does not fill.
    return {}


# Built-in types too: of what a file asks to be made of them, however large, nothing is.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((type(path.rpartition(".")[2], (_Inert,), {}), path) for path in OMEGACONF),
    (_inert_dict, "collections.defaultdict"),
]


def read_tensors(source: Path) -> dict[str, Tensor]:
    """The tensors of a Lightning checkpoint or a bare state dict, by their names without wrappers.

    Raises:
        ForeignCheckpoint: the file is not there, holds objects whose reading could run code, holds no state dict, or
            one of tensors that are sparse, quantised, complex, nested or without numbers.
    """
    if not source.is_file():
        raise _refused(source, "is not a file", "name a .ckpt or a file of torch.save")
    with torch.serialization.safe_globals(_STAND_INS):
        loaded = _load(source)
    found = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not _is_state_dict(found):
        inside = ", ".join(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise _refused(source, f"holds no state dict, but {inside}", "save model.state_dict() and import that")
    plain: dict[str, list[str]] = {}
    for name in found:
        plain.setdefault(_unwrapped(name), []).append(name)
    twice = [names for names in plain.values() if len(names) > 1]
    if twice:
        rule = f"holds tensors twice: {'; '.join(' and '.join(names) for names in twice)}"
        raise _refused(source, rule, "keep one copy of the weights in the file")
    if odd := [name for name, tensor in found.items() if not _is_dense(tensor)]:
        rule = f"holds {len(odd)} tensors that are not dense real numbers: {', '.join(odd)}"
        raise _refused(source, rule, "save dense fp32 copies of them")
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


def _is_state_dict(found: object) -> bool:
    if not isinstance(found, dict) or not found:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())


def _is_dense(tensor: Tensor) -> bool:
    odd = tensor.is_nested or tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    return not odd and tensor.layout == torch.strided


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
    fitting = [name for name in there if tuple(found[name].shape) == shapes[name]]
    misshaped = [
        f"{name} is {list(found[name].shape)}, to be {list(shapes[name])}" for name in there if name not in fitting
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
            "holds {} tensors with values that are, in fp32, not finite",
            [name for name in fitting if not bool(torch.isfinite(found[name].float()).all())],
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
    """Fields of `model` that the shapes of a file tell; what they cannot tell, or not in a sound shape, is left out."""
    place_name, mixing_name = "frame_pos_embed.weight", "hope_blocks.0.spatial_mix.0.weight"
    sizes: dict[str, object] = {"temporal_embeddings": place_name in found, "spatial_mixing": mixing_name in found}
    if (width := _width(found)) is not None:
        sizes["width"] = width
    embed = _matrix(found, "predictor_embed.weight")
    if embed is not None and embed[0] == width:
        sizes["encoder_dim"] = embed[1]
    memory = _matrix(found, "hope_blocks.0.M_k.w1.weight")
    if memory is not None and memory[1] == width:
        sizes["memory.hidden_multiplier"] = memory[0] / memory[1]
    action = _matrix(found, "action_encoder.weight")
    if action is not None and action[0] == width:
        sizes["action_dim"] = action[1]
    places = _matrix(found, place_name)
    if places is not None and places[0] >= 4 and places[1] == width:
        sizes["frames"] = places[0] - 2
    mixing = _matrix(found, mixing_name)
    if mixing is not None and mixing[0] == mixing[1] > 2 and (side := isqrt(mixing[0] - 2)) ** 2 == mixing[0] - 2:
        sizes["grid"] = [side, side]
    if depth := _count(found, "hope_blocks."):
        sizes["block_pattern"] = ["H"] * depth
    return sizes


def level_multipliers(found: Mapping[str, Tensor]) -> list[float]:
    """Hidden multipliers of the CMS levels of the first block; none if one of the levels does not tell its own."""
    levels, width = _count(found, "hope_blocks.0.cms.blocks."), _width(found)
    shapes = [_matrix(found, f"hope_blocks.0.cms.blocks.{n}.fc1.weight") for n in range(levels)]
    multipliers = [shape[0] / shape[1] for shape in shapes if shape is not None and shape[1] == width]
    return multipliers if len(multipliers) == levels else []


def _width(found: Mapping[str, Tensor]) -> int | None:
    """What most of three tensors say, so that one of another shape does not make all others look wrong."""
    tensors = [found.get(name) for name in ("predictor_embed.weight", "action_encoder.weight", "predictor_norm.weight")]
    sizes = [tensor.shape[0] for tensor in tensors if tensor is not None and tensor.ndim in (1, 2) and tensor.numel()]
    return mode(sizes) if sizes else None


def _matrix(found: Mapping[str, Tensor], name: str) -> tuple[int, int] | None:
    """Rows and columns of a tensor, if it is there, is a matrix and is not empty."""
    tensor = found.get(name)
    return None if tensor is None or tensor.ndim != 2 or not tensor.numel() else (tensor.shape[0], tensor.shape[1])


def _count(names: Iterable[str], prefix: str) -> int:
    """How many of the numbers 0, 1, ... follow a prefix, up to the first that does not."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    return next(n for n in count() if str(n) not in numbers)


def _refused(source: Path, rule: str, fix: str) -> ForeignCheckpoint:
    return ForeignCheckpoint(Problem("checkpoint", source, rule, fix))
