"""The `model` section of the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .compat_schema import AcHopeConfig, compat_rules

SECTION = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

BlockKind = Literal["S", "T", "H", "U"]
MemoryName = Literal["key", "value", "eta", "alpha", "main"]
MEMORIES: tuple[MemoryName, ...] = ("key", "value", "eta", "alpha", "main")

Rule = tuple[bool, str, object, str, str]
"""Whether a rule between fields of a section holds; then field, value, rule and fix for the error if it does not."""


def require(rules: Iterable[Rule]) -> None:
    """Raise one error for all rules that do not hold; the composer takes it apart again."""
    broken = [rule for holds, *rule in rules if not holds]
    if broken:
        text = "; ".join(f"{field}={value} {rule} (fix: {fix})" for field, value, rule, fix in broken)
        raise PydanticCustomError("rules", "{text}", {"text": text, "problems": broken})


class MemoryConfig(BaseModel):
    """Titan memories: the five self-modifying ones of an H block, and the single one of a U block."""

    model_config = SECTION

    heads: PositiveInt = 1
    """Independent slices of the width; each head has its own matrices, gates, step sizes and write limit."""
    hidden_multiplier: Annotated[float, Field(gt=0)] = 4.0
    """Hidden features of a memory per feature of width; times width / heads it must be whole."""
    chunk_size: PositiveInt = 1
    """Frames between two memory writes; reads inside a chunk see the memory as it was before the chunk."""
    chunk_rule: Literal["frame_step", "token_exact", "scan"] = "frame_step"
    """How a chunk is written: frame_step takes one gradient step on all its tokens, token_exact the paper's recurrence
    token by token, scan takes the gradients of all chunks at the trained memories and only adds them up in order."""
    meta_grad: Literal["fo", "fo_kv", "so", "straight_through"] = "fo_kv"
    """What the outer gradient sees of a write: fo step sizes and retention, fo_kv also keys and targets, so all;
    straight_through nothing, but every read trains the memories as they were at the start."""
    scope: Literal["clip", "batch"] = "clip"
    """clip gives every clip memories of its own; batch shares one set among the clips of a micro-batch, so that results
    depend on which clips meet (one rank and one micro-batch only)."""
    preconditioner: bool = True
    """Erases along a key before writing to it, the rank-1 preconditioner of the delta rule."""
    retention: bool = True
    """Lets memories decay by the alpha memory's gate; false keeps all of what was written."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a memory's last write that is added to its next one; costs a second copy of every written memory."""
    surprise_gate: Annotated[float, Field(ge=0, lt=2)] = 0.0
    """A clip's chunk is written only if its normalised surprise (0 to 2) is at least this; fresh memories show 0.001 to
    0.01, and the metric memory_surprise what trained ones do."""
    detach_interval: Annotated[int, Field(ge=0)] = 0
    """Writes between two cuts of the outer gradient's path through the memories; 0 never cuts."""
    detach_rule: Literal["keep_start", "all"] = "keep_start"
    """What a cut leaves: keep_start the path to the trained memories, all nothing, so late frames hardly train them."""
    eta_max: Annotated[float, Field(gt=0)] = 30.0
    """Largest summed step size of one write; a token's own step is at most eta_max / tokens in the chunk."""
    retention_bias: float = 4.0
    """Logit added to the retention gate; 4 keeps 98.2 % of a memory per chunk at initialisation."""
    write_limit: Annotated[float, Field(gt=0)] = 0.1
    """Upper bound of what one chunk writes, its norm as a share of the written matrix's norm, approached smoothly; with
    momentum a write adds up to 1 / (1 - momentum) times as much."""
    self_modify: Annotated[tuple[MemoryName, ...], Field(strict=False)] = MEMORIES
    """Memories that are written during a clip; the others are only read."""

    @field_validator("self_modify")
    @classmethod
    def _each_memory_once(cls, names: tuple[MemoryName, ...]) -> tuple[MemoryName, ...]:
        if len(set(names)) != len(names):
            raise ValueError("names each memory at most once")
        return names

    @model_validator(mode="after")
    def _nothing_set_in_vain(self) -> MemoryConfig:
        # Against defaults, not against what was typed: a resolved configuration that is read again holds everything.
        fields = type(self).model_fields
        changed = {name for name, value in self if value != fields[name].default}
        if not self.retention and "retention_bias" in changed:
            raise ValueError(f"retention_bias={self.retention_bias:g} is ignored with retention=false: leave it out")
        if "detach_rule" in changed and not self.detach_interval:
            raise ValueError("detach_rule is ignored with detach_interval=0: set detach_interval, or leave it out")
        if self.meta_grad == "straight_through" and self.detach_interval:
            raise ValueError("detach_interval is ignored with meta_grad=straight_through, which cuts at every write")
        if self.self_modify and "main" not in self.self_modify:
            raise ValueError("self_modify must hold main or nothing: the others reach the output through main alone")
        if self.chunk_rule == "scan" and self.self_modify not in ((), ("main",), MEMORIES):
            raise ValueError("chunk_rule=scan reads all memories but main at the start alone: set self_modify=[main]")
        ignored = changed - {"heads", "hidden_multiplier", "scope", "self_modify"}
        if not self.self_modify and ignored:
            raise ValueError(f"{', '.join(sorted(ignored))} is ignored with self_modify=[]: no memory is written")
        return self


class LongTermConfig(BaseModel):
    """One more memory in every H and U block, which starts each clip where the clips before it have left it."""

    model_config = SECTION

    hidden_multiplier: Annotated[float, Field(gt=0)] = 2.0
    """Hidden features of the memory per feature of width; times width / memory.heads it must be whole."""
    gate: Literal["input", "retrieval"] = "input"
    """What decides for each token how much of what it recalls counts: the token (input), or also what it recalls."""
    retention_floor: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Share of the memory that one write keeps at least, whatever the block's own gate says."""
    ema: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the way towards what the clips of one optimizer step have left in it that its start moves."""
    sync_every: PositiveInt = 1
    """Optimizer steps between two moves, each by the mean over the clips of all ranks since the last one."""


class CmsLevel(BaseModel):
    """One level of the Continuum Memory System: a residual MLP with its own period."""

    model_config = SECTION

    period: PositiveInt = 1
    """Pace of the level: frame_mask applies it to every so many frames, param_period trains it every so many steps,
    online writes it before every so many frames."""
    hidden_multiplier: Annotated[float, Field(gt=0)] = 4.0
    """Hidden features of the level per feature of width; times width it must be whole."""
    teach_scale: Annotated[float, Field(ge=0)] | None = None
    """Step size of the level's own writes (mode online only); null takes cms.online.teach_scale."""


class OnlineConfig(BaseModel):
    """How strongly CMS levels learn within a clip (cms.mode online only)."""

    model_config = SECTION

    teach_scale: Annotated[float, Field(ge=0)] = 0.1
    """Step size of a write, for levels that set none of their own; 0 writes nothing."""
    teach_clip: Annotated[float, Field(gt=0)] = 5.0
    """Largest teach signal of a clip and frame: the root mean square, over patches, of its length over features."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which all scales rise linearly from 0."""
    decay_start: Annotated[int, Field(ge=0)] | None = None
    """Optimizer step after which all scales fall linearly; null never lowers them."""
    decay_end: Annotated[int, Field(ge=1)] | None = None
    """Optimizer step at which they reach 0, to stay there; null as long as decay_start is."""

    @model_validator(mode="after")
    def _phases_fit(self) -> OnlineConfig:
        start, end = self.decay_start, self.decay_end
        if (start is None) != (end is None):
            raise ValueError(f"decay_start={start} and decay_end={end} need each other: set both, or none")
        if start is not None and end is not None and not self.warmup_steps <= start < end:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, decay_start={start} and decay_end={end} must be in order"
            )
        return self


class CmsConfig(BaseModel):
    """The Continuum Memory System of an H or U block."""

    model_config = SECTION

    mode: Literal["frame_mask", "param_period", "online"] = "frame_mask"
    """How levels differ in pace: frame_mask applies a level only to every period-th frame; param_period applies all to
    every frame, and a level's parameters step once every period steps, on the sum of their gradients; online applies
    all to every frame, and a clip's own copy of a level learns every period frames from what was predicted wrong."""
    levels: Annotated[tuple[CmsLevel, ...], Field(strict=False)] = (
        CmsLevel(period=1, hidden_multiplier=2.0),
        CmsLevel(period=3, hidden_multiplier=2.5),
        CmsLevel(period=7, hidden_multiplier=3.0),
    )
    """Levels in order of application, fastest first; an empty list leaves the CMS out."""
    online: OnlineConfig = OnlineConfig()

    @model_validator(mode="after")
    def _nothing_set_in_vain(self) -> CmsConfig:
        require(self._online_rules())
        return self

    def _online_rules(self) -> Iterator[Rule]:
        online = self.mode == "online"
        rule, fix = f"is ignored with cms.mode={self.mode}", "leave it out, or set cms.mode=online"
        yield online or self.online == OnlineConfig(), "online", "the section", rule, fix
        for number, level in enumerate(self.levels):
            yield online or level.teach_scale is None, f"levels.{number}.teach_scale", level.teach_scale, rule, fix
        yield not online or len(self.levels) > 0, "levels", "[]", "leaves cms.mode=online nothing to teach", "add one"

    @property
    def frame_periods(self) -> tuple[int, ...]:
        """Frames from one that each level touches to the next."""
        return tuple(level.period if self.mode == "frame_mask" else 1 for level in self.levels)

    @property
    def parameter_periods(self) -> dict[str, int]:
        """Optimizer steps between two steps of each level's parameters, by name pattern; empty unless param_period."""
        if self.mode != "param_period":
            return {}
        return {f"*.cms.levels.{number}.*": level.period for number, level in enumerate(self.levels)}


class AttentionConfig(BaseModel):
    """Attention of S, T and U blocks."""

    model_config = SECTION

    heads: PositiveInt = 16
    """Attention heads; must divide width, with an even number of at least 6 features a head for rotary positions."""
    mlp_multiplier: Annotated[float, Field(gt=0)] = 4.0
    """Hidden features of the MLP of S and T blocks per feature of width; times width it must be whole."""


class ModelConfig(BaseModel):
    """The predictor: shapes of its input, and what it is built from."""

    model_config = SECTION

    encoder_dim: PositiveInt = 1024
    """Channels of one stored token (E)."""
    grid: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = (16, 16)
    """Rows and columns of patch tokens in a frame; their product is the tokens per frame (N)."""
    frames: Annotated[int, Field(ge=2)] = 8
    """Longest clip in stored frames (F); transitions are one fewer."""
    action_dim: PositiveInt = 2
    """Numbers in one action (A)."""
    state_dim: Annotated[int, Field(ge=0)] = 0
    """Numbers in one state (S); 0 leaves out the state token and its encoder."""
    extrinsics_dim: Annotated[int, Field(ge=0)] = 0
    """Numbers in a camera's extrinsics; 0 leaves out their encoder. They are added to every patch, without a token."""
    width: PositiveInt = 384
    """Features of a token inside the predictor (D)."""
    block_pattern: Annotated[tuple[BlockKind, ...], Field(strict=False, min_length=1)] = ("S", "H", "S")
    """Blocks in order: S attention within each frame, T frame-causal attention over all frames, H HOPE, U all in one:
    attention over all frames, a single memory, CMS."""
    memory: MemoryConfig = MemoryConfig()
    longterm: LongTermConfig | None = None
    """Memories that outlive a clip; null leaves them out."""
    cms: CmsConfig = CmsConfig()
    attention: AttentionConfig = AttentionConfig()
    spatial_mixing: bool = False
    """Adds a learned mixing over the tokens of a frame to H blocks."""
    patch_position: Literal["none", "sincos"] = "none"
    """Adds fixed positions to patch tokens, for encoders whose features do not tell where a token lies."""
    temporal_embeddings: bool = True
    """Adds a trained embedding of the frame's number to every token, and in a jump one of the target's number."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that a clip skips a branch of the last block; it falls linearly to 0 at the first block."""
    output: Literal["residual", "absolute"] = "residual"
    """Whether the predictor emits the change from the newest frame or the whole next frame."""
    compat: Literal["none", "ac_hope"] = "none"
    """ac_hope computes exactly what an earlier public predictor did (AC-HOPE-ViT, pure HOPE), for its checkpoints."""
    ac_hope: AcHopeConfig = AcHopeConfig()

    @property
    def max_frames(self) -> int:
        """Frames a pass may number: two more than the longest clip has, for predictions past its end."""
        return self.frames + 2

    @property
    def num_patches(self) -> int:
        """Patch tokens in a frame (N)."""
        return self.grid[0] * self.grid[1]

    @property
    def num_conditioning(self) -> int:
        """Conditioning tokens in a frame: the action's, and the state's where there is one."""
        return 1 + (self.state_dim > 0 or self.compat == "ac_hope")

    @property
    def num_tokens(self) -> int:
        """All tokens in a frame (P)."""
        return self.num_patches + self.num_conditioning

    @property
    def can_jump(self) -> bool:
        """Whether anything tells the predictor which frame a jump aims at."""
        return self.temporal_embeddings or (self.compat == "ac_hope" and self.ac_hope.rope_heads > 0)

    @property
    def has_memory(self) -> bool:
        """Whether a block of the pattern holds Titan memories."""
        return bool({"H", "U"} & set(self.block_pattern))

    @property
    def shares_memory_over_batch(self) -> bool:
        """Whether a clip's prediction depends on the clips beside it, so that a batch must stay in one piece."""
        return self.memory.scope == "batch"

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        require(self._size_rules())
        return self

    def _size_rules(self) -> Iterator[Rule]:
        yield from compat_rules(self)
        width, memory, attention = self.width, self.memory, self.attention
        whole = f"times width={width} must be whole"
        rule = "must be 1 with cms.mode=online, which takes one frame at a time"
        yield self.cms.mode != "online" or memory.chunk_size == 1, "memory.chunk_size", memory.chunk_size, rule, "set 1"
        yield (
            width % memory.heads == 0,
            "memory.heads",
            memory.heads,
            f"must divide width={width}",
            "change memory.heads or width",
        )
        yield (
            width % memory.heads > 0 or _whole(memory.hidden_multiplier * width / memory.heads),
            "memory.hidden_multiplier",
            memory.hidden_multiplier,
            f"times width / memory.heads = {width / memory.heads:g} must be whole",
            "change it, width or memory.heads",
        )
        if set(self.block_pattern) - {"S", "T"}:
            rule = f"is more than the {self.frames - 1} frames a clip of frames={self.frames} has to read"
            fix = "lower it, or raise frames"
            yield memory.chunk_size < self.frames, "memory.chunk_size", memory.chunk_size, rule, fix
        wide = self.patch_position == "none" or width >= 4
        yield wide, "patch_position", self.patch_position, f"needs a width of at least 4, not {width}", "raise width"
        for number, level in enumerate(self.cms.levels):
            multiplier = level.hidden_multiplier
            yield _whole(multiplier * width), f"cms.levels.{number}.hidden_multiplier", multiplier, whole, "change it"
        yield from self._longterm_rules()
        yield from self._unified_rules()
        if set(self.block_pattern) & {"S", "T", "U"}:
            size, rest = divmod(width, attention.heads)
            yield (
                rest == 0 and size % 2 == 0 and size >= 6,
                "attention.heads",
                attention.heads,
                f"must divide width={width} into an even number of at least 6 features a head",
                "change attention.heads or width",
            )
            multiplier, mlp = attention.mlp_multiplier, set(self.block_pattern) & {"S", "T"}
            yield not mlp or _whole(multiplier * width), "attention.mlp_multiplier", multiplier, whole, "change it"

    def _unified_rules(self) -> Iterator[Rule]:
        if "U" not in self.block_pattern:
            return
        chunk_rule, names = self.memory.chunk_rule, self.memory.self_modify
        rule = "takes one step size a token, and U blocks have one a feature"
        fix = "set frame_step or scan, or use H blocks"
        yield chunk_rule != "token_exact", "memory.chunk_rule", chunk_rule, rule, fix
        rule = "names memories that U blocks, whose only one is main, do not have"
        alone = "H" not in self.block_pattern and names != MEMORIES
        shown = f"[{', '.join(names)}]"
        yield not alone or set(names) <= {"main"}, "memory.self_modify", shown, rule, "set [main] or []"

    def _longterm_rules(self) -> Iterator[Rule]:
        longterm, memory = self.longterm, self.memory
        if longterm is None:
            return
        fix = "leave model.longterm out"
        rule = "has no block with memories, H or U, that model.longterm could add one to"
        pattern = "".join(self.block_pattern)
        yield self.has_memory, "block_pattern", pattern, rule, f"{fix}, or add an H or U block"
        rule = "leaves no clip a memory of its own, whose changes model.longterm could carry over"
        yield memory.scope == "clip", "memory.scope", memory.scope, rule, f"{fix}, or set memory.scope=clip"
        rule = "leaves out main, and the memory of model.longterm is written with it"
        written = "main" in memory.self_modify
        shown = f"[{', '.join(memory.self_modify)}]"
        yield written, "memory.self_modify", shown, rule, f"{fix}, or add main"
        floor = longterm.retention_floor != LongTermConfig().retention_floor
        rule = "is ignored with memory.retention=false, which keeps all"
        yield memory.retention or not floor, "longterm.retention_floor", longterm.retention_floor, rule, "leave it out"
        multiplier, heads = longterm.hidden_multiplier, memory.heads
        rule = f"times width / memory.heads = {self.width / heads:g} must be whole"
        fits = self.width % heads > 0 or _whole(multiplier * self.width / heads)
        yield fits, "longterm.hidden_multiplier", multiplier, rule, "change it, width or memory.heads"


def _whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9 and round(value) >= 1
