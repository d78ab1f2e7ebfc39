"""What skill the probe allows to whoever remembers nothing: a bound, without any model.

`python tests/benchmarks/probe_bound.py [--clips 96] [--draws 32]` takes held-out clips of `hidden`, and for each the
positions that frames 4 to 7 would have had for blocks of other masses and frictions. Drawn and encoded, their median is
the best single answer, in every token and channel, to what frame 3 and the pushes leave open: no model without memory
should do much better. For one that infers mass and friction from frames 0 to 3 the limit is 1.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode import lite0
from data_pipeline.pixels.render import WOOD, Scene, render_frames
from data_pipeline.pixels.simulate import BLOCK_SIDE, VIEW, rim, simulate_clip
from hopescale.evaluate import CONTEXT
from hopescale.model.predictor import normalise
from tests.benchmarks.ablation_rows import DATA

SPEC = DATA["hidden"]
SMALL = replace(SPEC, size=32)


def mobilities(count: int) -> np.ndarray:
    """1 / (mass^2 friction) of training clips: displacements are in proportion to it."""
    blocks = np.stack([simulate_clip(SMALL, "hidden", "train", index)["truth"][0] for index in range(count)])
    return 1 / (blocks[:, 6] ** 2 * blocks[:, 7])


def encoded(network: lite0.EfficientNetLite0, positions: np.ndarray, angle: float) -> Tensor:
    """Features [n, N, E] of frames with the block at each of `positions` [n, 2]."""
    poses = np.concatenate([positions, np.full((len(positions), 1), angle)], axis=1)
    frames = torch.from_numpy(render_frames(Scene(BLOCK_SIDE, WOOD, rim()), poses, SPEC.size, VIEW))
    with torch.no_grad():
        return normalise(torch.cat([lite0.encode_frames(network, part) for part in frames.split(16)]))


def errors(network: lite0.EfficientNetLite0, index: int, others: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean L1 of the best single answer and of repeating frame 3, at each frame after it, of one held-out clip."""
    truth = simulate_clip(SMALL, "hidden", "heldout", index)["truth"].astype(np.float64)
    newest, path = truth[CONTEXT - 1, :2], truth[CONTEXT:, :2] - truth[CONTEXT - 1, :2]
    own = 1 / (truth[0, 6] ** 2 * truth[0, 7])
    positions = newest + others[:, None, None] / own * path
    possible = encoded(network, positions.reshape(-1, 2), truth[0, 2]).unflatten(0, positions.shape[:2])
    real = encoded(network, truth[CONTEXT - 1 :, :2], truth[0, 2])
    best = possible.median(dim=0).values
    return (best - real[1:]).abs().mean((1, 2)), (real[:1] - real[1:]).abs().mean((1, 2))


def main() -> None:
    """Print the bound and the errors behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--draws", type=int, default=32)
    arguments = parser.parse_args()
    network, others = lite0.load_lite0(), mobilities(arguments.draws)
    rows = [torch.stack(errors(network, index, others)) for index in range(arguments.clips)]
    best, copied = torch.stack(rows).mean(0)
    for frame, pair in enumerate(zip(best.tolist(), copied.tolist(), strict=True), start=CONTEXT):
        print(f"frame {frame}: best answer {pair[0]:.3f}, frame {CONTEXT - 1} repeated {pair[1]:.3f}")
    print(f"skill_context without memory: {1 - float(best.sum() / copied.sum()):.3f}")


if __name__ == "__main__":
    main()
