from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

README = Path(__file__).resolve().parents[3] / "hopescale" / "optim" / "README.md"


def test_the_example_of_the_readme_trains_with_a_scheduler() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {"model": nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))}
    exec(example, names)
    model, optimizer, x = names["model"], names["optimizer"], torch.randn(64, 16)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=100)
    losses = []
    for _ in range(100):
        loss = (model(x) - x[:, :8]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
