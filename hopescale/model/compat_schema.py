"""The `model.ac_hope` section, and what `model.compat=ac_hope` makes of the rest of `model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from .schema import ModelConfig, Rule

NonNegative = Annotated[float, Field(ge=0)]

# What compat=ac_hope reads, by section; what else a section has must keep its default.
READ: dict[str, set[str]] = {
    "": {
        *("compat", "ac_hope", "encoder_dim", "grid", "frames", "action_dim", "state_dim", "width", "block_pattern"),
        *("memory", "cms", "spatial_mixing", "temporal_embeddings", "drop_path", "output"),
    },
    "memory": {"hidden_multiplier", "chunk_size", "scope", "detach_interval", "detach_rule"},
    "cms": {"levels"},
    "cms.levels": {"period", "hidden_multiplier"},
}


class AcHopeConfig(BaseModel):
    """What is particular to the predictor of `model.compat=ac_hope`; defaults are those of its phases 4 and 5."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    clip_inner: NonNegative = 1.0
    """Largest norm of the inner gradient of one memory matrix, larger ones are scaled down to it; 0 never clips."""
    clip_backward: NonNegative = 1.0
    """Largest norm of the outer gradient of a written matrix and of a block's output; 0 leaves all gradients exact."""
    surprise_threshold: NonNegative = 0.1
    """A chunk is written if any clip's |value - recalled value|, the mean over tokens, is above this; 0 writes all."""
    rope_heads: Annotated[int, Field(ge=0)] = 0
    """Heads into which queries and keys are split to be turned by rotary positions (phases 1-3: 16); 0 turns none."""


def compat_rules(config: ModelConfig) -> Iterator[Rule]:
    """One for each field that would be ignored, and those of `compat=ac_hope` itself."""
    if config.compat == "none":
        yield from _unread("ac_hope", config.ac_hope, set(), "is ignored with compat=none", "set model.compat=ac_hope")
        return
    ignored, fix = "is ignored with compat=ac_hope", "leave it out"
    yield from _unread("", config, READ[""], ignored, fix)
    for name, section in (("memory", config.memory), ("cms", config.cms)):
        yield from _unread(name, section, READ[name], ignored, fix)
    for number, level in enumerate(config.cms.levels):
        yield from _unread(f"cms.levels.{number}", level, READ["cms.levels"], ignored, fix)
    memory, output, states, heads = config.memory, config.output, config.state_dim, config.ac_hope.rope_heads
    rule, pattern = "compat=ac_hope is made of H blocks alone", config.block_pattern
    yield set(pattern) == {"H"}, "block_pattern", "-".join(pattern), rule, "write one H for each block"
    yield len(config.cms.levels) > 0, "cms.levels", "[]", "compat=ac_hope has at least one level", "add a level"
    rule = "compat=ac_hope shares one memory among the clips of a batch"
    yield memory.scope == "batch", "memory.scope", memory.scope, rule, "set model.memory.scope=batch"
    rule, cuts = "compat=ac_hope cuts the whole path", memory.detach_interval > 0
    fix = "set model.memory.detach_rule=all"
    yield not cuts or memory.detach_rule == "all", "memory.detach_rule", memory.detach_rule, rule, fix
    rule = "compat=ac_hope predicts whole frames"
    yield output == "absolute", "output", output, rule, "set model.output=absolute"
    rule = f"compat=ac_hope takes states as long as an action, action_dim={config.action_dim}, or none"
    yield states in (0, config.action_dim), "state_dim", states, rule, "set it to 0 to have all states taken as 0"
    rule = f"must divide width={config.width} into at least 6 features a head"
    fits = not heads or (config.width % heads == 0 and config.width // heads >= 6)
    yield fits, "ac_hope.rope_heads", heads, rule, "change it, or set 0 for no rotary positions"


def _unread(name: str, section: BaseModel, read: set[str], rule: str, fix: str) -> Iterator[Rule]:
    for field, info in type(section).model_fields.items():
        if field not in read:
            value = getattr(section, field)
            holds = value == info.get_default(call_default_factory=True)
            yield holds, f"{name}.{field}".lstrip("."), value, rule, fix
