"""Number of trained parameters in closed form; a test holds it equal to the modules'."""

from __future__ import annotations

from collections.abc import Sequence

from .schema import MEMORIES, ModelConfig


def parameter_count(model: ModelConfig) -> int:
    """All parameters of the predictor of a configuration."""
    return shared_parameters(model) + sum(block_parameters(model, kind) for kind in model.block_pattern)


def shared_parameters(model: ModelConfig) -> int:
    """Everything outside the blocks: encoders, position tables, last norm, projection back to channels."""
    width, channels = model.width, model.encoder_dim
    conditioning = sum((size + 1) * width for size in (model.action_dim, model.state_dim, model.extrinsics_dim) if size)
    tables = 2 * model.max_frames * width if model.temporal_embeddings else 0
    return (channels + 1) * width + conditioning + tables + 2 * width + (width + 1) * channels


def block_parameters(model: ModelConfig, kind: str) -> int:
    """One block of `model.block_pattern`."""
    width, heads = model.width, model.memory.heads
    if kind in ("S", "T"):
        return attention_block(width, model.attention.mlp_multiplier)
    levels = [level.hidden_multiplier for level in model.cms.levels]
    memory = memory_parameters(width, model.memory.hidden_multiplier, heads)
    lasting = model.longterm
    added = longterm_parameters(width, lasting.hidden_multiplier, lasting.gate, heads) if lasting else 0
    if kind == "U":
        return unified_block(width, memory, levels) + added
    mixing = mixing_parameters(width, model.num_tokens) if model.spatial_mixing else 0
    return hope_block(width, memory, levels) + added + mixing


def memory_parameters(width: int, multiplier: float, heads: int = 1) -> int:
    """One memory: two matrices a head, and a norm."""
    return round(2 * multiplier * width**2 / heads) + 2 * width


def cms_parameters(width: int, multipliers: Sequence[float]) -> int:
    """All levels of a CMS, two matrices with biases and a norm each, and the norm before them."""
    levels = sum(round(2 * m * width**2 + m * width) + 3 * width for m in multipliers)
    return levels + 2 * width if levels else 0


def mixing_parameters(width: int, tokens: int) -> int:
    """Mixing over the tokens of a frame: two matrices without biases, and its norm."""
    return 2 * tokens**2 + 2 * width


def hope_block(width: int, memory: int, levels: Sequence[float]) -> int:
    """An H block without mixing: query, output with bias, five memories, CMS, and a norm before each."""
    return 2 * width**2 + 3 * width + len(MEMORIES) * memory + cms_parameters(width, levels)


def unified_block(width: int, memory: int, levels: Sequence[float]) -> int:
    """A U block: attention; query, key, value, output with bias and two gates of a memory; CMS; a norm before each."""
    attention = 4 * width**2 + 6 * width
    return attention + 4 * width**2 + 5 * width + memory + cms_parameters(width, levels)


def attention_block(width: int, mlp_multiplier: float) -> int:
    """An S or T block: query, key, value and output, an MLP, and a norm before each."""
    mlp = round(2 * mlp_multiplier * width**2 + mlp_multiplier * width) + width
    return 4 * width**2 + 4 * width + mlp + 4 * width


def longterm_parameters(width: int, multiplier: float, gate: str, heads: int = 1) -> int:
    """A long-term memory and its gate, which sees a token, or with `retrieval` also what it recalls."""
    return memory_parameters(width, multiplier, heads) + (2 if gate == "retrieval" else 1) * width + 1
