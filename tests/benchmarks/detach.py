"""What cutting the outer gradient's path through the memories saves and costs, as a Markdown table.

`python tests/benchmarks/detach.py` takes a minute: one H block of phase-5 width on an 8 x 8 grid, a clip of 7 steps.
Gradients are those of the teacher loss with respect to the memories' trained matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import MEMORIES
from hopescale.model.titan import TitanMemory
from tests.benchmarks.model import PHASE_5, build, clips
from tests.ledger import Ledger

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("0 (never)", {}),
    ("4", {"detach_interval": 4}),
    ("2", {"detach_interval": 2}),
    ("1", {"detach_interval": 1}),
    ("2, `detach_rule: all`", {"detach_interval": 2, "detach_rule": "all"}),
    ("1, `detach_rule: all`", {"detach_interval": 1, "detach_rule": "all"}),
)


def gradients(model: HopePredictor, frame: int | None) -> Tensor:
    """Gradient of the memories' W1, [memories, ...], of the loss of one frame or of all."""
    features, actions, states = clips(model.config, 1)
    model.zero_grad(set_to_none=True)
    error = (model(features, actions, states).frames - features).abs().mean(dim=(0, 2, 3))
    (error.mean() if frame is None else error[frame]).backward()
    titan = next(m for m in model.modules() if isinstance(m, TitanMemory))
    return titan.w1.grad.clone() if titan.w1.grad is not None else torch.zeros_like(titan.w1)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    reference, bytes_before = None, 0
    print("| `detach_interval` | peak bytes | cosine to 0: " + " / ".join(MEMORIES) + " | frames that train main |")
    print("|---|---:|---:|---:|")
    for name, memory in CASES:
        model = build(PHASE_5, block_pattern="H", grid=(8, 8), memory=memory)
        with Ledger() as seen:
            whole = gradients(model, None)
        peak = seen.peaks()["total"]
        if reference is None:
            reference, bytes_before = whole, peak
        pairs = zip(whole.flatten(1), reference.flatten(1), strict=True)
        cosines = [float(F.cosine_similarity(mine, full, dim=0)) for mine, full in pairs]
        reached = sum(bool(gradients(model, frame)[-1].any()) for frame in range(model.config.frames - 1))
        cells = [name, f"{peak / bytes_before:.2f}", " / ".join(f"{c:.3f}" for c in cosines), str(reached)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
