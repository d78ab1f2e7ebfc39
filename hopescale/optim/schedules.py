"""Learning rate as a factor of the step: linear warm-up, constant, linear or cosine decay."""

from __future__ import annotations

import math

from .schema import ScheduleConfig


def rate_factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Factor on the base rate for optimizer step `step` (from 0) of a run of `num_steps`.

    Warm-up rises from `start` at step 0 to 1 at its end; decay falls from 1 to `end`, which it would reach one step
    after the last.
    """
    warmup, decay = config.warmup * num_steps, config.decay * num_steps
    if step < warmup:
        return config.start + (1 - config.start) * step / warmup
    into_decay = step - (num_steps - decay)
    if decay and into_decay > 0:
        done = min(into_decay / decay, 1.0)
        left = 1 - done if config.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return config.end + (1 - config.end) * left
    return 1.0
