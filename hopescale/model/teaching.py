"""Frame by frame through the predictor, each frame teaching the CMS levels what the one before it got wrong.

Needed by `model.cms.mode: online` alone. The prediction made at frame t waits in the states of the H blocks; when frame
t + 1 comes in, its error becomes the teach signal of frame t, which the levels learn from (`cms_online.py`) before they
see frame t + 1. So a prediction of frame t + 1 depends on frames up to t only. A rollout that feeds predictions back
sees no error: levels still write what true frames have taught them and is not due yet, and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .block import BlockState, HopeState
from .longterm import total
from .schema import CmsConfig, OnlineConfig
from .titan import NO_FIGURES, MemoryTrace


def teach_factor(config: OnlineConfig, step: int) -> float:
    """Factor on all teach scales after `step` optimizer steps: linear warm-up from 0, then 1, then linear decay to 0.

    It belongs to the weights of that step, so a checkpoint is evaluated with the factor of the step it was saved at.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.decay_start is None or config.decay_end is None or step <= config.decay_start:
        return 1.0
    return max(0.0, (config.decay_end - step) / (config.decay_end - config.decay_start))


class AtFactor(nn.Module):
    """A predictor whose teach scales have a factor, in every pass."""

    def __init__(self, predictor: nn.Module, factor: float) -> None:
        super().__init__()
        self.predictor, self.factor = predictor, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the predictor."""
        return self.predictor(*args, teach_factor=self.factor, **kwargs)


def at_step(predictor: nn.Module, config: CmsConfig, step: int) -> nn.Module:
    """The predictor with the teach factor of its optimizer step; itself where no level learns within a clip."""
    return AtFactor(predictor, teach_factor(config.online, step)) if config.mode == "online" else predictor


def teach_signal(
    prediction: Float[Tensor, "batch 1 patches channels"],
    truth: Float[Tensor, "batch 1 patches channels"],
    project: Float[Tensor, "channels width"],
    clip: float,
) -> Float[Tensor, "batch patches width"]:
    """Gradient of half the squared error, mean over patches, at the input of the output projection.

    Both frames are layer-normalised, and so is what the projection makes; the gradient passes that norm as it is.

    Args:
        prediction: of the frame that came in.
        truth: that frame.
        project: weight of the output projection.
        clip: largest root mean square over a clip's patches of the length of a patch's error after `project`.
    """
    signal = ((prediction - truth)[:, 0] @ project).to(prediction.dtype)
    length = signal.square().sum(dim=-1).mean(dim=-1).sqrt()
    limit = (clip / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)
    return signal * (limit / signal.shape[1])[:, None, None]


def awaiting(
    state: Sequence[BlockState], prediction: Float[Tensor, "batch 1 patches channels"]
) -> tuple[BlockState, ...]:
    """The state with a prediction whose error the next frame will show."""
    return _with(state, prediction=prediction.detach(), signal=None)


@torch.no_grad()
def taught(
    state: Sequence[BlockState],
    truth: Float[Tensor, "batch 1 patches channels"],
    project: Float[Tensor, "channels width"],
    clip: float,
    factor: float,
) -> tuple[BlockState, ...]:
    """The state with the teach signal that the frame `truth` gives, if a prediction of it waits and factor > 0."""
    waits = [s.cms.prediction for s in state if isinstance(s, HopeState) and s.cms is not None]
    if not factor or not waits or waits[0] is None:
        return _with(state, prediction=None, signal=None)
    return _with(state, prediction=None, signal=factor * teach_signal(waits[0], truth, project.detach(), clip))


def joined(traces: Sequence[MemoryTrace]) -> MemoryTrace:
    """Figures of one pass over all frames from those of each: all columns, the memories' sizes at the end."""
    columns = [name for name in MemoryTrace._fields if name not in ("norm_ratio", "drift", *NO_FIGURES)]
    lasting = [trace.longterm for trace in traces if trace.longterm is not None]
    auxiliary = [trace.auxiliary for trace in traces if trace.auxiliary is not None]
    return traces[-1]._replace(
        **{name: torch.cat([getattr(trace, name) for trace in traces], dim=1) for name in columns},
        longterm=total(lasting) if lasting else None,
        auxiliary=torch.stack(auxiliary).sum(0) if auxiliary else None,
    )


def _with(state: Sequence[BlockState], prediction: Tensor | None, signal: Tensor | None) -> tuple[BlockState, ...]:
    return tuple(
        s._replace(cms=s.cms._replace(prediction=prediction, signal=signal))
        if isinstance(s, HopeState) and s.cms is not None
        else s
        for s in state
    )
