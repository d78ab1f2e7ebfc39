"""An earlier public predictor, AC-HOPE-ViT with pure HOPE blocks, exactly: for its checkpoints, not for new work.

Parameters have the names and shapes of `HopePredictor`, so weights move between the two. What differs is arithmetic:

- One memory is shared by all clips of a batch and written with means over them, so a clip's prediction depends on the
  clips beside it. That is refused where a batch is spread over ranks or micro-batches.
- An action reaches patches through its conditioning token alone, which without spatial mixing means: hardly.
- Step size and retention are one number a feature, s = mean 0.01 softplus(M_eta x), a = mean sigmoid(M_alpha x), over
  clips and tokens. Keys, values and queries keep their length.
- The inner loss is the mean over clips, tokens and features of surprise (M(k) - LN M(v))^2: the target goes through the
  memory's LayerNorm, the prediction does not. Surprise weighs a clip: |v - o|, the mean over tokens, o the output.
- Instead of the rank-1 preconditioner a diagonal one, p = clamp(a - s mean k^2, 0, 1), acts on the width side:

      W1 <- W1 diag(p) - clip(G1) diag(s)        W2 <- diag(p) W2 - diag(s) clip(G2)

- The outer gradient is first order: it flows through s, a and the old W, and not through keys, values and targets.

In backward three stabilisers (`clip_backward`) stand in for exact gradients, which on real features grow from block to
block beyond fp32: sign(W) for W in the gradient of p, and bounds on the gradient of every written matrix and of every
block's output. Runs can only be continued with them.

Otherwise than there:

- Every pass starts from the trained memories unless it is given a state. There, a jump went on from the memories of the
  teacher-forced pass before it, and evaluation from those of whatever had come before.
- `detach_interval` counts chunks, also those that `surprise_threshold` keeps from being written.
- The objective is this project's: a jump aims at a frame of its own in every clip, and `objective.auxiliary_weight`,
  without which keys and values are not trained, leaves out a last chunk, which nothing writes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .block import drop_path
from .cms import ContinuumMemory
from .precision import at_least_fp32
from .predictor import Prediction, check_input, normalise
from .schema import MEMORIES, ModelConfig
from .spatial_mixing import SpatialMixing
from .titan import FastWeights, MemoryTrace, chunk_sum

STEP_SCALE = 0.01
CLIP_EPS = 1e-8
ROTARY_BASE = 10000.0
MAIN = MEMORIES.index("main")


class AcHopePredictor(nn.Module):
    """`HopePredictor`'s interface; see the top of the file for what is different inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, depth = config.width, len(config.block_pattern)
        self.embed = nn.Linear(config.encoder_dim, width)
        self.action_encoder = nn.Linear(config.action_dim, width)
        self.state_encoder = nn.Linear(config.action_dim, width)
        positions = config.max_frames if config.temporal_embeddings else 0
        self.frame_position = nn.Embedding(positions, width) if positions else None
        self.target_position = nn.Embedding(positions, width) if positions else None
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(AcHopeBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.encoder_dim)

    def forward(
        self,
        features: Float[Tensor, "batch frames patches channels"],
        actions: Float[Tensor, "batch frames action"],
        states: Float[Tensor, "batch frames state"] | None = None,
        extrinsics: Float[Tensor, "batch frames numbers"] | None = None,
        *,
        target: Int[Tensor, " batch"] | None = None,
        state: tuple[FastWeights, ...] | None = None,
        frame_offset: int = 0,
        draws: Float[Tensor, "batch blocks branches"] | None = None,
        writes: bool = True,
        keep_state: bool = False,
        teach_factor: float = 1.0,
        consolidate: Float[Tensor, "batch frames"] | None = None,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> Prediction:
        """Predict from consecutive frames of each clip.

        Args:
            features: the frames' embeddings, on any scale.
            actions: action t acts between frame t and frame t + 1.
            states: the frames' states; with `model.state_dim` 0 all are taken as zero.
            extrinsics: of the frames' cameras, which the earlier predictor never read either.
            target: number of the frame to jump to, one a clip; None predicts the next frame of every frame.
            state: what an earlier pass of the same clips returned; None for the start of a clip.
            frame_offset: number in the clip of the first given frame.
            draws: uniform numbers in [0, 1) for drop-path; None drops nothing.
            writes: False lets the memories be read only.
            keep_state: return the state after the last frame.
            teach_factor: for predictors whose CMS learns within a clip; it changes nothing here.
            consolidate: for predictors with long-term memories; it changes nothing here.
            auxiliary: weights of frames in the auxiliary loss that the traces then hold; None leaves it out.

        Raises:
            ValueError: a tensor whose shape is not what the configuration says, or a target that cannot be told.
        """
        del teach_factor, consolidate, extrinsics
        check_input(self.config, features, actions, states, None, target, frame_offset)
        x = self._tokens(normalise(features), actions, states, target, frame_offset)
        angles = self._angles(x, target)
        kept, traces = [], []
        for number, block in enumerate(self.blocks):
            x, block_state, trace = block(
                x,
                None if state is None else state[number],
                None if draws is None else draws[:, number],
                angles,
                frame_offset=frame_offset,
                writes=writes,
                keep_state=keep_state,
                auxiliary=auxiliary,
            )
            kept.append(block_state)
            traces.append(trace)
        predicted = self.project(self.norm(x[:, :, self.config.num_conditioning :]))
        return Prediction(normalise(predicted), tuple(kept) if keep_state else None, tuple(traces))

    def _tokens(
        self,
        frames: Float[Tensor, "batch frames patches channels"],
        actions: Float[Tensor, "batch frames action"],
        states: Float[Tensor, "batch frames state"] | None,
        target: Int[Tensor, " batch"] | None,
        frame_offset: int,
    ) -> Float[Tensor, "batch frames tokens width"]:
        if states is None or not self.config.state_dim:
            states = torch.zeros_like(actions)
        conditioning = torch.stack([self.action_encoder(actions), self.state_encoder(states)], dim=2)
        tokens = torch.cat([conditioning, self.embed(frames)], dim=2)
        if self.frame_position is not None and self.target_position is not None:
            place = self.frame_position.weight[frame_offset : frame_offset + frames.shape[1]]
            tokens = tokens + place[:, None]
            if target is not None:
                tokens = tokens + self.target_position(target)[:, None, None]
        return tokens

    def _angles(
        self, x: Float[Tensor, "batch frames tokens width"], target: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "clips frames tokens features"] | None:
        """Rotary angles, of time, row and column; time starts at 0 in every chunk, and is target - 1 in a jump."""
        heads, frames = self.config.ac_hope.rope_heads, x.shape[1]
        if not heads:
            return None
        time = (torch.arange(frames, device=x.device) % self.config.memory.chunk_size).expand(1, frames)
        if target is not None:
            time = (target - 1)[:, None].expand(-1, frames)
        return rotary_angles(time.to(at_least_fp32(x).dtype), self.config, self.config.width // heads)


class AcHopeBlock(nn.Module):
    """Memories, then CMS, then (optionally) mixing over a frame's tokens, each pre-norm and residual."""

    def __init__(self, config: ModelConfig, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate, self.largest = drop_rate, config.ac_hope.clip_backward
        self.norm1 = nn.LayerNorm(config.width)
        self.memory = AcHopeMemory(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.cms = ContinuumMemory(config.cms, config.width)
        self.norm3 = nn.LayerNorm(config.width) if config.spatial_mixing else None
        self.spatial_mixing = SpatialMixing(config.num_tokens) if config.spatial_mixing else None

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        state: FastWeights | None = None,
        draws: Float[Tensor, "batch branches"] | None = None,
        angles: Float[Tensor, "clips frames tokens features"] | None = None,
        *,
        frame_offset: int = 0,
        writes: bool = True,
        keep_state: bool = False,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> tuple[Tensor, FastWeights | None, MemoryTrace]:
        """Apply the block to consecutive frames, the first of which has number `frame_offset` in its clip."""
        recalled, state, trace = self.memory(
            self.norm1(x), state, angles, writes=writes, keep_state=keep_state, auxiliary=auxiliary
        )
        x = x + drop_path(recalled, draws, 0, self.drop_rate)
        z, ratios = self.cms.traced(self.norm2(x), frame_offset)
        x = x + drop_path(z, draws, 1, self.drop_rate)
        trace = trace._replace(level_ratio=torch.stack(ratios, dim=-1)) if ratios else trace
        if self.norm3 is not None and self.spatial_mixing is not None:
            x = x + drop_path(self.spatial_mixing(self.norm3(x)), draws, 2, self.drop_rate)
        return _bounded(x, self.largest, dims=None), state, trace


class Reading(NamedTuple):
    """What one chunk reads from the memories, before writing into them; a row is one token of one clip."""

    output: Float[Tensor, "rows width"]
    key: Float[Tensor, "rows width"]
    value: Float[Tensor, "rows width"]
    step_size: Float[Tensor, " width"]
    retention: Float[Tensor, " width"]


class Figures(NamedTuple):
    """What one write leaves to `MemoryTrace`, detached."""

    surprise: Float[Tensor, " batch"]
    retention: Float[Tensor, ""]
    retention_min: Float[Tensor, ""]
    step_size: Float[Tensor, ""]
    step_size_p99: Float[Tensor, ""]
    gate: Float[Tensor, ""]
    write_ratio: Float[Tensor, " memories"]
    limited: Float[Tensor, " memories"]


class AcHopeMemory(nn.Module):
    """The five memories of one block, one of each for the whole batch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.ac_hope
        self.chunk_size, self.detach_interval = config.memory.chunk_size, config.memory.detach_interval
        width, hidden = config.width, round(config.memory.hidden_multiplier * config.width)
        self.query = nn.Linear(width, width, bias=False)
        self.w1 = nn.Parameter(torch.empty(len(MEMORIES), 1, hidden, width))
        self.w2 = nn.Parameter(torch.empty(len(MEMORIES), 1, width, hidden))
        self.norm_weight = nn.Parameter(torch.empty(len(MEMORIES), width))
        self.norm_bias = nn.Parameter(torch.empty(len(MEMORIES), width))
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        fast: FastWeights | None = None,
        angles: Float[Tensor, "clips frames tokens features"] | None = None,
        *,
        writes: bool = True,
        keep_state: bool = False,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> tuple[Float[Tensor, "batch frames tokens width"], FastWeights | None, MemoryTrace]:
        """Read and write chunk by chunk; arguments and results are those of `TitanMemory`.

        `angles` turn queries and keys; None turns nothing.
        """
        batch, frames = x.shape[:2]
        fast = self.start() if fast is None else fast
        x, queries = at_least_fp32(x), rotate(at_least_fp32(self.query(x)), angles, self.config.rope_heads)
        outputs, figures, disagreements = [], [], []
        for begin in range(0, frames, self.chunk_size):
            chunk = slice(begin, min(begin + self.chunk_size, frames))
            shape, query = x[:, chunk].shape, queries[:, chunk].flatten(0, 2)
            # A write after the last read of the pass reaches nothing, and without it only the main memory is read.
            if writes and (keep_state or chunk.stop < frames):
                turns = None if angles is None else angles[:, chunk]
                before = fast
                recalled, fast, figure, key, value = self.step(fast, x[:, chunk], query, turns)
                figures.append(figure)
                if auxiliary is not None:
                    disagreements.append(self.disagreement(before, key, value).view(*shape[:3]).mean(2))
            else:
                recalled = self._recall(fast, query.unsqueeze(0), slice(MAIN, None))[0]
            outputs.append(recalled.view(shape))
        output = self.out(torch.cat(outputs, dim=1))
        trace = self._trace(figures, fast, batch, frames)
        if auxiliary is not None:
            apart = torch.cat(disagreements, dim=1) if disagreements else output.new_zeros(batch, 0)
            trace = trace._replace(auxiliary=chunk_sum(apart, auxiliary, self.chunk_size))
        return output, fast if keep_state else None, trace

    def start(self) -> FastWeights:
        """A copy of the trained memories, because a view would outlive the gathered parameter."""
        w1, w2 = (at_least_fp32(w).unsqueeze(2).clone() for w in (self.w1, self.w2))
        return FastWeights(w1, w2)

    def step(
        self,
        fast: FastWeights,
        x: Float[Tensor, "batch frames tokens width"],
        query: Float[Tensor, "rows width"],
        angles: Float[Tensor, "clips frames tokens features"] | None,
    ) -> tuple[Float[Tensor, "rows width"], FastWeights, Figures, Tensor, Tensor]:
        """Read one chunk, then write it; returned besides are the keys and values of its rows."""
        reading = self.read(fast, x, query, angles)
        fast, figures = self.write(fast, reading, len(x))
        return reading.output, fast, figures, reading.key, reading.value

    def disagreement(
        self, fast: FastWeights, key: Float[Tensor, "rows width"], value: Float[Tensor, "rows width"]
    ) -> Float[Tensor, " rows"]:
        """Squared distance of what the main memory recalls at keys to values; see `TitanMemory.disagreement`."""
        held = fast._replace(w1=fast.w1.detach(), w2=fast.w2.detach())
        norm = self.norm_weight[MAIN].detach(), self.norm_bias[MAIN].detach()
        recalled = self._recall(held, key.unsqueeze(0), slice(MAIN, None), norm)[0]
        return ((recalled - value.detach()).square() + (recalled.detach() - value).square()).mean(-1)

    def read(
        self,
        fast: FastWeights,
        x: Float[Tensor, "batch frames tokens width"],
        query: Float[Tensor, "rows width"],
        angles: Float[Tensor, "clips frames tokens features"] | None,
    ) -> Reading:
        """Read the main memory at the query, the others at the input."""
        shape, x = x.shape, x.flatten(0, 2)
        recalled = self._recall(fast, torch.cat([x.expand(MAIN, *x.shape), query.unsqueeze(0)]), slice(None))
        key, value, eta, alpha, output = recalled.unbind(0)
        if angles is not None:
            key = rotate(key.view(shape), angles, self.config.rope_heads).flatten(0, 2)
        step_size, retention = STEP_SCALE * F.softplus(eta).mean(0), torch.sigmoid(alpha).mean(0)
        return Reading(output, key, value, step_size, retention)

    def write(self, fast: FastWeights, reading: Reading, batch: int) -> tuple[FastWeights, Figures]:
        """Write one chunk into all five memories; see the equations at the top of the file."""
        config, w1, w2 = self.config, fast.w1[:, 0, 0], fast.w2[:, 0, 0]
        surprise = (reading.value - reading.output).detach().norm(dim=-1).view(batch, -1).mean(1)
        gradient1, gradient2 = self._inner_gradient(fast, reading, surprise)
        step, key = reading.step_size, reading.key.detach()
        kept = (reading.retention - step * key.square().mean(0)).clamp(0, 1)
        delta1 = step * _clip(gradient1, config.clip_inner, (-2, -1))
        delta2 = step[:, None] * _clip(gradient2, config.clip_inner, (-2, -1))
        new1 = _scaled(w1, kept, config.clip_backward) - delta1
        new2 = _scaled(w2, kept[:, None], config.clip_backward) - delta2
        new1, new2 = (_bounded(w, config.clip_backward, (-2, -1)) for w in (new1, new2))
        written = torch.ones_like(surprise[0], dtype=torch.bool)
        if config.surprise_threshold:
            written = (surprise > config.surprise_threshold).any()
            new1, new2 = torch.where(written, new1, w1), torch.where(written, new2, w2)
        # Chunks count, not writes: which of them the threshold holds back is known to the device only.
        count = fast.num_writes + 1
        if self.detach_interval and count % self.detach_interval == 0:
            new1, new2 = new1.detach(), new2.detach()
        with torch.no_grad():
            changed, old = (_norm(a).square() + _norm(b).square() for a, b in ((delta1, delta2), (w1, w2)))
            norms = torch.stack([_norm(gradient1), _norm(gradient2)])
            limited = (norms > (config.clip_inner or torch.inf)).to(step.dtype).mean(0)
            figures = Figures(
                surprise=_relative_surprise(reading.output, reading.value, batch),
                retention=torch.where(written, kept.mean(), 1.0),
                retention_min=torch.where(written, kept.amin(), 1.0),
                step_size=step.mean(),
                # Of features: a step size is already the mean over tokens.
                step_size_p99=step.kthvalue(math.ceil(0.99 * len(step))).values,
                gate=written.to(step.dtype),
                write_ratio=written * (changed / old).sqrt(),
                limited=limited,
            )
        return FastWeights(new1[:, None, None], new2[:, None, None], num_writes=count), figures

    @torch.no_grad()
    def _inner_gradient(
        self, fast: FastWeights, reading: Reading, surprise: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "memories hidden width"], Float[Tensor, "memories width hidden"]]:
        """Gradient of the inner loss with respect to both matrices of every memory, in closed form."""
        w1, w2, key = fast.w1[:, 0, 0], fast.w2[:, 0, 0], reading.key
        target = self._recall(fast, reading.value.unsqueeze(0), slice(None))
        pre = key @ w1.mT
        hidden = F.gelu(pre)
        weight = 2 / key.numel() * surprise.repeat_interleave(len(key) // len(surprise))
        error = weight[:, None] * (hidden @ w2.mT + key - target)
        slope = torch.ops.aten.gelu_backward(error @ w2.to(error.dtype), pre)
        return at_least_fp32(slope.mT @ key.to(slope.dtype)), at_least_fp32(error.mT @ hidden.to(error.dtype))

    def _recall(
        self,
        fast: FastWeights,
        z: Float[Tensor, "#memories rows width"],
        which: slice,
        norm: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "memories rows width"]:
        """LN(z + W2 gelu(W1 z)), memory by memory; `norm` in place of the memories' own weight and bias."""
        weight, bias = norm or (self.norm_weight[which, None], self.norm_bias[which, None])
        out = z + F.gelu(z @ fast.w1[which, 0, 0].mT) @ fast.w2[which, 0, 0].mT
        out = F.layer_norm(at_least_fp32(out), out.shape[-1:])
        return out * at_least_fp32(weight) + at_least_fp32(bias)

    @torch.no_grad()
    def _trace(self, figures: list[Figures], fast: FastWeights, batch: int, frames: int) -> MemoryTrace:
        """Figures of the shared memories, the same for every clip but for its surprise."""
        start = at_least_fp32(self.w1[:, 0])
        ends = [(_norm(w) / _norm(start)).expand(batch, -1) for w in (fast.w1[:, 0, 0], fast.w1[:, 0, 0] - start)]
        each = start.new_zeros(batch, 0, len(MEMORIES))
        none, levels = each[..., 0], each.new_zeros(batch, frames, 0)
        shared = {name: each if name in ("write_ratio", "limited") else none for name in Figures._fields}
        if figures:
            columns = Figures(*(torch.stack(column) for column in zip(*figures, strict=True)))
            shared = {name: figure.expand(batch, *figure.shape) for name, figure in columns._asdict().items()}
            shared["surprise"] = columns.surprise.T
        return MemoryTrace(
            **shared, norm_ratio=ends[0], drift=ends[1], level_ratio=levels, longterm_gate=levels, longterm=None
        )


class _Scaled(torch.autograd.Function):
    """W p, with sign(W) in place of W in the gradient of p."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(w, p)
        return w * p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (w, p) = gradients, ctx.saved_tensors
        return gradient * p, (gradient * w.sign()).sum_to_size(p.shape)


class _Bounded(torch.autograd.Function):
    """The identity, with the norm of the gradient bounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: float, dims: tuple[int, ...] | None) -> Tensor:
        ctx.largest, ctx.dims = largest, dims
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _clip(gradients[0], ctx.largest, ctx.dims), None, None


def _scaled(w: Tensor, p: Tensor, largest: float) -> Tensor:
    return _Scaled.apply(w, p) if largest else w * p  # pyright: ignore[reportReturnType]


def _bounded(x: Tensor, largest: float, dims: tuple[int, ...] | None) -> Tensor:
    return _Bounded.apply(x, largest, dims) if largest else x  # pyright: ignore[reportReturnType]


def _clip(gradient: Tensor, largest: float, dims: tuple[int, ...] | None) -> Tensor:
    """Scale down what is longer than `largest` (0: nothing), without asking the device how long it is."""
    if not largest:
        return gradient
    norm = torch.linalg.vector_norm(gradient, dim=dims, keepdim=dims is not None)
    return gradient * torch.where(norm > largest, largest / (norm + CLIP_EPS), 1.0)


def rotary_angles(
    time: Float[Tensor, "clips frames"], config: ModelConfig, head_features: int
) -> Float[Tensor, "clips frames tokens features"]:
    """Angle of every rotated feature of a head.

    Time, row and column turn an even number of features each, at most a third of the head. Within an axis the rates of
    the first half of the features repeat in the second half, although neighbours are turned in pairs: the members of a
    pair turn at different rates. Conditioning tokens sit at row and column 0.
    """
    half = head_features // 3 // 2
    rate = ROTARY_BASE ** -(torch.arange(half, device=time.device, dtype=time.dtype) / half)
    rows, columns = config.grid
    patch = torch.arange(-config.num_conditioning, config.num_patches, device=time.device)
    row, column = (torch.where(patch < 0, 0, at).to(time.dtype) for at in (patch // columns, patch % columns))
    place = torch.stack(
        torch.broadcast_tensors(time[..., None], row, column * (rows / columns)), dim=-1
    )  # [clips, frames, tokens, 3]
    return (place[..., None] * torch.cat([rate, rate])).flatten(-2)


def rotate(
    x: Float[Tensor, "batch frames tokens width"],
    angles: Float[Tensor, "clips frames tokens features"] | None,
    heads: int,
) -> Float[Tensor, "batch frames tokens width"]:
    """Turn neighbouring features of every head by their angles; features that have no angle stay as they are."""
    if angles is None:
        return x
    parts = x.unflatten(-1, (heads, -1))
    moved, rest = parts.split([angles.shape[-1], parts.shape[-1] - angles.shape[-1]], dim=-1)
    across = torch.stack([-moved[..., 1::2], moved[..., 0::2]], dim=-1).flatten(-2)
    turned = moved * angles.cos().unsqueeze(-2) + across * angles.sin().unsqueeze(-2)
    return torch.cat([turned, rest], dim=-1).flatten(-2)


def _relative_surprise(
    recalled: Float[Tensor, "tokens width"], value: Float[Tensor, "tokens width"], batch: int
) -> Float[Tensor, " batch"]:
    error, scale = (value - recalled).square().sum(-1), value.square().sum(-1) + recalled.square().sum(-1)
    return (error / scale).view(batch, -1).mean(1)


def _norm(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=(-2, -1))
